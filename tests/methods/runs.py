"""Small runs of named methods on the digits, for their tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowgrpo_fast.cli import main
from flowgrpo_fast.data.draws import draw
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.recipe_io import override
from flowgrpo_fast.recipes import RECIPES, digits
from flowgrpo_fast.training.checkpoint import load_checkpoint, save_checkpoint
from flowgrpo_fast.training.engine import Engine, build_engine
from flowgrpo_fast.training.learner import Learner
from flowgrpo_fast.training.loop import make_batch, train_step
from flowgrpo_fast.types import Batch

CPU = torch.device("cpu")
SMALL = ("num_prompts=2", "group_size=4", "task.judge=", "optimizer.num_updates=1")


def small(name: str, *changes: str) -> Recipe:
    """The recipe fitted to the digits, two prompts of four samples, one update."""
    return override(digits(RECIPES[name].make()), [*SMALL, *changes])


def batch_of(engine: Engine, step: int = 0) -> Batch:
    """What the training step would learn from."""
    recipe, size = engine.recipe, len(engine.prompts)
    draws = draw(
        recipe.data.draw(step, recipe.seed, recipe.num_prompts, size),
        step=step,
        seed=recipe.seed,
        num_drawn=recipe.num_drawn,
        share_start=recipe.topology.shares_start,
        device=CPU,
    )
    return make_batch(engine, recipe.experience.collect(engine.stage, draws, step).scored())


def gradients(recipe: Recipe, rows: int | None = None) -> tuple[list[Tensor], dict[str, float]]:
    """The gradient of the first update, before it is clipped, and what the first step measured.

    Args:
        rows: of a forward of the update; None = the rollout's.
    """
    held: list[list[Tensor]] = []
    step = Learner.step

    def hold(self: Learner) -> Any:
        held.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters])
        return step(self)

    engine = build_engine(recipe, CPU)
    with pytest.MonkeyPatch.context() as patch:
        if rows is not None:
            patch.setattr(Learner, "rows_at", lambda self, point: rows)
        patch.setattr(Learner, "step", hold)
        metrics = train_step(engine).metrics
    return held[0], metrics


def assert_resumes(recipe: Recipe, folder: Path) -> None:
    """One step, a checkpoint and two steps give the bits of an engine that starts at the checkpoint."""
    engine = build_engine(recipe, CPU)
    train_step(engine)
    saved = save_checkpoint(engine, folder)
    ahead = [train_step(engine).metrics for _ in range(2)]
    again = build_engine(recipe, CPU)
    load_checkpoint(again, saved)
    assert [train_step(again).metrics for _ in range(2)] == ahead
    for a, b in zip(engine.learner.parameters, again.learner.parameters, strict=True):
        assert torch.equal(a, b)
    for name, snapshot in engine.learner.snapshots.items():
        other = again.learner.snapshots[name]
        assert all(torch.equal(a, b) for a, b in zip(snapshot.values, other.values, strict=True)), name


def trained_by_command(name: str, folder: Path, *words: str) -> list[dict[str, float]]:
    """The metrics of two steps of `flowgrpo-fast train`."""
    shown = [*SMALL, "num_steps=2", "task.num_eval_samples=10", *words]
    main(["train", name, *shown, "--out", str(folder), "--device", "cpu"])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def refused(capsys: pytest.CaptureFixture[str], name: str, *words: str) -> str:
    """The one line in which the command refuses."""
    with pytest.raises(SystemExit) as caught:
        main(["train", name, *SMALL, *words, "--device", "cpu"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error
