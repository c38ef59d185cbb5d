"""The common case: a ratio of surrogates within a trust region, and penalties.

loss = trust(log_prob - old_log_prob, A) + sum beta * penalty

Where the surrogate couples a sample's points, log-ratio and penalty are means over them before they go in.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flowgrpo_fast.checks import require
from flowgrpo_fast.objectives.objective import Costs, Evaluator, Points, Requires, Stats, Terms
from flowgrpo_fast.objectives.regularizers import Regularizer
from flowgrpo_fast.objectives.surrogates import PathLogProb, Surrogate
from flowgrpo_fast.objectives.trust import Clip, Trust, Trusted
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyGradient:
    """Flow-GRPO, DanceGRPO, MixGRPO and most of the field."""

    surrogate: Surrogate = field(default_factory=PathLogProb)
    trust: Trust = field(default_factory=Clip)
    regularizers: tuple[Regularizer, ...] = ()

    @property
    def requires(self) -> Requires:
        """What its parts do; a penalty of weight 0 needs nothing."""
        needs = self.surrogate.requires
        for part in self.penalties:
            needs = needs.joined(part.requires)
        # A trust region's loss is 0 at advantage 0, whatever the ratio.
        return replace(needs, silent_at_zero=not self.penalties)

    @property
    def couples(self) -> bool:
        """As the surrogate."""
        return self.surrogate.couples

    @property
    def penalties(self) -> tuple[Regularizer, ...]:
        """Those that weigh anything."""
        return tuple(part for part in self.regularizers if part.beta > 0)

    def check(self, plan: Plan) -> None:
        """Any plan that keeps what it requires; penalties of transitions need a surrogate that measures them."""
        for part in self.penalties:
            require(
                self.surrogate.requires.log_probs or not part.requires.log_probs,
                f"{type(part).__name__} measures the means of stored transitions, which the surrogate "
                f"{type(self.surrogate).__name__} does not look at: use VelocityKL, or the surrogate PathLogProb",
            )

    @property
    def references(self) -> tuple[str, ...]:
        """The snapshots that its penalties measure from."""
        return tuple(dict.fromkeys(part.to for part in self.penalties if part.to))

    def costs(self, plan: Plan, num_prompts: int) -> Costs:
        """The surrogate's, and a velocity of each reference."""
        own = self.surrogate.costs(plan, num_prompts)
        return own._replace(frozen=own.frozen + len(self.references))

    def points(self, batch: Batch) -> Points:
        """The surrogate's."""
        return self.surrogate.points(batch)

    def measure(self, point: Any, evaluator: Evaluator) -> Stats:
        """The surrogate's."""
        return self.surrogate.measure(point, evaluator, self.references)

    def loss(self, stats: Stats, advantages: Tensor) -> Terms:
        """As of the module's text."""
        log_ratio = self.log_ratio(stats)
        if self.couples:
            require(
                advantages.ndim == 1,
                "the surrogate has one ratio for all points of a sample, and the credit an advantage for each; leave "
                "out the credit step that makes them",
            )
            log_ratio = log_ratio.mean(1)
        trusted = self.trust(log_ratio, advantages)
        return self.with_penalties(trusted, stats, ratio_max=trusted.ratio)

    def with_penalties(self, trusted: Trusted, stats: Stats, ratio_max: Tensor) -> Terms:
        """The loss of a trust region and the penalties beside it; of tables `[B, N]` a penalty is a mean over N."""
        policy = trusted.loss
        loss, kl = policy, torch.zeros_like(policy).detach()
        for part in self.penalties:
            penalty = part.penalty(stats).mean(1) if self.couples else part.penalty(stats)
            loss = loss + part.beta * penalty
            kl = kl + penalty.detach()
        shown = {
            "loss": loss.detach(),
            "policy_loss": policy.detach(),
            "kl": kl,
            "ratio_mean": trusted.ratio,
            "clip_fraction": trusted.clipped,
        }
        return Terms(loss, shown, {"ratio_max": ratio_max})

    @property
    def ratio_range(self) -> float:
        """The trust region's."""
        return self.trust.range

    def log_ratio(self, stats: Stats) -> Tensor:
        """`[E]`."""
        return stats["log_prob"] - stats["old_log_prob"]
