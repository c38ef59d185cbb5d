"""TreeGRPO: its worked case, its loss over nodes written out, what it costs, and a run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from flowgrpo_fast.credit.chain import assign
from flowgrpo_fast.credit.normalise import Normalise
from flowgrpo_fast.credit.shape import Bound
from flowgrpo_fast.credit.tree import TreeBackup
from flowgrpo_fast.recipe_io import override
from flowgrpo_fast.recipes.trajectory import tree_grpo
from flowgrpo_fast.schedule.topology import Tree
from flowgrpo_fast.schedule.windows import FrozenWindow, GeometricWindow, SlidingWindow
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import make_batch, train_step
from flowgrpo_fast.types import Scores
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


def small(
    toy_recipe, edges: str = "summed", shares: str = "uniform", depth: int = 2, start: int = 1, **changes
):
    """Binary trees of two levels on the toy job."""
    return toy_recipe(
        **{
            "topology": Tree(at=FrozenWindow(size=depth, start=start), fan=2),
            "group_size": 2**depth,
            "credit": (Normalise(aggregate="sum", eps=1e-8), Bound(), TreeBackup(edges=edges, shares=shares)),
            **changes,
        }
    )


def test_the_recipe_has_the_released_defaults() -> None:
    recipe = tree_grpo()
    assert recipe.topology == Tree(at=SlidingWindow(size=4, every=50, stride=1), fan=2)
    assert [recipe.topology.at.steps(10, i, 0).stochastic[0] for i in (0, 49, 50, 299)] == [0, 0, 1, 5]
    assert (recipe.dynamics.noise_level, recipe.guidance_scale, recipe.group_size) == (0.7, 4.5, 16)
    assert recipe.sigmas.num_inference_steps == 10
    assert recipe.credit[0] == Normalise(std="group", aggregate="sum", eps=1e-8, ddof=0)
    assert recipe.credit[1:] == (Bound(limit=5.0), TreeBackup(shares="uniform", edges="summed"))
    assert (recipe.objective.trust.range, recipe.objective.regularizers) == (1e-4, ())
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.num_steps) == (1e-5, 1e-4, 300)
    assert recipe.optimizer.num_updates == 2


def test_the_paper_s_best_is_a_few_overrides() -> None:
    words = (
        "topology.at=GeometricWindow topology.at.size=3 topology.at.ratio=0.5 topology.fan=3 group_size=27 "
        "credit.2.shares=probability credit.0.aggregate=per_objective"
    )
    recipe = override(tree_grpo(), words.split())
    assert recipe.topology == Tree(at=GeometricWindow(size=3, ratio=0.5), fan=3)
    assert recipe.plan(0).evaluations(1) == sum(len(step.heads) for step in recipe.plan(0).steps)


def test_worked_case(methods, toy_recipe) -> None:
    """Leaf advantages and their back-up, on a tree that was walked; rewards and log-probs are the case's."""
    case = methods["tree_grpo"]
    given, expected = case["inputs"], case["expected"]
    engine = build_engine(small(toy_recipe, num_prompts=1), CPU)
    walked = scored(engine)
    rewards = torch.tensor(given["leaf_rewards"], dtype=torch.float64)
    steps = walked.samples.transitions
    leaves = replace(steps[1], log_prob=torch.tensor(given["leaf_edge_logp"], dtype=torch.float64))
    samples = replace(walked.samples, transitions=(steps[0], leaves))
    walked = replace(walked, samples=samples, scores=Scores(total=rewards))
    for shares, key in (("uniform", "upper_mean"), ("probability", "upper_prob")):
        chain = (Normalise(aggregate="sum", eps=1e-8), Bound(), TreeBackup(shares=shares))
        credit = assign(chain, walked)
        np.testing.assert_allclose(credit.advantages[:, 1], expected["leaf_A"], rtol=1e-6)
        np.testing.assert_allclose(credit.advantages[:, 0], np.repeat(expected[key], 2), rtol=1e-6)
        assert credit.weight.tolist() == [[0.5, 1.0]] * 4  # two leaves behind an upper edge
    window = GeometricWindow(size=given["w"], ratio=given["r"])
    np.testing.assert_allclose(window.probabilities(given["T"]), expected["start_prob"], rtol=1e-6)


def released_loss(engine, batch, leaf: Tensor, edges: str) -> Tensor:
    """The released loop in our words: a node at a time, its children's losses summed, nodes averaged."""
    steps, clip = batch.samples.transitions, engine.recipe.objective.trust.range
    fan, num_leaves = steps[0].fan, len(leaf)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for step in steps:
        behind = num_leaves // (step.num_heads * fan)
        for node in range(step.num_heads):
            owner = slice(node * fan * behind, node * fan * behind + 1)
            velocity = engine.model.velocity(
                step.latents[node : node + 1], step.sigma[node : node + 1], batch.conditioning.rows(owner)
            )[0]
            losses = []
            for child in range(node * fan, (node + 1) * fan):
                row = int(step.row[child])
                new = log_prob(batch, row, step.latents[node], velocity, step.next_latents[child])
                ratio = torch.exp(new - step.log_prob[child].double())
                value = leaf[child * behind : (child + 1) * behind].double().mean()
                losses.append(torch.maximum(-value * ratio, -value * ratio.clamp(1 - clip, 1 + clip)))
            node_loss = torch.stack(losses).sum()
            if edges == "mean":
                node_loss = node_loss / fan
            if edges == "by_samples":  # every level weighs the same
                node_loss = node_loss / fan / step.num_heads * (1 / len(steps))
            total, count = total + node_loss, count + 1
    return total if edges == "by_samples" else total / count


@pytest.mark.parametrize("edges", ["summed", "mean", "by_samples"])
@pytest.mark.parametrize("num_prompts", [1, 3])
def test_loss_and_gradient_are_those_of_the_released_loop(toy_recipe, edges: str, num_prompts: int) -> None:
    engine = build_engine(small(toy_recipe, edges, num_prompts=num_prompts), CPU)
    walked = scored(engine)
    batch = make_batch(engine, walked)
    leaf = assign(engine.recipe.credit[:2], walked).advantages
    move(engine)
    _, found = gradient(engine, batch)
    _, expected = reference_gradient(engine, released_loss(engine, batch, leaf, edges))
    close(found, expected)


def test_equal_rewards_teach_nothing(toy_recipe, toy_module) -> None:
    engine = build_engine(small(toy_recipe), CPU)
    walked = scored(engine)
    batch = make_batch(engine, replace(walked, scores=Scores(total=torch.full((16,), 0.25))))
    assert torch.equal(batch.credit.advantages, torch.zeros(16, 2))
    assert not batch.live.any()
    move(engine)
    loss, found = gradient(engine, replace(batch, live=batch.counted))  # asked all the same
    assert loss == 0
    assert all(not one.any() for one in found)


def test_a_tree_may_end_one_step_before_the_last(toy_recipe) -> None:
    """Of six steps the last is step 5, which ends at sigma 0: its noise would be no noise."""
    engine = build_engine(small(toy_recipe, start=3), CPU)
    assert train_step(engine).metrics["first_ratio_error"] == 0
    with pytest.raises(ValueError, match="outside the schedule: with 6 steps the last stochastic one is 4"):
        small(toy_recipe, start=4).plan(0)


@pytest.mark.parametrize(("fan", "depth", "start"), [(2, 4, 0), (2, 4, 3), (3, 2, 1), (2, 1, 5)])
def test_evaluations_are_the_formula(toy_recipe, fan: int, depth: int, start: int) -> None:
    """Of a tree: (pre + (k^w - 1)/(k - 1) + k^w post) in the rollout, (k^w - 1)/(k - 1) in the update."""
    num_steps = 10
    recipe = toy_recipe(
        sigmas=replace(toy_recipe().sigmas, num_inference_steps=num_steps),
        topology=Tree(at=FrozenWindow(size=depth, start=start), fan=fan),
        group_size=fan**depth,
        credit=small(toy_recipe).credit,
        num_prompts=2,
    )
    found = train_step(build_engine(recipe, CPU)).metrics
    nodes = (fan**depth - 1) // (fan - 1)
    rollout = start + nodes + fan**depth * (num_steps - start - depth)
    assert found["network_evaluations"] == 2 * (rollout + nodes)
    assert found["network_backwards"] == 2 * nodes
    costs = recipe.objective.costs(recipe.plan(0), 2)
    assert (costs.rows, recipe.plan(0).evaluations(2)) == (2 * nodes, 2 * rollout)


def test_geometric_starts_are_drawn_as_they_say() -> None:
    window = GeometricWindow(size=3, ratio=0.5)
    starts = [window.steps(10, i, 0).stochastic for i in range(4000)]
    assert starts == [window.steps(10, i, 0).stochastic for i in range(4000)]
    assert all(steps == tuple(range(steps[0], steps[0] + 3)) for steps in starts)
    shares = np.bincount([steps[0] for steps in starts], minlength=7) / 4000
    np.testing.assert_allclose(shares, window.probabilities(10), atol=0.03)
    assert (window.latest_start(10), window.earliest_end(10)) == (6, 3)
    assert GeometricWindow(size=9).steps(10, 0, 0).stochastic == tuple(range(9))
    with pytest.raises(ValueError, match="outside the schedule"):
        GeometricWindow(size=10).steps(10, 0, 0)
    with pytest.raises(ValueError, match=r"GeometricWindow.ratio is 1; it must be between 0 and 1"):
        GeometricWindow(ratio=1)


def test_a_run_and_its_resumption(tmp_path) -> None:
    """On the digits: 2 prompts, 16 leaves, ten steps, the window at the start."""
    lines = train(tmp_path / "whole", "tree_grpo", 2)
    assert [line["first_ratio_error"] for line in lines] == [0, 0]
    assert lines[0]["ratio_self_test"] == 0
    rollout, update = (0 + 15 + 16 * 6) / 16, 15 / 16  # per leaf
    assert [line["network_evaluations"] for line in lines] == [32 * (rollout + update)] * 2
    assert [line["network_backwards"] for line in lines] == [32 * update] * 2
    train(tmp_path / "parts", "tree_grpo", 1)
    resumed = resume(tmp_path / "parts", 2)
    assert without_times(resumed) == without_times(lines)
    assert final_bytes(tmp_path / "parts", 2) == final_bytes(tmp_path / "whole", 2)


def test_first_batch_s_ratios_are_one(toy_recipe) -> None:
    engine = build_engine(small(toy_recipe, shares="probability"), CPU)
    batch = batch_of(engine)
    assert batch.credit.weight.shape == batch.credit.advantages.shape == (16, 2)
    loss, _ = gradient(engine, batch)
    weight = batch.credit.weight
    assert loss == pytest.approx(-float((weight * batch.credit.advantages).sum() / weight.sum()), abs=1e-6)
