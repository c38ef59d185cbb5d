"""The unconditional half that the rollout leaves to the update."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowgrpo_fast.recipe import (
    Clip,
    Cuts,
    DPMSolver2M,
    FractionOfSteps,
    FrozenWindow,
    Independent,
    Optimizer,
    PolicyGradient,
    SharedStart,
    TransitionKL,
)
from flowgrpo_fast.schedule.topology import ode_plan
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import train
from flowgrpo_fast.training.self_test import ratio_self_test
from tests.training.steps import CPU, gathered, measured, sampled

KL = PolicyGradient(trust=Clip(range=0.05), regularizers=(TransitionKL(beta=0.1),))
WINDOW = FrozenWindow(size=3, start=1)


def trained(recipe):
    engine, reports = build_engine(recipe, CPU), []
    train(engine, reports.append, lambda: False)
    return engine, [report.metrics for report in reports]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": KL},
        {"optimizer": Optimizer(lr=3e-3, num_updates=2)},
        {"rows_per_forward": 8, "prompts_per_chunk": 1},
        {"topology": SharedStart(at=WINDOW)},
        {"topology": SharedStart(at=FrozenWindow(size=2, start=3)), "solver": DPMSolver2M(keep=0.7)},
        {"topology": Independent(at=FractionOfSteps(fraction=0.5))},
        {"topology": Cuts(inner=Independent(at=WINDOW), steps=(3,), sizes=(16,))},
        {"graphs": True, "rows_per_forward": 8},
    ],
    ids=str,
)
def test_weights_are_the_same_to_the_bit(toy_recipe, changes, precision) -> None:
    """And forwards fewer: those of the kept steps' other half before the first optimiser step."""
    recipe = toy_recipe(guidance_scale=2.5, precision=precision, **changes)
    engine, mine = trained(recipe)
    other, theirs = trained(replace(recipe, machine=replace(recipe.machine, reuse_unconditional=False)))
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
        return engine, [step.unconditional for step in sampled(engine).transitions]

    assert kept()[1] == [None] * 3  # no guidance
    assert kept(guidance_scale=2.0, reuse_unconditional=False)[1] == [None] * 3
    engine, halves = kept(guidance_scale=2.0)
    assert len(halves) == len(engine.recipe.plan(0).kept)
    assert all(half.shape == (32, *engine.model.latent_shape) for half in halves)
    assert sampled(engine, plan=ode_plan(engine.recipe.sigmas.grid(None), group_size=8)).transitions == ()


def test_another_model_scores_with_its_own(toy_recipe) -> None:
    """What the rollout left is of the weights that sampled: who asks other weights leaves it out first."""
    recipe = toy_recipe(guidance_scale=2.0)
    engine, other = build_engine(recipe, CPU), build_engine(recipe, CPU)
    for parameter in other.model.module.parameters():
        parameter.data += 0.1
    batch = gathered(engine)
    bare = batch.without_unconditional()
    assert all(step.unconditional is None for step in bare.samples.transitions)
    assert ratio_self_test(other.learner, batch, 1e9) == ratio_self_test(other.learner, bare, 1e9) > 0
    for kept, own in zip(batch.samples.transitions, measured(other, bare), strict=True):
        assert not torch.equal(own["log_prob"], kept.log_prob)
    for kept, own in zip(batch.samples.transitions, measured(engine, bare), strict=True):
        assert torch.equal(own["log_prob"], kept.log_prob)
