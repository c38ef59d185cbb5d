"""What the tests of whole methods share: an engine's batch, its gradient, and runs from the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowgrpo_fast.cli import main
from flowgrpo_fast.data.draws import draw
from flowgrpo_fast.training.engine import Engine
from flowgrpo_fast.training.learner import Counts, networks
from flowgrpo_fast.training.loop import make_batch
from flowgrpo_fast.training.update import Tally, linearised, micro_batches, separable
from flowgrpo_fast.types import Batch, Scored


def scored(engine: Engine, step: int = 0) -> Scored:
    """A training step's samples and their rewards; nothing is settled or trained."""
    recipe = engine.recipe
    draws = draw(
        recipe.data.draw(step, recipe.seed, recipe.num_prompts, len(engine.prompts)),
        step=step,
        seed=recipe.seed,
        num_drawn=recipe.num_drawn,
        share_start=recipe.topology.shares_start,
        device=engine.device,
    )
    return recipe.experience.collect(engine.stage, draws, step).scored()


def batch_of(engine: Engine, step: int = 0) -> Batch:
    """The batch that the step would train on."""
    return make_batch(engine, scored(engine, step))


def move(engine: Engine, size: float = 0.05) -> None:
    """Other weights than those that sampled: ratios leave 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in engine.learner.parameters:
            parameter += size * torch.randn(parameter.shape, generator=generator)


def gradient(engine: Engine, batch: Batch) -> tuple[float, list[Tensor]]:
    """The loss that the product shows for one optimiser step on a batch, and its gradient."""
    learner, tally = engine.learner, Tally()
    points, evaluator = learner.objective.points(batch), networks(learner, batch, Counts())
    if learner.objective.couples:
        pull = linearised(learner, batch, points, evaluator, tally)
    else:
        pull = separable(learner.objective, batch, points, tally)
    for column, point in micro_batches(learner, batch, points):
        pull(column, point, learner.objective.measure(point, evaluator.at(point))).backward()
    found = [parameter.grad.clone() for parameter in learner.parameters]
    learner.optimizer.zero_grad(set_to_none=True)
    return float(torch.cat(tally.shown["loss"]).mean()), found


def log_prob(batch: Batch, row: int, latents: Tensor, velocity: Tensor, after: Tensor) -> Tensor:
    """The mean log-density of `after [*S]` about the mean of a row of the table, written out in fp64."""
    _, a, b, std, *_ = batch.samples.plan.coeffs[row].double().tolist()
    mean = a * latents.double() + b * velocity.double()
    density = torch.distributions.Normal(mean, std).log_prob(after.double())
    return density.mean()


def reference_gradient(engine: Engine, loss: Tensor) -> tuple[float, list[Tensor]]:
    """The same of a loss that was computed at once."""
    return loss.item(), list(torch.autograd.grad(loss, engine.learner.parameters))


def close(found: Sequence[Tensor], expected: Sequence[Tensor], rtol: float = 1e-4) -> None:
    """Gradients agree, as far as fp32 goes."""
    scale = max(float(one.abs().max()) for one in expected)
    assert scale > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=rtol, atol=rtol * scale)


SMALL = ("num_prompts=2", "task.num_eval_samples=10", "task.eval_every=100")


def train(folder: Path, name: str, num_steps: int, *overrides: str) -> list[dict[str, float]]:
    """`flowgrpo-fast train NAME ...` on the digits; returns the lines of metrics, from step 1."""
    words = [name, *SMALL, f"num_steps={num_steps}", *overrides]
    main(["train", *words, "--out", str(folder), "--device", "cpu"])
    return metrics(folder)


def resume(folder: Path, num_steps: int, *overrides: str) -> list[dict[str, float]]:
    """Goes on with a run."""
    main(["train", f"num_steps={num_steps}", *overrides, "--resume", str(folder), "--device", "cpu"])
    return metrics(folder)


def metrics(folder: Path) -> list[dict[str, float]]:
    """Of each training step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] > 0]


def final_bytes(folder: Path, num_steps: int) -> dict[str, bytes]:
    """What the last checkpoint holds of weights."""
    checkpoint = folder / "checkpoints" / f"step_{num_steps:06d}"
    return {path.name: path.read_bytes() for path in sorted(checkpoint.glob("*.safetensors"))}


def without_times(lines: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Metrics that are the same however fast the machine was, and wherever a part of the run ended with a look."""
    unsteady = ("seconds", "samples_per", "floor", "memory", "joules", "watt", "gpu", "eval")
    return [
        {key: value for key, value in line.items() if not any(word in key for word in unsteady)}
        for line in lines
    ]
