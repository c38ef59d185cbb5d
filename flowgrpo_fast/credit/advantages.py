"""Group-relative advantages: how much better than its own group a sample did."""

from __future__ import annotations

import torch
from torch import Tensor

from flowgrpo_fast.ops import group_advantages
from flowgrpo_fast.recipe import Credit
from flowgrpo_fast.rewards.terms import Reward
from flowgrpo_fast.types import Scores


def assign_credit(
    rewards: Scores,
    group_id: Tensor,
    credit: Credit,
    terms: tuple[Reward, ...],
    num_groups: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages `[B]` fp32, clipped, and weights `[B]`: 0 drops a sample, 1 keeps it. Waits for no device.

    Per objective (MixGRPO, DanceGRPO): each reward is normalised within its group, then the weighted sum is
    taken. Otherwise (Flow-GRPO) the weighted sum itself is normalised. A group whose rewards are all equal
    teaches nothing and is dropped.

    Raises:
        ValueError: shapes differ, or a reward on the host is NaN or infinite. (One on a device gives its group NaN.)
    """
    names = list(rewards.objectives)
    per_objective = credit.per_objective and bool(names)
    values = torch.stack([rewards.objectives[name] for name in names], 1) if per_objective else rewards.total
    _require_finite(values)
    advantages = group_advantages(
        values.double(),
        group_id,
        num_groups,
        [term.weight for _, term in zip(names, terms, strict=True)] if per_objective else None,
        "per_objective" if per_objective else "sum",
        credit.std,
        credit.eps,
        credit.clip,
    ).float()
    weight = torch.ones_like(advantages)
    if credit.drop_zero_variance:
        largest = torch.zeros_like(advantages).scatter_reduce_(0, group_id, advantages.abs(), "amax")
        weight = (largest[group_id] > _ZERO).float()
    return advantages, weight


def _require_finite(rewards: Tensor) -> None:
    """Raises ValueError for a reward `[B]` or `[B, R]` on the host that is NaN or infinite."""
    if rewards.device.type == "cpu" and not torch.isfinite(rewards).all():
        place = tuple((~torch.isfinite(rewards)).nonzero()[0].tolist())
        raise ValueError(f"reward of sample {place[0]} is {float(rewards[place])}; rewards must be finite")


# A weighted sum of rewards that are equal but for rounding leaves at most this; a real difference leaves order 1.
_ZERO = 1e-6
