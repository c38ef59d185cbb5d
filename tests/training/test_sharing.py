"""What a group has in common is computed once: the same numbers, fewer evaluations, and a ratio of exactly 1."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from flowgrpo_fast.planner.architectures import Counts
from flowgrpo_fast.planner.counting import Work
from flowgrpo_fast.planner.step import plan_step
from flowgrpo_fast.recipe import (
    AllSteps,
    Clip,
    Cuts,
    DPMSolver2M,
    DropIdle,
    FractionOfSteps,
    FrozenWindow,
    Independent,
    Optimizer,
    PolicyGradient,
    SharedStart,
    SlidingWindow,
    TransitionKL,
)
from flowgrpo_fast.recipes import RECIPES
from flowgrpo_fast.sampling.step import lay_out
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import train, train_step
from flowgrpo_fast.training.update import rescored
from flowgrpo_fast.types import spread
from tests.conftest import ToyModel
from tests.training.steps import CPU, drawn, gathered, sampled

KL = PolicyGradient(trust=Clip(range=0.05), regularizers=(TransitionKL(beta=0.1),))
WINDOW = FrozenWindow(size=3, start=1)
COUNTS = Counts(
    name="one",
    size="",
    forward=Work(linear=1.0, attention=0.0, adapted=0.0),
    trained_share=0.0,
    decode=0.0,
    text=0.0,
    reward=0.0,
    parameters=1,
    linear_parameters=1,
    trained=1,
    latent_elements=1,
)


@pytest.fixture
def rows_apart(monkeypatch) -> None:
    """A toy whose rows are the same bits in any batch: nothing but element-wise operations."""

    def init(model) -> None:
        generator = torch.Generator().manual_seed(0)
        model.module = nn.ParameterList([0.5 * torch.randn(6, generator=generator) for _ in range(3)])

    def velocity(model, latents, sigma, conditioning):
        a, b, c = model.module
        prompt = conditioning.prompt_embeds[:, 0]
        return latents + a * latents.sin() - b * sigma[:, None] * prompt + c * prompt

    monkeypatch.setattr(ToyModel, "__init__", init)
    monkeypatch.setattr(ToyModel, "velocity", velocity)


CASES = [
    ({}, 1),
    ({"at": AllSteps()}, 0),
    ({"at": FrozenWindow(size=2, start=3)}, 3),
    ({"guidance_scale": 3.0}, 1),
    ({"objective": KL}, 1),
    ({"guidance_scale": 2.0, "objective": KL}, 1),
    ({"at": FrozenWindow(size=2, start=1), "solver": DPMSolver2M(keep=0.7)}, 1),
    ({"cuts": {"steps": (3, 5), "sizes": (16, 12)}}, 1),
    ({"rows_per_forward": 8}, 1),
    ({"rows_per_forward": 2}, 1),
    ({"replay_rows": 4}, 1),
    ({"optimizer": Optimizer(lr=3e-3, num_updates=2)}, 1),
    ({"rows_per_forward": 8, "prompts_per_chunk": 1}, 1),
    ({"rows_per_forward": 8, "prompts_per_chunk": 2}, 1),
]


def topology(changes: dict, share_prefix: bool = True):
    """Takes what a case says of the walk's shape out of its changes."""
    inner = SharedStart(at=changes.pop("at", WINDOW), share_prefix=share_prefix)
    cuts = changes.pop("cuts", None)
    return inner if cuts is None else Cuts(inner=inner, **cuts)


@pytest.mark.usefixtures("rows_apart")
@pytest.mark.parametrize(("changes", "first"), CASES, ids=str)
def test_shared_equals_each_by_itself(toy_recipe, changes, first) -> None:
    """Rollouts to the bit; weights after four steps up to the order in which gradients are added."""
    results = {}
    for share in (True, False):
        rest = dict(changes)
        recipe = toy_recipe(topology=topology(rest, share), **rest)
        engine = build_engine(recipe, CPU)
        trajectory, reports = sampled(engine), []
        train(engine, reports.append, lambda: False)
        results[share] = trajectory, [report.metrics for report in reports], engine
        assert all(metrics["first_ratio_error"] == 0.0 for metrics in results[share][1])
    (shared, mine, engine), (apart, theirs, other) = results[True], results[False]
    assert torch.equal(shared.x0, apart.x0)
    assert shared.plan.kept == apart.plan.kept
    for ours, plain in zip(shared.transitions, apart.transitions, strict=True):
        assert torch.equal(spread(ours.latents, ours.fan), plain.latents)
        assert torch.equal(ours.next_latents, plain.next_latents)
        assert torch.equal(ours.log_prob, plain.log_prob)
    for ours, plain in zip(mine, theirs, strict=True):
        for name in ours.keys() - {"network_evaluations", "network_backwards"}:
            assert ours[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-4), name
    for ours, plain in zip(engine.model.module, other.model.module, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
    candidates = engine.recipe.num_candidates
    halves = 1 if engine.recipe.guidance_scale == 1 else 2
    saved = 4 * (candidates - 1) * (first + 1) * halves
    assert apart.evaluations - shared.evaluations == saved
    models = 1 + ("start" in engine.learner.snapshots)
    saved += 4 * (8 - 1) * (halves * models - (halves == 2))  # the rollout has left one half
    assert theirs[0]["network_evaluations"] - mine[0]["network_evaluations"] == saved
    assert theirs[0]["network_backwards"] - mine[0]["network_backwards"] == 4 * 7


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"at": FractionOfSteps(fraction=0.5)},  # each sample trains other steps: only a prefix is shared
        {"at": SlidingWindow(size=2, every=1)},
        {"num_prompts": 6, "rows_per_forward": 8},
        {"num_prompts": 6, "rows_per_forward": 4, "optimizer": Optimizer(lr=3e-3, num_updates=3)},
        {"num_prompts": 3, "optimizer": Optimizer(lr=3e-3, num_updates=2)},  # an update takes half a group
        {"num_prompts": 6, "rows_per_forward": 4, "prompts_per_chunk": 3},
        {"cuts": {"steps": (3,), "sizes": (16,)}},
    ],
    ids=str,
)
def test_the_ratio_is_exactly_one(toy_recipe, changes, precision) -> None:
    rest = dict(changes)
    recipe = toy_recipe(topology=topology(rest), precision=precision, **rest)
    engine, reports = build_engine(recipe, CPU), []
    train(engine, reports.append, lambda: False)
    assert reports[0].metrics["ratio_self_test"] == 0.0
    assert [report.metrics["first_ratio_error"] for report in reports] == [0.0] * 4


def test_who_shares_what(toy_recipe) -> None:
    """Rows of every step, as the network sees them, and the children of each."""

    def rows(step: int = 0, share: bool = True, **changes):
        recipe = toy_recipe(**{"topology": topology(changes, share), **changes})
        layouts = lay_out(recipe.plan(step), recipe.num_prompts, recipe.forwards, CPU)
        assert all(len(layout.asks) == 1 and layout.idle is None for layout in layouts)
        return [(layout.asks[0].num_heads, layout.asks[0].fan) for layout in layouts]

    one = [(32, 1)]
    assert rows(at=FrozenWindow(size=2, start=2)) == [(4, 1), (4, 1), (4, 8)] + 3 * one
    assert rows(at=AllSteps()) == [(4, 8)] + 5 * one
    assert rows(at=FractionOfSteps(fraction=0.5)) == 6 * one
    assert rows(share=False) == 6 * one
    assert rows(topology=Independent(at=WINDOW)) == 6 * one
    halved = Optimizer(
        lr=1e-3, num_updates=8
    )  # half a group an update: the prefix alone, which ends in children
    assert rows(at=FrozenWindow(size=2, start=1), optimizer=halved) == [(4, 8)] + 5 * one
    assert rows(cuts={"steps": (3,), "sizes": (16,)}) == [(4, 1), (4, 16), (64, 1)] + 3 * one


def test_scoring_again_runs_the_shared_rows(toy_recipe) -> None:
    engine = build_engine(toy_recipe(topology=SharedStart(at=WINDOW), rows_per_forward=8), CPU)
    batch = gathered(engine)
    again = rescored(engine.learner, batch)
    assert [step.num_heads for step in batch.samples.transitions] == [4, 32, 32]
    for mine, first in zip(again.samples.transitions, batch.samples.transitions, strict=True):
        assert torch.equal(mine.log_prob, first.log_prob)


def test_a_broken_start_names_a_sample(toy_recipe, monkeypatch) -> None:
    def broken(model, latents, sigma, conditioning):
        return latents + torch.where(conditioning.prompt_embeds[:, 0] > 0, float("nan"), 0.0)

    monkeypatch.setattr(ToyModel, "velocity", broken)
    engine = build_engine(toy_recipe(topology=SharedStart(at=WINDOW)), CPU)
    with pytest.raises(
        ValueError, match=r"NaN or infinite at step 0, sample \d+ \(16 of 32 samples are hit\)"
    ):
        train_step(engine)


def test_groups_that_teach_nothing_cost_no_backward(toy_recipe, monkeypatch) -> None:
    """Which groups are idle is known from the rewards on the host: forwards of idle rows alone are left out."""
    from flowgrpo_fast.training import loop

    recipe = toy_recipe(topology=SharedStart(at=WINDOW), rows_per_forward=8)
    engine = build_engine(recipe, CPU)
    train_step(engine)
    make = loop.make_batch

    def idle(*arguments):
        batch = make(*arguments)
        weight = batch.credit.weight.clone()
        weight[8:24] = 0
        return replace(
            batch, credit=replace(batch.credit, weight=weight), live=(weight > 0).numpy(), counted=None
        )

    monkeypatch.setattr(loop, "make_batch", idle)
    metrics = train_step(engine).metrics
    assert metrics["idle_groups"] == 0.5
    assert metrics["network_backwards"] == 4 + 2 * 16  # one forward for all four groups' first steps

    def all_idle(*arguments):
        batch = make(*arguments)
        credit = replace(batch.credit, weight=torch.zeros(32))
        return replace(batch, credit=credit, live=np.zeros(32, dtype=bool), counted=None)

    monkeypatch.setattr(loop, "make_batch", all_idle)
    before = [p.detach().clone() for p in engine.model.module.parameters()]
    metrics = train_step(engine).metrics
    assert metrics["network_backwards"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.module.parameters(), strict=True))


@pytest.mark.parametrize("name", ["flow_grpo_fast", "flow_cps", "dance_grpo", "mix_grpo", "mix_grpo_flash"])
def test_the_planner_counts_what_the_trainer_runs(toy_recipe, name) -> None:
    """Network evaluations of the papers' recipes that share a start: counted by hand, planned, and measured."""
    recipe = replace(RECIPES[name].make(), num_prompts=12, task=toy_recipe().task, num_steps=1)
    engine = build_engine(recipe, CPU)
    metrics = train_step(engine).metrics
    trajectory = sampled(engine, drawn(recipe))
    assert plan_step(COUNTS, recipe).forwards == trajectory.evaluations
    halves = 1 if recipe.guidance_scale == 1 else 2
    updates = metrics["network_backwards"]  # both halves of guidance go there and back
    assert metrics["network_evaluations"] == trajectory.evaluations + updates
    # A backward costs a unit beside the forwards' one each: FLOPs of the update are their sum.
    assert plan_step(COUNTS, recipe).update == updates + metrics["network_backwards"]
    plan = trajectory.plan
    group, steps = recipe.group_size, len(plan.sigmas) - 1
    first = plan.steps[trajectory.transitions[0].place].step
    trained = plan.num_trained
    common = first if name == "dance_grpo" else first + 1
    assert trajectory.evaluations == 12 * halves * (common + (steps - common) * group)
    each = recipe.optimizer.num_updates  # ask about the rows that members share
    assert metrics["network_backwards"] == 12 * halves * (
        group * trained if name == "dance_grpo" else each + group * (trained - 1)
    )
    if 12 % each == 0:
        whole = replace(
            recipe,
            optimizer=replace(recipe.optimizer, partition="groups"),
            credit=(*recipe.credit[:2], DropIdle()),
            unconditional_gradient=False,
        )
        metrics = train_step(build_engine(whole, CPU)).metrics
        saved = metrics["network_backwards"] * (halves - (halves == 2) / each)
        assert metrics["network_evaluations"] == trajectory.evaluations + saved
        assert plan_step(COUNTS, whole).update == saved + metrics["network_backwards"]
        assert metrics["network_backwards"] == 12 * (
            group * trained if name == "dance_grpo" else 1 + group * (trained - 1)
        )
