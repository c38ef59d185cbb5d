"""Steps that bend or drop advantages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flowgrpo_fast.checks import positive, require
from flowgrpo_fast.objectives.objective import Requires
from flowgrpo_fast.types import Credit, Scored

# A weighted sum of rewards that are equal but for rounding leaves at most this; a real difference leaves order 1.
_ZERO = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Advantages cut at `+-limit`, then bent as `soft * tanh(A / soft)` where soft is not 0 (V-GRPO eq. 17).

    With `to` the cut advantages are scaled so that the limit becomes that (AWM: 5 to 1).
    """

    limit: float = 5.0
    soft: float = 0.0
    to: float = 0.0  # 0 = as they are
    requires = Requires()  # nothing but scores

    def __post_init__(self) -> None:
        """A positive limit."""
        positive(self, limit=self.limit)
        for name in ("soft", "to"):
            value = getattr(self, name)
            require(value >= 0, f"Bound.{name} is {value}; it must be at least 0")

    def __call__(self, credit: Credit, scored: Scored) -> Credit:
        """As of `CreditStep`."""
        advantages = credit.advantages.clamp(-self.limit, self.limit)
        if self.to:
            advantages = advantages / self.limit * self.to
        if self.soft:
            advantages = self.soft * torch.tanh(advantages / self.soft)
        return Credit(advantages, credit.weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class DropIdle:
    """Leaves out groups whose rewards are all equal: they teach nothing, and would only dilute the mean."""

    requires = Requires()  # nothing but scores

    def __call__(self, credit: Credit, scored: Scored) -> Credit:
        """As of `CreditStep`; of advantages with further axes, the largest counts."""
        group = scored.samples.draws.group_id
        size = (
            credit.advantages.abs().flatten(1).amax(1)
            if credit.advantages.ndim > 1
            else credit.advantages.abs()
        )
        largest = torch.zeros_like(size).scatter_reduce_(0, group, size, "amax")
        alive = (largest[group] > _ZERO).float()
        return Credit(
            credit.advantages, credit.weight * (alive if credit.weight.ndim == 1 else alive[:, None])
        )
