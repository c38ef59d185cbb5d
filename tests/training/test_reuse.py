"""The unconditional half that the rollout leaves to the update."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flowgrpo_fast.sampling.sampler import rescored, rollout
from flowgrpo_fast.sampling.schedule import ode_schedule, resolve_schedule
from flowgrpo_fast.training.sample import draw, sample

from flowgrpo_fast.recipe import (
    ClippedRatio,
    DPMSolver2M,
    FractionOfSteps,
    FrozenWindow,
    Optimizer,
    Prune,
)
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import train

CPU = torch.device("cpu")
KL = ClippedRatio(clip_range=0.05, kl_beta=0.1)


def trained(recipe):
    engine, reports = build_engine(recipe, CPU), []
    train(engine, reports.append, lambda: False)
    return engine, [report.metrics for report in reports]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": KL},
        {"optimizer": Optimizer(lr=3e-3, num_updates=2)},
        {"rows_per_forward": 8, "prompts_per_chunk": 1},
        {"share_start_noise": True},
        {"share_start_noise": True, "window": FrozenWindow(size=2, start=3), "solver": DPMSolver2M(keep=0.7)},
        {"window": FractionOfSteps(fraction=0.5)},
        {"prune": Prune(at=(3,), sizes=(16,))},
        {"graphs": True, "rows_per_forward": 8},
    ],
    ids=str,
)
def test_weights_are_the_same_to_the_bit(toy_recipe, changes, precision) -> None:
    """And forwards fewer: those of the kept steps' other half before the first optimiser step."""
    recipe = toy_recipe(guidance_scale=2.5, precision=precision, **changes)
    engine, mine = trained(recipe)
    other, theirs = trained(replace(recipe, reuse_unconditional=False))
    for ours, plain in zip(engine.model.module.parameters(), other.model.module.parameters(), strict=True):
        assert torch.equal(ours, plain)
    for ours, plain in zip(mine, theirs, strict=True):
        assert ours["first_ratio_error"] == 0.0
        saved = plain["network_evaluations"] - ours["network_evaluations"]
        assert saved == plain["network_backwards"] / recipe.optimizer.num_updates
        assert {k: v for k, v in ours.items() if k != "network_evaluations"} == {
            k: v for k, v in plain.items() if k != "network_evaluations"
        }


def test_only_what_will_be_read_is_kept(toy_recipe) -> None:
    def kept(**changes):
        engine = build_engine(toy_recipe(**changes), CPU)
        draws = draw(engine.recipe, 2, 0, CPU)
        return engine, sample(engine, draws, resolve_schedule(engine.recipe, 0)).unconditional

    assert kept()[1] is None  # no guidance
    assert kept(guidance_scale=2.0, reuse_unconditional=False)[1] is None
    engine, half = kept(guidance_scale=2.0)
    num_kept = len(resolve_schedule(engine.recipe, 0).kept)
    assert half.shape == (len(draw(engine.recipe, 2, 0, CPU).seed), num_kept, *engine.model.latent_shape)
    draws = draw(engine.recipe, 2, 0, CPU)
    rows = engine.conditioning.rows(draws.prompt_index[draws.group_id])
    schedule = ode_schedule(engine.recipe.sigmas, None)
    assert rollout(engine.model, rows, draws, schedule, engine.recipe).unconditional is None


def test_another_model_scores_with_its_own(toy_recipe) -> None:
    recipe = toy_recipe(guidance_scale=2.0)
    engine, other = build_engine(recipe, CPU), build_engine(recipe, CPU)
    for parameter in other.model.module.parameters():
        parameter.data += 0.1
    draws = draw(recipe, 2, 0, CPU)
    trajectory = sample(engine, draws, resolve_schedule(recipe, 0))
    rows = engine.conditioning.rows(draws.prompt_index[draws.group_id])
    with_half, without = (
        rescored(other.model, t, rows, recipe).log_prob
        for t in (trajectory, replace(trajectory, unconditional=None))
    )
    assert torch.equal(with_half, without)
    assert not torch.equal(with_half, trajectory.log_prob)
