"""The rewards of docs/rewards.md, as they stand there, in a run."""

from __future__ import annotations

import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowgrpo_fast.recipe_io import override
from flowgrpo_fast.rewards.scoring import Scorer
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import train_step
from flowgrpo_fast.types import PromptSet

PAGE = (Path(__file__).parents[2] / "docs/rewards.md").read_text()


@pytest.fixture
def rewards(monkeypatch) -> types.ModuleType:
    module = types.ModuleType("my_rewards")
    exec(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[0], vars(module))
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    return module


TERMS = """task.rewards=[
    {"is": "RewardTerm", "function": "my_rewards:contrast"},
    {"is": "RewardTerm", "function": "my_rewards:brightness", "takes": "metadata", "weight": 2.0},
    {"is": "RewardTerm", "function": "my_rewards:win_rate", "takes": "record", "group_wise": true}
]"""


@pytest.mark.usefixtures("rewards")
def test_the_three_forms_run(toy_recipe, tmp_path) -> None:
    lines = re.findall(r"^    (\{.*\})$", PAGE, flags=re.MULTILINE)
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + '\n{"prompt": "low"}\n')
    recipe = override(toy_recipe(), [TERMS, f"data.path={tmp_path / 'prompts.jsonl'}"])
    engine = build_engine(recipe, torch.device("cpu"))
    assert engine.prompts.metadata[0]["brightness"] == 0.3
    metrics = train_step(engine).metrics
    assert metrics["reward/win_rate"] == pytest.approx(0.5)
    named = [metrics[f"reward/{name}"] for name in ("contrast", "brightness", "win_rate")]
    assert metrics["reward"] == pytest.approx(named[0] + 2 * named[1] + named[2])


@pytest.mark.usefixtures("rewards")
def test_their_numbers(toy_recipe) -> None:
    images = torch.tensor([[0.0, 0.2], [0.4, 0.8], [1.0, 1.0]]).view(3, 1, 1, 2)
    asked = PromptSet(("a", "a", "b"), ({"brightness": 0.3}, {"brightness": 0.3}, {}))
    terms = override(toy_recipe(), [TERMS]).task.rewards
    scores = Scorer(terms, lambda x: x, torch.device("cpu")).score(images, asked, torch.tensor([0, 0, 1]), 2)
    spread = torch.tensor([0.1, 0.2, 0.0]) * 2**0.5
    torch.testing.assert_close(scores.objectives["contrast"], spread)
    torch.testing.assert_close(scores.objectives["brightness"], torch.tensor([-0.2, -0.3, -0.5]))
    assert scores.objectives["win_rate"].tolist() == [0.0, 1.0, 0.0]
    assert torch.equal(scores.signals["win_rate/ink"], (images[:, 0] < 0.5).float())
    assert replace(terms[0], name="other").objective == "other"
