"""docs/own_parts.md, run: its two parts, written to a module, train through the command line."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from flowgrpo_fast import cli
from flowgrpo_fast.recipe_io import load_recipe

PAGE = (Path(__file__).parents[1] / "docs" / "own_parts.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
SMALL = ["num_prompts=2", "group_size=4", "num_steps=2", "task.num_eval_samples=10", "task.judge="]


@pytest.fixture
def my_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_parts.py").write_text("\n".join(BLOCKS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_each_part_takes_at_most_25_lines() -> None:
    assert len(BLOCKS) == 2
    for block in BLOCKS:
        body = block[block.index("@dataclass") :]
        assert len([line for line in body.splitlines() if line.strip()]) <= 25


def test_the_page_trains(my_parts: Path) -> None:
    command = re.search(r"flowgrpo-fast (train .*?)\n\n", PAGE, flags=re.DOTALL)
    assert command is not None
    words = shlex.split(command[1].replace("\\\n", " "))
    cli.main([*words, *SMALL, "--out", str(my_parts / "run")])
    rows = [json.loads(line) for line in (my_parts / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "grad_norm" in row]
    assert len(trained) == 2
    assert all(row["grad_norm"] > 0 for row in trained)
    # 8 samples, 10 steps of the rollout, then one forward at each of three noise levels.
    assert trained[0]["network_evaluations"] == 8 * 10 + 8 * 3
    recipe = load_recipe(my_parts / "run")
    assert (type(recipe.objective).__name__, recipe.objective.times) == ("BetterHalf", 3)
    assert recipe.credit[1].solved == 1.0


def test_the_credit_step_is_what_the_page_says(my_parts: Path) -> None:
    from my_parts import FadeWhenSolved

    from flowgrpo_fast.types import Credit, Draws, Scored, Scores, Trajectory

    total = torch.tensor([0.0, -2.0, 3.0, 1.0])  # two groups, of mean -1 and 2
    zeros = torch.zeros(4, dtype=torch.int64)
    draws = Draws(zeros[:2], torch.tensor([0, 0, 1, 1]), zeros, zeros)
    samples = Trajectory(None, draws, torch.zeros(4, 1), (), torch.zeros(1, 8))  # type: ignore[arg-type]
    scored = Scored(samples, Scores(total), {})
    credit = FadeWhenSolved(solved=1.0)(Credit(torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.ones(4)), scored)
    assert credit.advantages.tolist() == pytest.approx([2 / 3, -2 / 3, 0.0, 0.0])
