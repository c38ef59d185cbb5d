"""GCPO: its worked case, its two limits, chunks that are cut and drawn by how fast samples change, and a run."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from flowgrpo_fast.credit.normalise import Normalise
from flowgrpo_fast.credit.shape import Bound, DropIdle
from flowgrpo_fast.credit.tree import TreeBackup
from flowgrpo_fast.objectives.chunks import ChunkRatio, adaptive_sizes, chunk_weights, relative_change
from flowgrpo_fast.objectives.policy_gradient import PolicyGradient
from flowgrpo_fast.objectives.regularizers import TransitionKL
from flowgrpo_fast.objectives.trust import Clip
from flowgrpo_fast.recipes.trajectory import gcpo
from flowgrpo_fast.schedule.dynamics import DanceSDE
from flowgrpo_fast.schedule.topology import SharedStart, Tree
from flowgrpo_fast.schedule.windows import AllSteps, FrozenWindow
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import make_batch, train_step
from flowgrpo_fast.types import Choices, Scores, Transitions
from tests.methods.batches import (
    batch_of,
    close,
    final_bytes,
    gradient,
    log_prob,
    move,
    reference_gradient,
    resume,
    scored,
    train,
    without_times,
)

CPU = torch.device("cpu")


def small(toy_recipe, *sizes: int, fraction: float = 1.0, clip: float = 0.05, regularizers=(), **changes):
    """All five stochastic steps of the toy job, in chunks."""
    part = ChunkRatio(sizes=sizes, fraction=fraction, trust=Clip(range=clip), regularizers=regularizers)
    return toy_recipe(**{"topology": SharedStart(at=AllSteps()), "objective": part, **changes})


def test_the_recipe_has_the_paper_s_defaults() -> None:
    recipe = gcpo()
    assert recipe.objective == ChunkRatio(sizes=(2, 3, 4, 7), fraction=1.0, trust=Clip(range=1e-4))
    assert recipe.topology == SharedStart(at=AllSteps())
    assert recipe.sigmas.num_inference_steps == 17
    assert (recipe.dynamics, recipe.group_size) == (DanceSDE(noise_level=0.3), 12)
    # DanceGRPO's group statistics: the sample's standard deviation, rewards normalised apart.
    assert recipe.credit == (Normalise(eps=1e-8, ddof=1), Bound(limit=5.0), DropIdle(mode="kept"))
    assert (recipe.optimizer.lr, recipe.optimizer.partition) == (1e-5, "across_groups")


def test_worked_case(methods) -> None:
    """Ratios, loss and gradient of three chunks; a clipped one has no gradient in any of its steps."""
    case = methods["gcpo"]
    given, expected = case["inputs"], case["expected"]
    new = torch.tensor(given["dlogp"], dtype=torch.float64, requires_grad=True)
    part = ChunkRatio(sizes=tuple(given["chunks"]), trust=Clip(range=given["clip"]))
    advantages = torch.tensor(given["A"], dtype=torch.float64)
    terms = part.loss({"log_prob": new, "old_log_prob": torch.zeros_like(new)}, advantages)
    terms.loss.mean().backward()
    np.testing.assert_allclose(terms.loss.mean().item(), expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(new.grad, expected["grad"], rtol=1e-6, atol=1e-12)
    assert not new.grad[0, 2:5].any()
    assert new.grad[0, [0, 1, 5, 6, 7]].all()
    ratio = [torch.exp(chunk.mean(1)) for chunk in new.detach().split(given["chunks"], dim=1)]
    np.testing.assert_allclose(torch.stack(ratio, 1), expected["ratio"], rtol=1e-12)


def transitions(states: Tensor) -> tuple[Transitions, ...]:
    """A walk of one sample `[K + 1, *S]`."""
    samples = np.zeros((1, 1), dtype=np.int64)
    return tuple(
        Transitions(
            row=torch.tensor([place]),
            latents=before[None],
            next_latents=after[None],
            log_prob=torch.zeros(1),
            samples=torch.from_numpy(samples),
            samples_host=samples,
            sigma=torch.ones(1),
            offsets=np.array([0, 1]),
            place=place,
        )
        for place, (before, after) in enumerate(itertools.pairwise(states))
    )


def test_relative_change_and_weights_of_the_worked_case(methods) -> None:
    case = methods["gcpo"]
    change = relative_change(transitions(torch.tensor(case["inputs"]["trajectory"], dtype=torch.float64)))
    np.testing.assert_allclose(change, case["expected"]["l1rel"], rtol=1e-6)
    np.testing.assert_allclose(chunk_weights(change, (2, 3)), case["expected"]["chunk_weights"], rtol=1e-6)


def test_relative_change_is_the_mean_over_children() -> None:
    (step,) = transitions(torch.tensor([[2.0, 2.0], [1.0, 3.0]]))
    wide = replace(step, next_latents=torch.tensor([[1.0, 3.0], [4.0, 4.0]]), log_prob=torch.zeros(2), fan=2)
    assert relative_change((wide,)) == [pytest.approx((2 / 4 + 4 / 8) / 2)]


@pytest.mark.parametrize(
    ("change", "sizes"),
    [
        ([5, 4, 3], (3,)),  # small enough as it is
        ([9, 7, 5, 3, 4, 6, 8], (4, 3)),  # falls to the fourth step, then rises
        ([1, 2, 3, 2, 1, 2, 3, 4], (3, 2, 3)),  # two turns
        ([6, 5, 4, 3, 2, 1], (3, 3)),  # no turn: in the middle
        (
            [32, 16, 8, 4, 2, 1, 0.5, 0.25, 0.125, 0.0625],
            (2, 3, 2, 3),
        ),  # none in any difference: halves of halves
    ],
)
def test_chunks_are_cut_where_the_change_turns(change: list[float], sizes: tuple[int, ...]) -> None:
    assert adaptive_sizes(change) == sizes


def test_a_long_chunk_is_cut_by_its_second_difference() -> None:
    """It falls throughout, ever faster up to the fourth step and ever slower from there."""
    change = np.array([20, 19, 17, 13, 10, 8, 7])
    second = np.diff(change, 2)
    assert (second[:2] < 0).all()
    assert (second[2:] > 0).all()
    # No turn of the first difference: the middle; both halves are then small enough.
    assert adaptive_sizes(change) == (3, 4)
    # With chunks of at most two steps the second half, 13 10 8 7, has no turn of second differences, and is halved.
    assert adaptive_sizes(change, 2) == (1, 2, 2, 2)


@pytest.mark.parametrize("seed", range(5))
def test_cut_chunks_are_small_and_cover_all(seed: int) -> None:
    change = np.random.default_rng(seed).random(24)
    for largest in (1, 2, 4, 30):
        sizes = adaptive_sizes(change, largest)
        assert sum(sizes) == 24
        assert max(sizes) <= largest
    assert adaptive_sizes(change, 30) == (24,)


def test_chunks_of_one_step_are_flow_grpo(toy_recipe) -> None:
    """The gradient of one optimiser step, whole: ratios off 1, some clipped, the penalty included."""
    penalty = (TransitionKL(beta=0.3),)
    chunks = small(toy_recipe, 1, 1, 1, 1, 1, regularizers=penalty)
    plain = replace(chunks, objective=PolicyGradient(trust=Clip(range=0.05), regularizers=penalty))
    found = []
    for recipe in (chunks, plain):
        engine = build_engine(recipe, CPU)
        batch = batch_of(engine)
        move(engine)
        found.append(gradient(engine, batch))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    close(found[0][1], found[1][1], rtol=1e-5)


def chunk_loss(engine, batch, sizes: tuple[int, ...], taken: tuple[int, ...]) -> Tensor:
    """GCPO a sample at a time: a chunk's ratio is the exponential of a mean; means over taken chunks, then samples."""
    clip, steps = engine.recipe.objective.trust.range, batch.samples.transitions
    ends = np.cumsum(sizes)
    total = torch.zeros((), dtype=torch.float64)
    for sample in range(len(batch)):
        conditioning = batch.conditioning.rows(slice(sample, sample + 1))
        losses = []
        for chunk in taken:
            moved = []
            for step in steps[ends[chunk] - sizes[chunk] : ends[chunk]]:
                edge = int((step.samples[:, 0] == sample).nonzero())
                head = edge // step.fan
                velocity = engine.model.velocity(
                    step.latents[head : head + 1], step.sigma[head : head + 1], conditioning
                )[0]
                row = int(step.row[edge])
                new = log_prob(batch, row, step.latents[head], velocity, step.next_latents[edge])
                moved.append(new - step.log_prob[edge].double())
            ratio = torch.exp(torch.stack(moved).mean())
            value = batch.credit.advantages[sample].double()
            losses.append(torch.maximum(-value * ratio, -value * ratio.clamp(1 - clip, 1 + clip)))
        total = total + torch.stack(losses).mean() * batch.credit.weight[sample]
    return total / batch.credit.weight.sum()


@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 3, 1)])
def test_loss_and_gradient_are_the_formula(toy_recipe, sizes: tuple[int, ...]) -> None:
    """One chunk of all steps is the ratio of whole trajectories, with its length-normalised exponent: GSPO's."""
    engine = build_engine(small(toy_recipe, *sizes, num_prompts=2, group_size=4), CPU)
    batch = batch_of(engine)
    move(engine)
    loss, found = gradient(engine, batch)
    expected_loss, expected = reference_gradient(
        engine, chunk_loss(engine, batch, sizes, tuple(range(len(sizes))))
    )
    assert loss == pytest.approx(expected_loss, rel=1e-4, abs=1e-7)
    close(found, expected)


@pytest.mark.parametrize("beside", [1, 2])
def test_drawn_chunks_alone_are_trained(toy_recipe, beside: int) -> None:
    """Half of four chunks: the loss of the formula over these two, and evaluations of their steps alone."""
    sizes = (1, 1, 2, 1)
    recipe = small(toy_recipe, *sizes, fraction=0.5, num_prompts=2, group_size=4, steps_per_forward=beside)
    seen = set()
    for step in range(4):
        engine = build_engine(recipe, CPU)
        engine.step = step
        batch = batch_of(engine, step)
        weights = chunk_weights(relative_change(batch.samples.transitions), sizes)
        taken = tuple(batch.choices.weighted(weights, 2))
        seen.add(taken)
        move(engine)
        loss, found = gradient(engine, batch)
        expected_loss, expected = reference_gradient(engine, chunk_loss(engine, batch, sizes, taken))
        assert loss == pytest.approx(expected_loss, rel=1e-4, abs=1e-7)
        close(found, expected)
        assert len(engine.learner.objective.points(batch)) == sum(sizes[chunk] for chunk in taken)
    assert len(seen) > 1
    engine = build_engine(recipe, CPU)
    metrics = train_step(engine).metrics
    assert metrics["first_ratio_error"] == 0
    most = recipe.objective.costs(recipe.plan(0), 2).rows
    assert most == 3 * 8
    assert metrics["network_backwards"] <= most


def test_draws_follow_the_weights() -> None:
    """One of three by its weight; of two, none twice; the same for all samples and however a step is shared out."""
    weights = (0.5, 0.3, 0.2)
    choices = [Choices(seed=0, step=step, rows=slice(0, 8), num_samples=8) for step in range(3000)]
    one = np.bincount([c.weighted(weights, 1)[0] for c in choices], minlength=3) / 3000
    np.testing.assert_allclose(one, weights, atol=0.03)
    two = [c.weighted(weights, 2) for c in choices]
    assert all(a < b for a, b in two)
    assert two == [c.of_samples(slice(4, 8)).weighted(weights, 2) for c in choices]
    # Without 2: 0 then 1, or 1 then 0.
    expected = 0.5 * 0.3 / 0.5 + 0.3 * 0.5 / 0.7
    assert two.count([0, 1]) / 3000 == pytest.approx(expected, abs=0.03)


def test_equal_rewards_teach_nothing(toy_recipe) -> None:
    engine = build_engine(small(toy_recipe, 2, 3, credit=(Normalise(eps=1e-8, ddof=1), Bound())), CPU)
    batch = make_batch(engine, replace(scored(engine), scores=Scores(total=torch.full((32,), 0.25))))
    assert not batch.live.any()
    move(engine)
    loss, found = gradient(engine, replace(batch, live=batch.counted))  # asked all the same
    assert loss == 0
    assert all(not one.any() for one in found)


def test_one_prompt_and_the_last_stochastic_step(toy_recipe) -> None:
    recipe = small(toy_recipe, 1, 2, num_prompts=1, topology=SharedStart(at=FrozenWindow(size=3, start=2)))
    metrics = train_step(build_engine(recipe, CPU)).metrics
    assert metrics["first_ratio_error"] == 0
    # The prefix is shared, and so is the first stochastic step: 3 rows, then 8 a step.
    assert metrics["network_evaluations"] == 3 + 8 * 3 + 2 * (1 + 8 * 2)
    assert metrics["network_backwards"] == 1 + 8 * 2


def test_credit_a_step_is_refused(toy_recipe) -> None:
    recipe = small(
        toy_recipe,
        1,
        1,
        topology=Tree(at=FrozenWindow(size=2, start=1), fan=2),
        group_size=4,
        credit=(Normalise(), TreeBackup()),
    )
    with pytest.raises(
        ValueError, match="one ratio for several steps, and the credit an advantage for each"
    ) as error:
        train_step(build_engine(recipe, CPU))
    assert "\n" not in str(error.value)


def test_a_run_and_its_resumption(tmp_path) -> None:
    """On the digits: T evaluations a sample in the rollout; W in the update with gradient, and W without."""
    own = ("topology.share_prefix=false",)
    lines = train(tmp_path / "whole", "gcpo", 2, *own)
    assert [line["first_ratio_error"] for line in lines] == [0, 0]
    samples, steps, trained = 2 * 24, 10, 9
    assert [line["network_evaluations"] for line in lines] == [samples * (steps + 2 * trained)] * 2
    assert [line["network_backwards"] for line in lines] == [samples * trained] * 2
    train(tmp_path / "parts", "gcpo", 1, *own)
    assert without_times(resume(tmp_path / "parts", 2)) == without_times(lines)
    assert final_bytes(tmp_path / "parts", 2) == final_bytes(tmp_path / "whole", 2)


def test_a_run_with_drawn_chunks_resumes(tmp_path) -> None:
    own = ("objective.fraction=0.5", "group_size=4")
    lines = train(tmp_path / "whole", "gcpo", 3, *own)
    assert [line["first_ratio_error"] for line in lines] == [0, 0, 0]
    train(tmp_path / "parts", "gcpo", 1, *own)
    assert without_times(resume(tmp_path / "parts", 3)) == without_times(lines)
    assert final_bytes(tmp_path / "parts", 3) == final_bytes(tmp_path / "whole", 3)
