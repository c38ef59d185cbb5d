"""Steps that bend or drop advantages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from flowgrpo_fast.checks import one_of, positive, require
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
        return replace(credit, advantages=advantages)


@dataclass(frozen=True, slots=True, kw_only=True)
class DropIdle:
    """What becomes of groups whose rewards are all equal, which teach nothing.

    "dropped": they are left out; the mean of an optimiser step is over its other samples, and a step without any falls
    out. "kept": the mean counts them, as DanceGRPO's and MixGRPO's do, though the network need not be asked about them.
    "filtered": they are left out, and so is any sample whose advantage is 0; the others are shared out anew, equally
    many to each optimiser step, with as many of those that are left out, chosen at random, as that takes (Flow-GRPO).
    """

    mode: Literal["dropped", "kept", "filtered"] = "dropped"

    def __post_init__(self) -> None:
        """A known word."""
        one_of(self, ("dropped", "kept", "filtered"), mode=self.mode)

    @property
    def requires(self) -> Requires:
        """Nothing but scores; an update that may split groups, where samples are shared out anew."""
        return Requires(equal_updates=self.mode == "filtered")

    def __call__(self, credit: Credit, scored: Scored) -> Credit:
        """As of `CreditStep`; of advantages with further axes, the largest counts."""
        group = scored.samples.draws.group_id
        size = (
            credit.advantages.abs().flatten(1).amax(1)
            if credit.advantages.ndim > 1
            else credit.advantages.abs()
        )
        largest = torch.zeros_like(size).scatter_reduce_(0, group, size, "amax")
        alive, weight = largest[group] > _ZERO, credit.weight
        if self.mode == "kept":
            wide = alive.view(-1, *[1] * (credit.advantages.ndim - 1))
            return replace(credit, advantages=credit.advantages.where(wide, 0.0), idle=~alive)
        if self.mode == "filtered":
            alive = alive & (size > 0)
        idle = ~alive & ((weight if weight.ndim == 1 else weight.amax(1)) > 0)  # and scored
        alive = alive.float()
        weight = weight * (alive if weight.ndim == 1 else alive[:, None])
        return replace(credit, weight=weight, idle=idle, refills=self.mode == "filtered")
