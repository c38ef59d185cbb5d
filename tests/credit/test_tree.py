"""TreeBackup against TreeGRPO's worked case and against the recursion, written out a node at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from flowgrpo_fast.credit.chain import assign
from flowgrpo_fast.credit.normalise import Normalise
from flowgrpo_fast.credit.shape import DropIdle
from flowgrpo_fast.credit.tree import TreeBackup, over_samples
from flowgrpo_fast.types import Transitions


def tree(num_prompts: int, fan: int, depth: int, log_probs: list[Tensor]) -> tuple[Transitions, ...]:
    """The kept steps of full trees: rows of a prompt are neighbours, edges of a row are neighbours."""
    steps = []
    for level, log_prob in enumerate(log_probs):
        heads = num_prompts * fan**level
        edges, behind = heads * fan, fan ** (depth - level - 1)
        samples = np.arange(edges * behind).reshape(edges, behind)
        steps.append(
            Transitions(
                row=torch.full((edges,), level),
                latents=torch.zeros(heads, 1),
                next_latents=torch.zeros(edges, 1),
                log_prob=log_prob,
                samples=torch.from_numpy(samples),
                samples_host=samples,
                sigma=torch.full((heads,), 1.0),
                offsets=np.arange(num_prompts + 1) * fan**level,
                fan=fan,
                place=level,
            )
        )
    return tuple(steps)


@pytest.mark.parametrize(("shares", "key"), [("uniform", "upper_mean"), ("probability", "upper_prob")])
def test_worked_case(methods, scored, shares: str, key: str) -> None:
    case = methods["tree_grpo"]
    rewards = torch.tensor(case["inputs"]["leaf_rewards"], dtype=torch.float64)
    edges = torch.tensor(case["inputs"]["leaf_edge_logp"])
    steps = tree(1, 2, 2, [torch.zeros(2), edges])
    output = scored(rewards, torch.zeros(4, dtype=torch.int64), transitions=steps)
    chain = (Normalise(eps=1e-8), TreeBackup(shares=shares))
    advantages = assign(chain, output).advantages
    assert advantages.shape == (4, 2)
    np.testing.assert_allclose(advantages[:, 1], case["expected"]["leaf_A"], rtol=1e-6)
    np.testing.assert_allclose(advantages[:, 0], np.repeat(case["expected"][key], 2), rtol=1e-6)


def backed_up(
    leaf: np.ndarray, log_probs: list[np.ndarray], fan: int, level: int, edge: int, shares: str
) -> float:
    """A of one edge into a node of `level + 1`, by the recursion of the paper."""
    if level == len(log_probs) - 1:
        return float(leaf[edge])
    children = [edge * fan + child for child in range(fan)]
    values = [backed_up(leaf, log_probs, fan, level + 1, child, shares) for child in children]
    weights = [1.0 / fan] * fan
    if shares == "probability":
        raw = [math.exp(log_probs[level + 1][child]) for child in children]
        weights = [value / sum(raw) for value in raw]
    return sum(w * v for w, v in zip(weights, values, strict=True))


@pytest.mark.parametrize("shares", ["uniform", "probability"])
@pytest.mark.parametrize(("num_prompts", "fan", "depth"), [(1, 2, 1), (2, 2, 3), (3, 3, 2), (2, 4, 3)])
def test_every_edge_is_worth_what_is_behind_it(
    scored, shares: str, num_prompts: int, fan: int, depth: int
) -> None:
    rng = np.random.default_rng(fan * 10 + depth)
    num_leaves = fan**depth
    leaf = rng.normal(size=num_prompts * num_leaves).astype(np.float32)
    log_probs = [
        rng.normal(size=num_prompts * fan ** (level + 1)).astype(np.float32) for level in range(depth)
    ]
    ids = torch.arange(num_prompts).repeat_interleave(num_leaves)
    steps = tree(num_prompts, fan, depth, [torch.from_numpy(values) for values in log_probs])
    credit = assign((TreeBackup(shares=shares),), scored(torch.from_numpy(leaf), ids, transitions=steps))
    assert credit.advantages.shape == (len(leaf), depth)
    for sample in range(len(leaf)):
        for level in range(depth):
            edge = sample // fan ** (depth - level - 1)
            expected = backed_up(leaf, log_probs, fan, level, edge, shares)
            assert float(credit.advantages[sample, level]) == pytest.approx(expected, rel=2e-5, abs=2e-6)


def test_a_dead_tree_is_dropped_whole(scored) -> None:
    """Of `[B, K]` advantages the largest counts, for each of a sample's steps."""
    rewards = torch.tensor([1.0, 1, 1, 1, 0, 1, 0, 0])
    steps = tree(2, 2, 2, [torch.zeros(4), torch.zeros(8)])
    output = scored(rewards, torch.arange(2).repeat_interleave(4), transitions=steps)
    credit = assign((Normalise(), TreeBackup(edges="by_samples"), DropIdle()), output)
    assert credit.weight.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    credit = assign((Normalise(), TreeBackup(), DropIdle()), output)
    assert credit.weight.tolist() == [[0, 0]] * 4 + [[0.5, 1]] * 4


@pytest.mark.parametrize("shares", ["uniform", "probability"])
@pytest.mark.parametrize("edges", ["mean", "summed", "by_samples"])
def test_a_leaf_without_a_score_counts_nowhere(scored, shares: str, edges: str) -> None:
    """Of two trees of 8 leaves the first lacks leaf 1, and both below one node: the rest is as the recursion says."""
    rng = np.random.default_rng(8)
    leaf = rng.normal(size=16).astype(np.float32)
    valid = torch.ones(16, dtype=torch.bool)
    valid[[1, 4, 5]] = False
    leaf[~valid.numpy()] = 0
    log_probs = [rng.normal(size=2 * 2**level).astype(np.float32) for level in (1, 2, 3)]
    steps = tree(2, 2, 3, [torch.from_numpy(values) for values in log_probs])
    ids = torch.arange(2).repeat_interleave(8)
    credit = assign(
        (TreeBackup(shares=shares, edges=edges),),
        scored(torch.from_numpy(leaf), ids, valid=valid, transitions=steps),
    )

    def worth(level: int, edge: int) -> float | None:
        if level == 2:
            return float(leaf[edge]) if valid[edge] else None
        children = [
            (worth(level + 1, child), log_probs[level + 1][child]) for child in (2 * edge, 2 * edge + 1)
        ]
        here = [
            (value, 1.0 if shares == "uniform" else math.exp(raw))
            for value, raw in children
            if value is not None
        ]
        return sum(v * w for v, w in here) / sum(w for _, w in here) if here else None

    times = 2 if edges == "summed" else 1
    for level, step in enumerate(steps):
        for edge, behind in enumerate(step.samples):
            expected = worth(level, edge)
            weights = credit.weight[behind] if edges == "by_samples" else credit.weight[behind, level]
            assert weights[~valid[behind]].eq(0).all()
            if expected is None:
                continue
            for value in credit.advantages[behind, level].tolist():
                assert value == pytest.approx(times * expected, rel=1e-5, abs=1e-6)
            counted = int(valid[behind].sum()) if edges == "by_samples" else 1
            assert float(weights.sum()) == pytest.approx(counted, rel=1e-6)


def test_a_sample_without_an_edge_is_worth_nothing_there() -> None:
    (step,) = tree(1, 2, 1, [torch.zeros(2)])
    assert over_samples(step, torch.tensor([3.0, 4.0]), 4).tolist() == [3.0, 4.0, 0.0, 0.0]


def test_it_needs_log_probs_of_every_step() -> None:
    needs = TreeBackup().requires
    assert needs.log_probs
    assert needs.all_steps
    with pytest.raises(
        ValueError, match=r"TreeBackup.edges is 'all'; it must be 'mean', 'summed' or 'by_samples'"
    ):
        TreeBackup(edges="all")
    with pytest.raises(
        ValueError, match=r"TreeBackup.shares is 'equal'; it must be 'uniform' or 'probability'"
    ):
        TreeBackup(shares="equal")


def test_a_walk_that_is_no_tree_is_refused(scored) -> None:
    """A comb, whose branches leave one trunk."""
    (first,) = tree(1, 2, 1, [torch.zeros(2)])
    second = replace(first, samples=first.samples + 2, samples_host=first.samples_host + 2)
    output = scored(torch.arange(4.0), torch.zeros(4, dtype=torch.int64), transitions=(first, second))
    with pytest.raises(ValueError, match=r"are \[\(1, 2\), \(1, 2\)\]: use the topology Tree") as error:
        assign((TreeBackup(),), output)
    assert "\n" not in str(error.value)
