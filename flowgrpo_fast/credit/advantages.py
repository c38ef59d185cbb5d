"""Group-relative advantages: how much better than its own group a sample did."""

from __future__ import annotations

import torch
from torch import Tensor

from flowgrpo_fast.recipe import Credit, RewardTerm
from flowgrpo_fast.types import RewardOutput


def group_advantages(rewards: Tensor, group_id: Tensor, credit: Credit) -> Tensor:
    """`(reward - mean of its group) / (std + eps)`, std of the group or of the whole batch; not clipped.

    Population std (no Bessel correction), as the published trainers use.

    Args:
        rewards: `[B]` floating point.
        group_id: `[B]` int64 in 0..P-1.

    Returns:
        `[B]`, in the dtype of `rewards`.

    Raises:
        ValueError: shapes differ, or a reward is NaN or infinite.
    """
    if rewards.ndim != 1 or rewards.shape != group_id.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and group_id {tuple(group_id.shape)} must both be [B]"
        )
    if not torch.isfinite(rewards).all():
        sample = int((~torch.isfinite(rewards)).nonzero()[0])
        raise ValueError(f"reward of sample {sample} is {float(rewards[sample])}; rewards must be finite")
    centred = rewards - _group_mean(rewards, group_id)
    if credit.std == "batch":
        return centred / (rewards.std(correction=0) + credit.eps)
    variance = _group_mean(centred.square(), group_id)
    return centred / (variance.sqrt() + credit.eps)


def _group_mean(values: Tensor, group_id: Tensor) -> Tensor:
    """The mean of each sample's group, `[B]`."""
    num_groups = int(group_id.max()) + 1
    sums = values.new_zeros(num_groups).index_add_(0, group_id, values)
    counts = values.new_zeros(num_groups).index_add_(0, group_id, torch.ones_like(values))
    return (sums / counts)[group_id]


def assign_credit(
    rewards: RewardOutput, group_id: Tensor, credit: Credit, terms: tuple[RewardTerm, ...]
) -> tuple[Tensor, Tensor]:
    """Advantages `[B]` fp32, clipped, and weights `[B]`: 0 drops a sample, 1 keeps it.

    Per objective (MixGRPO, DanceGRPO): each reward is normalised within its group, then the weighted sum is
    taken. Otherwise (Flow-GRPO) the weighted sum itself is normalised. A group whose rewards are all equal
    teaches nothing and is dropped.
    """
    names = list(rewards.objectives)
    if credit.per_objective and names:
        weighted = [
            term.weight * group_advantages(rewards.objectives[name].double(), group_id, credit)
            for name, term in zip(names, terms, strict=True)
        ]
        advantages = torch.stack(weighted).sum(0)
    else:
        advantages = group_advantages(rewards.total.double(), group_id, credit)
    advantages = advantages.clamp(-credit.clip, credit.clip).float()
    weight = torch.ones_like(advantages)
    if credit.drop_zero_variance:
        largest = _group_mean(advantages.abs(), group_id)
        weight = (largest > _ZERO).float()
    return advantages, weight


# Equal rewards leave at most rounding behind after the mean is taken off; a real difference leaves order 1.
_ZERO = 1e-6
