"""What docs/methods/trajectories.md says of the digits is what is checked in."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.digits_methods import BASE, results
from benchmarks.digits_recipes import reached

PAGE = Path(__file__).parents[2] / "docs/methods/trajectories.md"
RUNS = results()
TARGETS = {run["seed"]: run["after"]["reward"] for run in RUNS if run["label"] == BASE}


@pytest.mark.parametrize("label", ["gcpo", "op_grpo", "op_grpo_fresh", "tree_grpo"])
def test_the_page_says_what_was_measured(label: str) -> None:
    own = [run for run in RUNS if run["label"] == label]
    assert sorted(run["seed"] for run in own) == sorted(TARGETS) == [0, 1, 2]
    reward = sum(run["after"]["reward"] for run in own) / 3
    judge = 100 * sum(run["after"]["judge"] for run in own) / 3
    spent = sum(run["network_evaluations"] for run in own) / 3e3
    points = [point for run in own if (point := reached(run["curve"], TARGETS[run["seed"]]))]
    words = f"reward {reward:.2f}, judge {judge:.1f} % after {spent:.0f}k evaluations"
    text = " ".join(PAGE.read_text().split())
    assert words in text, words
    if len(points) == 3:
        there = f"Flow-GRPO's last reward after {sum(p['network_evaluations'] for p in points) / 3e3:.0f}k"
    else:
        there = f"Flow-GRPO's last reward at {len(points)} of 3 seeds"
    assert there in text, there
