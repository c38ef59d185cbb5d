"""Groups of samples: advantages, selections, Pareto fronts, gathered rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _moments(values: Tensor, group_id: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of each sample's group, ``[B, C]``."""

    def mean_of(terms: Tensor) -> Tensor:
        sums = terms.new_zeros(num_groups, terms.shape[1]).index_add(0, group_id, terms)
        counts = terms.new_zeros(num_groups, 1).index_add(0, group_id, torch.ones_like(terms[:, :1]))
        return (sums / counts)[group_id]

    mean = mean_of(values)
    return mean, mean_of((values - mean).square()).sqrt()


def _all_equal(values: Tensor, group_id: Tensor, num_groups: int) -> Tensor:
    """Whether a sample's group has one value, ``[B, C]``: its advantages are 0, which a rounded mean would miss."""
    index = group_id[:, None].expand_as(values)
    empty = values.new_zeros(num_groups, values.shape[1])
    lowest = empty.scatter_reduce(0, index, values, "amin", include_self=False)[group_id]
    return lowest == empty.scatter_reduce(0, index, values, "amax", include_self=False)[group_id]


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """``above / below``, and 0 where that is nothing by nothing."""
    return torch.where(below == 0, torch.zeros_like(above), above / below)


def group_advantages(
    rewards: Tensor,
    group_id: Tensor,
    num_groups: int,
    weights: Sequence[float] | None = None,
    aggregate: str = "sum",
    std: str = "group",
    eps: float = 1e-4,
    clip: tuple[float | None, float | None] = (None, None),
) -> Tensor:
    """``(r - group mean) / (std + eps)`` of the weighted sum, or of each reward and then weighted and summed."""
    values = rewards if rewards.ndim == 2 else rewards[:, None]
    weight = values.new_ones(values.shape[1]) if weights is None else values.new_tensor(list(weights))
    if aggregate == "sum":
        values, weight = (values * weight).sum(1, keepdim=True), weight.new_ones(1)
    mean, scale = _moments(values, group_id, num_groups)
    if std == "batch":
        scale = values.std(0, correction=0)
    equal = _all_equal(values.detach(), group_id, num_groups)
    if std == "group":
        scale = torch.where(equal & scale.isfinite(), torch.zeros_like(scale), scale)
    centred = torch.where(equal & mean.isfinite(), torch.zeros_like(values), values - mean)
    advantages = weight * _ratio(centred, scale + eps)
    if aggregate != "separate":
        advantages = advantages.sum(1)
    if aggregate == "gdpo":
        one = torch.zeros_like(group_id)
        same = _all_equal(advantages.detach()[:, None], one, 1)[:, 0] & advantages.isfinite()
        centred = torch.where(same, torch.zeros_like(advantages), advantages - advantages.mean())
        spread = torch.where(same, torch.zeros_like(advantages), advantages.std(correction=0))
        advantages = _ratio(centred, spread + eps)
    hard, soft = clip
    if hard is not None:
        advantages = advantages.clamp(-hard, hard)
    advantages = advantages if soft is None else soft * torch.tanh(advantages / soft)
    return advantages.reshape(rewards.shape) if aggregate == "separate" else advantages


def best_variance_subset(rewards: Tensor, k: int) -> Tensor:
    """Ascending indices of the i lowest and k - i highest rewards for the i of the largest variance, ``[P, k]``."""
    finite = rewards.isfinite().all(1)
    rank = _rank(rewards)
    values = rewards.where(finite[:, None], rank.to(rewards.dtype)).double().sort(dim=1).values
    values = values - values[:, [rewards.shape[1] // 2]]
    places = torch.arange(k, device=rewards.device)
    num_bottom = torch.arange(k + 1, device=rewards.device)[:, None]
    # Row i: the places of the i lowest, then those of the k - i highest.
    chosen = torch.where(places < num_bottom, places, rewards.shape[1] - k + places)
    taken = values[:, chosen]  # [P, k + 1, k]
    score = k * taken.square().sum(2) - taken.sum(2).square()
    rounding = 1e-15 * k**3 * values[:, [0, -1]].square().sum(1, keepdim=True)
    best = (score >= score.amax(1, keepdim=True) - rounding).int().argmax(1)  # the first of equals
    return _top_bottom_places(rank, torch.where(finite, k - best, k), k).sort(dim=1).values


def top_bottom(rewards: Tensor, num_top: int, num_bottom: int) -> Tensor:
    """Indices of the highest, highest first, then of the lowest of the others, lowest first."""
    top = rewards.new_full((rewards.shape[0],), num_top, dtype=torch.int64)
    return _top_bottom_places(_rank(rewards), top, num_top + num_bottom)


def _lower(first: Tensor, second: Tensor) -> Tensor:
    """Where a value counts as lower than another: NaN does than everything else."""
    return (first < second) | (first.isnan() & ~second.isnan())


def _rank(values: Tensor) -> Tensor:
    """How many of the others along the last axis are lower, int64."""
    return _lower(values[..., None, :], values[..., :, None]).sum(-1)


def _top_bottom_places(rank: Tensor, num_top: Tensor, size: int) -> Tensor:
    """`top_bottom` of `size` members, of which `num_top`, ``[P]``, are the highest."""
    descending = rank.argsort(dim=1, descending=True, stable=True)
    from_top = descending.argsort(dim=1)
    is_top = from_top < num_top[:, None]
    from_bottom = rank.masked_fill(is_top, rank.shape[1]).argsort(dim=1, stable=True).argsort(dim=1)
    place = torch.where(is_top, from_top, num_top[:, None] + from_bottom)
    return place.argsort(dim=1)[:, :size]


def pareto_fronts(objectives: Tensor) -> Tensor:
    """Front 0 is not dominated; then it is taken away and the next one is found, ``[P, G]``."""
    candidates = objectives.shape[1]
    first, second = objectives[:, :, None], objectives[:, None, :]
    dominates = ~_lower(first, second).any(3) & _lower(second, first).any(3)  # [P, i, j]: i dominates j
    fronts = objectives.new_full(objectives.shape[:2], candidates, dtype=torch.int64)
    for front in range(candidates):
        left = fronts == candidates
        peeled = left & ~(dominates & left[:, :, None]).any(1)
        fronts = torch.where(peeled, front, fronts)
    return fronts


def compact(indices: Tensor, *buffers: Tensor) -> tuple[Tensor, ...]:
    """``buffer[indices]`` of each."""
    return tuple(buffer[indices] for buffer in buffers)
