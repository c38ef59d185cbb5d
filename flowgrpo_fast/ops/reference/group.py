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
    advantages = weight * (values - mean) / (scale + eps)
    if aggregate != "separate":
        advantages = advantages.sum(1)
    if aggregate == "gdpo":
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + eps)
    hard, soft = clip
    if hard is not None:
        advantages = advantages.clamp(-hard, hard)
    advantages = advantages if soft is None else soft * torch.tanh(advantages / soft)
    return advantages.reshape(rewards.shape) if aggregate == "separate" else advantages


def best_variance_subset(rewards: Tensor, k: int) -> Tensor:
    """Ascending indices of the i lowest and k - i highest rewards for the i of the largest variance, ``[P, k]``."""
    ascending = rewards.sort(dim=1, stable=True)
    values = ascending.values.double()
    values = values - values[:, [rewards.shape[1] // 2]]
    places = torch.arange(k, device=rewards.device)
    num_bottom = torch.arange(k + 1, device=rewards.device)[:, None]
    # Row i: the places of the i lowest, then those of the k - i highest.
    chosen = torch.where(places < num_bottom, places, rewards.shape[1] - k + places)
    taken = values[:, chosen]  # [P, k + 1, k]
    score = k * taken.square().sum(2) - taken.sum(2).square()
    rounding = 1e-15 * k**3 * values[:, [0, -1]].square().sum(1, keepdim=True)
    best = (score >= score.amax(1, keepdim=True) - rounding).int().argmax(1)  # the first of equals
    return _top_bottom_places(rewards, k - best, k).sort(dim=1).values


def top_bottom(rewards: Tensor, num_top: int, num_bottom: int) -> Tensor:
    """Indices of the highest, highest first, then of the lowest of the others, lowest first."""
    top = rewards.new_full((rewards.shape[0],), num_top, dtype=torch.int64)
    return _top_bottom_places(rewards, top, num_top + num_bottom)


def _top_bottom_places(rewards: Tensor, num_top: Tensor, size: int) -> Tensor:
    """`top_bottom` of `size` members, of which `num_top`, ``[P]``, are the highest."""
    descending = rewards.argsort(dim=1, descending=True, stable=True)
    from_top = descending.argsort(dim=1)
    is_top = from_top < num_top[:, None]
    from_bottom = rewards.masked_fill(is_top, float("inf")).argsort(dim=1, stable=True).argsort(dim=1)
    place = torch.where(is_top, from_top, num_top[:, None] + from_bottom)
    return place.argsort(dim=1)[:, :size]


def pareto_fronts(objectives: Tensor) -> Tensor:
    """Front 0 is not dominated; then it is taken away and the next one is found, ``[P, G]``."""
    candidates = objectives.shape[1]
    first, second = objectives[:, :, None], objectives[:, None, :]
    dominates = (first >= second).all(3) & (first > second).any(3)  # [P, i, j]: i dominates j
    fronts = objectives.new_full(objectives.shape[:2], candidates, dtype=torch.int64)
    for front in range(candidates):
        left = fronts == candidates
        peeled = left & ~(dominates & left[:, :, None]).any(1)
        fronts = torch.where(peeled, front, fronts)
    return fronts


def compact(indices: Tensor, *buffers: Tensor) -> tuple[Tensor, ...]:
    """``buffer[indices]`` of each."""
    return tuple(buffer[indices] for buffer in buffers)
