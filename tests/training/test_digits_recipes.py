"""The digits benchmark's arithmetic, and that the docs show what is checked in."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import digits_recipes

ROOT = Path(__file__).parents[2]


def curve(rewards, cost):
    return [
        {"step": i, "network_evaluations": i * cost, "network_backwards": i, "reward": r}
        for i, r in enumerate(rewards)
    ]


def test_targets_are_shares_of_flow_grpos_gain_at_the_same_seed() -> None:
    runs = [
        {"recipe": "flow_grpo", "seed": 0, "curve": curve([-1, 0, 0.8, 1], 100)},
        {"recipe": "quick", "seed": 0, "curve": curve([-1, 0.9, 1.1], 40)},
        {"recipe": "short", "seed": 0, "curve": curve([-1, 0.5], 10)},
        {"recipe": "alone", "seed": 1, "curve": curve([-1, 0.5], 10)},
    ]
    rows = digits_recipes.compare(runs)
    assert {row["recipe"] for row in rows} == {"flow_grpo", "quick", "short"}
    found = {(row["recipe"], row["share"]): row for row in rows}
    assert found["quick", 1.0]["network_evaluations"] == 80
    assert found["quick", 1.0]["fewer_network_evaluations"] == 3.75
    assert found["quick", 0.9]["target"] == 0.8
    assert found["quick", 0.9]["network_evaluations"] == 40
    assert found["quick", 0.9]["fewer_network_evaluations"] == 5.0
    assert found["short", 0.9]["network_evaluations"] is None
    assert "| `short` | 0 of 1 seeds | 0 of 1 seeds | 0 of 1 seeds | 0.500 |" in digits_recipes.table(rows)


def test_the_page_shows_the_checked_in_runs() -> None:
    result = json.loads((ROOT / "benchmarks/results/digits_recipes_cpu.json").read_text())
    assert result["until_flow_grpo"] == digits_recipes.compare(result["runs"])
    assert (
        digits_recipes.table(result["until_flow_grpo"])
        in (ROOT / "docs/pruning_and_exploring.md").read_text()
    )
    names = [(run["recipe"], run["seed"]) for run in result["runs"]]
    assert sorted(names) == sorted((name, seed) for name in digits_recipes.NAMES for seed in range(3))
