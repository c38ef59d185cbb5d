"""How samples become optimiser steps: who is in which, what the mean counts, and about whom the network is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from flowgrpo_fast.credit.shape import DropIdle
from flowgrpo_fast.recipe import (
    AllSteps,
    Bound,
    ChunkRatio,
    Clip,
    Cuts,
    FractionOfSteps,
    FrozenWindow,
    Independent,
    Normalise,
    OneStepEach,
    Optimizer,
    PolicyGradient,
    Recipe,
    SharedStart,
    TransitionKL,
    Tree,
)
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.learner import Learner
from flowgrpo_fast.training.loop import train_step
from flowgrpo_fast.training.update import Tally, accumulate, update
from flowgrpo_fast.types import Batch
from tests.training.own_parts import GroupCoupled
from tests.training.steps import CPU, gathered, weights
from tests.training.test_update import at_once, in_fp64, moved

WINDOW = FrozenWindow(size=3, start=1)
KL = PolicyGradient(trust=Clip(range=0.05), regularizers=(TransitionKL(beta=0.1),))
CHUNKS = ChunkRatio(sizes=(1, 2), trust=Clip(range=0.05))
SPLIT = ("across_groups", "shuffled")
SHAPES = {
    "independent": {},
    "kl": {"objective": KL},
    "shared start": {"topology": SharedStart(at=WINDOW)},
    "shared start, kl": {"topology": SharedStart(at=WINDOW), "objective": KL},
    "steps of one's own": {"topology": SharedStart(at=FractionOfSteps(fraction=0.6))},
    "one step each": {"topology": OneStepEach(at=WINDOW)},
    "one step each, shared": {"topology": OneStepEach(at=WINDOW, share_start=True)},
    "survivors": {"topology": Cuts(inner=Independent(at=WINDOW), steps=(3,), sizes=(16,))},
    "chunks": {"objective": CHUNKS},
    "chunks, shared start": {"objective": CHUNKS, "topology": SharedStart(at=WINDOW)},
    "drawn chunks": {"objective": replace(CHUNKS, fraction=0.5)},
}


@pytest.fixture
def wide(toy_recipe) -> Callable[..., Recipe]:
    """Recipes of the toy job in fp64; keywords replace fields."""

    def make(**changes: Any) -> Recipe:
        recipe = toy_recipe(**changes)
        task = replace(recipe.task, model="tests.training.own_parts:load_wide", judge="")
        return replace(recipe, task=task)

    return make


def split(partition: str, **more: Any) -> Optimizer:
    return Optimizer(lr=3e-3, num_updates=2, partition=partition, **more)


def gradient(learner: Learner, share: Batch) -> torch.Tensor:
    accumulate(learner, share, Tally())
    found = torch.cat([p.grad.flatten().clone() for p in learner.parameters])
    learner.optimizer.zero_grad(set_to_none=True)
    return found


def only(batch: Batch, rows: Any) -> Batch:
    """The whole batch, of which these samples alone weigh anything."""
    mask = torch.zeros(len(batch), dtype=torch.float64)
    mask[torch.from_numpy(np.asarray(rows))] = 1
    return replace(batch, credit=replace(batch.credit, weight=batch.credit.weight * mask))


@pytest.mark.parametrize("partition", SPLIT)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "drawn chunks"])
def test_a_share_has_the_gradient_of_its_samples(wide, shape, partition) -> None:
    """Rows that members share are asked in every share; the gradient is that of these samples in the whole batch."""
    engine = build_engine(
        wide(credit=(Normalise(), Bound()), optimizer=split(partition), **SHAPES[shape]), CPU
    )
    batch, learner = in_fp64(gathered(engine)), engine.learner
    moved(engine)
    shares = learner.shares(batch)
    assert sorted(np.concatenate(shares).tolist()) == list(range(32))
    for rows in shares:
        expected = at_once(learner, only(batch, rows))
        assert expected.norm() > 1e-6
        found = gradient(learner, batch.of_samples(rows))
        assert (found - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "machine", [{}, {"rows_per_forward": 8}, {"rows_per_forward": 8, "steps_per_forward": 2}], ids=str
)
@pytest.mark.parametrize("partition", SPLIT)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_ratio_is_exactly_one(toy_recipe, shape, partition, machine, precision) -> None:
    engine = build_engine(
        toy_recipe(optimizer=split(partition), precision=precision, **machine, **SHAPES[shape]), CPU
    )
    metrics = train_step(engine).metrics
    assert metrics["first_ratio_error"] == 0.0
    assert metrics["ratio_self_test"] == 0.0  # of every share
    assert engine.learner.num_updates == 2


def test_members_across_groups_are_counted_in_each(toy_recipe) -> None:
    batch = gathered(build_engine(toy_recipe(optimizer=split("across_groups")), CPU))
    first, second = batch.shares(2, "across_groups")
    assert first.tolist() == [8 * group + member for group in range(4) for member in range(4)]
    assert second.tolist() == [8 * group + member for group in range(4) for member in range(4, 8)]


def test_a_shuffle_is_a_function_of_seed_step_and_epoch(toy_recipe) -> None:
    def shares(seed=0, step=0, epoch=0):
        engine = build_engine(toy_recipe(optimizer=split("shuffled"), seed=seed), CPU)
        engine.step = step
        batch = gathered(engine)
        assert batch.shares(1, "shuffled") == [slice(0, 32)]
        return [share.tolist() for share in batch.shares(2, "shuffled", epoch)]

    order = np.random.default_rng([0, 7, 0, 0]).permutation(32)
    assert shares() == [sorted(order[:16].tolist()), sorted(order[16:].tolist())]
    assert shares() == shares()
    assert len({str(shares(**change)) for change in ({}, {"seed": 1}, {"step": 1}, {"epoch": 1})}) == 4


def test_epochs_go_over_the_samples_again(toy_recipe) -> None:
    once = build_engine(toy_recipe(optimizer=split("shuffled")), CPU)
    twice = build_engine(toy_recipe(optimizer=split("shuffled", num_epochs=2)), CPU)
    first, both = train_step(once).metrics, train_step(twice).metrics
    assert (once.learner.num_updates, twice.learner.num_updates) == (2, 4)
    assert both["network_backwards"] == 2 * first["network_backwards"]
    assert not torch.equal(weights(once), weights(twice))
    assert [len(share) for share in twice.learner.shares(gathered(twice))] == [16] * 4


# --------------------------------------------------------------------------------------------------- idle groups


def judged(engine, idle: tuple[int, ...], at_mean: bool = False, unscored: tuple[int, ...] = ()) -> Batch:
    """A batch in which groups `idle` have equal rewards, and sample 0 the mean of its group."""
    from flowgrpo_fast.data.draws import draw
    from flowgrpo_fast.training.loop import make_batch

    recipe = engine.recipe
    draws = draw(
        recipe.data.draw(engine.step, recipe.seed, 4, 2),
        step=engine.step,
        seed=recipe.seed,
        num_drawn=recipe.num_drawn,
        share_start=recipe.topology.shares_start,
        device=CPU,
    )
    scored = recipe.experience.collect(engine.stage, draws, engine.step).scored()
    table = torch.tensor([1.0, 2, -1, -2, 4, -4, 0.5, -0.5]).repeat(4, 1)
    if at_mean:
        table[0] = torch.tensor([0.0, 2, 0.5, -2, 4, -4, -0.5, 0])
    table[list(idle)] = 0.25
    total, valid = table.flatten(), torch.ones(32, dtype=torch.bool)
    valid[list(unscored)] = False
    scores = replace(
        scored.scores, total=total.where(valid, 0.0), objectives={}, valid=valid if unscored else None
    )
    return in_fp64(make_batch(engine, replace(scored, scores=scores)))


def credit(mode: str) -> tuple[Any, ...]:
    return Normalise(), Bound(), DropIdle(mode=mode)


@pytest.mark.parametrize("partition", ["groups", *SPLIT])
def test_kept_groups_count_in_the_mean_and_cost_nothing(wide, partition) -> None:
    batches, counts = {}, {}
    for mode in ("dropped", "kept"):
        engine = build_engine(wide(credit=credit(mode), optimizer=split(partition), rows_per_forward=8), CPU)
        batch = batches[mode] = judged(engine, idle=(1,))
        assert batch.idle_share == 0.25
        moved(engine)
        counts[mode] = []
        for rows in engine.learner.shares(batch):
            share = batch.of_samples(rows)
            inside = np.arange(32)[rows]
            live = int((inside // 8 != 1).sum())
            everyone = torch.ones(32, dtype=torch.float64)
            everyone[8:16] = 0
            alive = replace(batch, credit=replace(batch.credit, weight=everyone), live=everyone.numpy() > 0)
            expected = at_once(engine.learner, only(alive, inside))  # a mean over the live ones
            if mode == "kept":
                expected = expected * live / len(inside)
            tally = Tally()
            accumulate(engine.learner, share, tally)
            found = torch.cat([p.grad.flatten() for p in engine.learner.parameters])
            engine.learner.optimizer.zero_grad(set_to_none=True)
            assert (found - expected).norm() <= 1e-9 * expected.norm()
            counts[mode].append((tally.counts.backwards, 3 * -(-live // 8) * 8))
    assert counts["kept"] == counts["dropped"]
    for asked, fewest in counts["kept"]:  # three steps of the live samples, in whole forwards
        assert asked == fewest


def test_kept_groups_are_asked_about_where_a_penalty_holds_them(wide) -> None:
    engine = build_engine(wide(credit=credit("kept"), objective=KL, optimizer=split("across_groups")), CPU)
    assert judged(engine, idle=(1,)).live.all()


@pytest.mark.parametrize(("idle", "at_mean"), [((), False), ((1,), False), ((0, 2), False), ((3,), True)])
def test_filtered_samples_leave_equal_updates(wide, idle, at_mean) -> None:
    engine = build_engine(wide(credit=credit("filtered"), optimizer=split("shuffled")), CPU)
    batch = judged(engine, idle, at_mean)
    shares = engine.learner.shares(batch)
    gone = {row for group in idle for row in range(8 * group, 8 * group + 8)}
    gone |= {0, 7} if at_mean else set()
    teaching = 32 - len(gone)
    assert batch.idle_share == pytest.approx(len(gone) / 32)
    assert len(shares[0]) == len(shares[1]) == -(-teaching // 2)
    everyone = np.concatenate(shares).tolist()
    assert set(everyone) >= set(range(32)) - gone
    assert len(everyone) == len(set(everyone)) == teaching + teaching % 2
    for rows in shares:
        share = batch.of_samples(rows)
        assert share.credit.weight.tolist() == [1.0] * len(rows)
        assert float(share.total_weight) == len(rows)


def test_an_odd_number_is_filled_up_at_random_with_what_was_left_out(wide) -> None:
    chosen = set()
    for step in range(6):
        engine = build_engine(wide(credit=credit("filtered"), optimizer=split("shuffled")), CPU)
        engine.step = step
        batch = judged(engine, idle=(1,))
        # One sample more teaches nothing.
        weight = batch.credit.weight.clone()
        weight[0] = 0
        live = (weight > 0).numpy()
        idle = batch.idle.copy()
        idle[0] = True
        odd = replace(batch, credit=replace(batch.credit, weight=weight), live=live, counted=live, idle=idle)
        shares = odd.shares(2, "shuffled")
        assert [len(share) for share in shares] == [12, 12]
        (fill,) = set(np.concatenate(shares).tolist()) - set(np.flatnonzero(live).tolist())
        assert idle[fill]
        chosen.add(fill)
    assert len(chosen) > 1


def test_a_sample_without_a_score_fills_nothing(wide) -> None:
    engine = build_engine(wide(credit=credit("filtered"), optimizer=split("shuffled")), CPU)
    batch = judged(engine, idle=(), unscored=(5,))
    shares = engine.learner.shares(batch)
    assert [len(share) for share in shares] == [15, 15]  # 31 teach: one waits for another day
    assert 5 not in np.concatenate(shares)


def test_an_update_of_kept_groups_alone_is_a_step_of_the_moments(wide) -> None:
    """As in the published loops: the gradient is 0, and AdamW steps."""
    engine = build_engine(wide(credit=credit("kept"), optimizer=Optimizer(lr=1e-2, weight_decay=0.1)), CPU)
    before = weights(engine)
    metrics = update(engine.learner, judged(engine, idle=(0, 1, 2, 3)))
    assert engine.learner.num_updates == 1
    assert metrics["grad_norm"] == 0
    assert metrics["network_backwards"] == 0
    torch.testing.assert_close(weights(engine), before * (1 - 1e-2 * 0.1), rtol=1e-12, atol=0)
    dropped = build_engine(wide(credit=credit("dropped")), CPU)
    update(dropped.learner, judged(dropped, idle=(0, 1, 2, 3)))
    assert dropped.learner.num_updates == 0


# ---------------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"optimizer": Optimizer(num_updates=3, partition="across_groups"), "num_prompts": 3},
            ("'across_groups' with num_updates 3", "must divide group_size = 8"),
        ),
        ({"optimizer": {"partition": "by prompt"}}, ("Optimizer.partition is 'by prompt'", "'shuffled'")),
        (
            {"optimizer": Optimizer(num_updates=2), "credit": (Normalise(), DropIdle(mode="filtered"))},
            ("mode='filtered'", "partition='groups' with num_updates=2", "set optimizer.partition=shuffled"),
        ),
        (
            {"optimizer": split("shuffled"), "objective": GroupCoupled()},
            ("GroupCoupled joins the samples of a group", "'shuffled' with num_updates=2 splits", "groups"),
        ),
        (
            {"optimizer": Optimizer(num_updates=8), "objective": GroupCoupled()},
            ("GroupCoupled joins the samples of a group", "num_updates to a divisor of num_prompts"),
        ),
        ({"credit": {"mode": "ignored"}}, ("DropIdle.mode is 'ignored'", "'filtered'")),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_one_line(toy_recipe, changes, words) -> None:
    def made() -> None:
        if isinstance(changes.get("optimizer"), dict):
            Optimizer(**changes["optimizer"])
        if isinstance(changes.get("credit"), dict):
            DropIdle(**changes["credit"])
        toy_recipe(**changes)

    with pytest.raises(ValueError, match=r".") as error:
        made()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("partition", SPLIT)
def test_a_tree_is_of_one_optimiser_step(toy_recipe, partition) -> None:
    recipe = toy_recipe(topology=Tree(at=WINDOW, fan=2), optimizer=split(partition))
    with pytest.raises(
        ValueError, match=r"Tree: an optimiser step takes whole trees; set optimizer.partition=groups"
    ):
        recipe.plan(0)


# --------------------------------------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_no_step(wide, monkeypatch, bad) -> None:
    """No weight and no moment of that step changes, the others do, and the metrics say how many were skipped."""
    engine = build_engine(wide(optimizer=Optimizer(lr=1e-2, num_updates=4)), CPU)
    clean = build_engine(wide(optimizer=Optimizer(lr=1e-2, num_updates=4)), CPU)
    batch, other = in_fp64(gathered(engine)), in_fp64(gathered(clean))
    worth = batch.credit.advantages.clone()
    worth[8:16] *= bad
    broken = replace(batch, credit=replace(batch.credit, advantages=worth))
    metrics = update(engine.learner, broken)
    assert metrics["skipped_updates"] == 1
    assert all(np.isfinite(list(metrics.values())))
    # The same as if that share were not there.
    weight = torch.ones(32, dtype=torch.float64)
    weight[8:16] = 0
    without = replace(
        other, credit=replace(other.credit, weight=weight), live=(weight > 0).numpy(), counted=None
    )
    clean_metrics = update(clean.learner, without)
    assert torch.equal(weights(engine), weights(clean))
    assert metrics["grad_norm"] == clean_metrics["grad_norm"]
    assert "skipped_updates" not in clean_metrics
    for mine, theirs in zip(
        engine.learner.optimizer.state.values(), clean.learner.optimizer.state.values(), strict=True
    ):
        assert all(torch.equal(mine[name], theirs[name]) for name in ("exp_avg", "exp_avg_sq", "step"))


def test_a_window_of_all_steps_is_cut_into_whole_forwards(toy_recipe) -> None:
    """Idle samples fall out, and the last forward is filled up: as many rows as the rollout's, and a ratio of 1."""
    recipe = toy_recipe(
        topology=SharedStart(at=AllSteps()),
        credit=credit("kept"),
        optimizer=split("shuffled"),
        rows_per_forward=4,
    )
    engine = build_engine(recipe, CPU)
    batch = judged(engine, idle=(2,))
    from flowgrpo_fast.training.self_test import ratio_self_test

    fp32 = gathered(engine)
    same = replace(fp32, live=batch.live, counted=batch.counted, idle=batch.idle)
    assert ratio_self_test(engine.learner, same) == 0.0
