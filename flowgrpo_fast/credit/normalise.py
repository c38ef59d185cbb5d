"""Group-relative advantages: how much better than its own group a sample did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flowgrpo_fast.checks import one_of, positive, require
from flowgrpo_fast.objectives.objective import Requires
from flowgrpo_fast.ops import group_advantages
from flowgrpo_fast.types import Credit, Scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalise:
    """The z-score `(r - mean of the group) / (std + eps)`, of the group's or the batch's standard deviation.

    `aggregate`: "sum" takes that of the weighted sum of rewards (Flow-GRPO); "per_objective" the weighted sum of each
    reward's own (MixGRPO, DanceGRPO); "gdpo" that normalised once more over the batch; "separate" keeps objectives
    apart, `[B, Q]`, for a later step to mix.
    """

    std: Literal["group", "batch"] = "group"
    aggregate: Literal["sum", "per_objective", "gdpo", "separate"] = "per_objective"
    eps: float = 1e-4
    # 0: the population's standard deviation (Flow-GRPO); 1: the sample's, with Bessel's correction (DanceGRPO,
    # MixGRPO).
    ddof: int = 0
    unit_weights: bool = False  # the rewards' weights divided by their sum (MixGRPO)
    requires = Requires()  # nothing but scores

    def __post_init__(self) -> None:
        """Known words, a positive eps."""
        one_of(self, ("group", "batch"), std=self.std)
        one_of(self, ("sum", "per_objective", "gdpo", "separate"), aggregate=self.aggregate)
        positive(self, eps=self.eps)
        require(self.ddof in (0, 1), f"Normalise.ddof is {self.ddof}; it must be 0 or 1")
        require(
            not (self.ddof and self.aggregate == "gdpo"),
            "Normalise.ddof is 1, which 'gdpo' does not know; its second pass is over the population",
        )
        require(
            not (self.std == "batch" and self.aggregate == "gdpo"),
            "Normalise.std is 'batch', which 'gdpo' does not know; its first pass is by groups: set std='group'",
        )

    def __call__(self, credit: Credit, scored: Scored) -> Credit:
        """Advantages `[B]` fp32, or `[B, Q]` of "separate".

        Raises:
            ValueError: a reward on the host is NaN or infinite. (One on a device gives its group NaN.)
        """
        objectives, draws = scored.scores.objectives, scored.samples.draws
        apart = self.aggregate != "sum" and bool(objectives)
        values = torch.stack(list(objectives.values()), 1) if apart else credit.advantages
        _require_finite(values)
        count = len(draws.group_id) // len(draws.prompt_index) if self.std == "group" else len(draws.group_id)
        weights = [scored.reward_weights[name] for name in objectives] if apart else None
        if self.unit_weights:
            total = sum(scored.reward_weights.values())
            require(
                total > 0,
                f"Normalise.unit_weights divides the weights of the rewards by their sum, which is {total:g}: give "
                "them a positive one, or set unit_weights=false",
            )
            weights = None if weights is None else [weight / total for weight in weights]
            values = values / total if weights is None else values
        if scored.scores.valid is not None:
            return replace(credit, advantages=self._of_scored(values, scored, weights).float())
        # With std_1 = f * std_0 the wanted r / (f std_0 + eps) is r / (std_0 + eps / f) / f: the kernel's own,
        # rescaled.
        bessel = math.sqrt(count / (count - 1)) if self.ddof else 1.0
        advantages = group_advantages(
            values.double(),
            draws.group_id,
            len(draws.prompt_index),
            weights,
            self.aggregate if apart else "sum",
            self.std,
            self.eps / bessel,
        )
        if self.ddof:
            advantages = advantages / bessel
        return replace(credit, advantages=advantages.float())

    def _of_scored(self, values: Tensor, scored: Scored, weights: Sequence[float] | None) -> Tensor:
        """The same, where some samples have no score: no mean and no deviation counts them, and theirs is 0.

        The kernel knows no such samples, and how many there are is known on the device alone.
        """
        valid = scored.scores.valid
        assert valid is not None
        # Members of a group are neighbours, and as many in each: sums over an axis are in a fixed order.
        num_groups = len(scored.samples.draws.prompt_index)
        here = valid.view(num_groups, -1, 1)
        table = values.double().view(*here.shape[:2], -1)
        # Counted from a score of its own group, equal rewards are exactly 0 whatever the rounding of their mean.
        lowest = table.where(here, torch.inf).amin(1, keepdim=True)
        shifted = (table - lowest).where(here, 0.0)
        num = here.sum(1, keepdim=True).double()

        def deviation(centred: Tensor, num: Tensor, over: tuple[int, ...]) -> Tensor:
            squares = centred.square().sum(over, keepdim=True)
            return (squares / (num - self.ddof).clamp(min=1)).sqrt()

        centred = (shifted - shifted.sum(1, keepdim=True) / num.clamp(min=1)).where(here, 0.0)
        if self.std == "group":
            scale = deviation(centred, num, (1,))
        else:
            mean = table.where(here, 0.0).sum((0, 1), keepdim=True) / num.sum().clamp(min=1)
            scale = deviation((table - mean).where(here, 0.0), num.sum(), (0, 1))
        z = centred / (scale + self.eps)
        if weights is None:
            return z.flatten()
        z = z * torch.tensor(weights, dtype=z.dtype).to(z.device, non_blocking=True)
        if self.aggregate == "separate":
            return z.flatten(0, 1)
        advantages = z.sum(2, keepdim=True)
        if self.aggregate == "gdpo":
            mean = advantages.sum() / num.sum().clamp(min=1)
            centred = (advantages - mean).where(here, 0.0)
            advantages = centred / (deviation(centred, num.sum(), (0, 1)) + self.eps)
        return advantages.flatten()


def _require_finite(rewards: Tensor) -> None:
    """Raises ValueError for a reward `[B]` or `[B, Q]` on the host that is NaN or infinite."""
    if rewards.device.type == "cpu" and not torch.isfinite(rewards).all():
        place = tuple((~torch.isfinite(rewards)).nonzero()[0].tolist())
        raise ValueError(f"reward of sample {place[0]} is {float(rewards[place])}; rewards must be finite")
