"""GCPO: one ratio for a chunk of consecutive steps. arXiv 2510.21583.

    ratio_j = exp(mean over the chunk's steps of log_prob - old_log_prob)
    loss    = mean over chunks of trust(log ratio_j, A)

Chunks of one step are Flow-GRPO; one chunk of all steps is a ratio of whole trajectories.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowgrpo_fast.checks import require
from flowgrpo_fast.objectives.objective import Requires, Stats, Terms
from flowgrpo_fast.objectives.policy_gradient import PolicyGradient
from flowgrpo_fast.schedule.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRatio(PolicyGradient):
    """A policy gradient over chunks of a sample's trained steps, in their order."""

    sizes: tuple[int, ...] = (2, 3, 4, 7)

    def __post_init__(self) -> None:
        """A chunk has a step."""
        require(
            len(self.sizes) > 0 and all(size > 0 for size in self.sizes),
            f"ChunkRatio.sizes is {self.sizes}; name at least one chunk, of at least one step each",
        )

    @property
    def requires(self) -> Requires:
        """All stochastic steps of a sample: a chunk with a hole has no ratio."""
        return replace(PolicyGradient.requires.fget(self), all_steps=True)  # type: ignore[attr-defined]

    @property
    def couples(self) -> bool:
        """The steps of a chunk."""
        return True

    def check(self, plan: Plan) -> None:
        """The chunks must cover the trained steps."""
        require(
            sum(self.sizes) == len(plan.kept) == plan.num_trained,
            f"ChunkRatio.sizes is {self.sizes}, {sum(self.sizes)} steps in all; a sample trains on {plan.num_trained}: "
            "name sizes that add up to them",
        )

    def loss(self, stats: Stats, advantages: Tensor) -> Terms:
        """The loss of each sample, of tables `[B, N]`."""
        log_ratio = self.log_ratio(stats)
        chunks = [self.trust(chunk.mean(1), advantages) for chunk in log_ratio.split(self.sizes, dim=1)]
        policy = torch.stack([chunk.loss for chunk in chunks]).mean(0)
        ratio = torch.stack([chunk.ratio for chunk in chunks], 1)
        clipped = torch.stack([chunk.clipped for chunk in chunks], 1)
        loss, kl = policy, torch.zeros_like(policy).detach()
        for part in self.penalties:
            penalty = part.penalty(stats).mean(1)
            loss = loss + part.beta * penalty
            kl = kl + penalty.detach()
        shown = {
            "loss": loss.detach(),
            "policy_loss": policy.detach(),
            "kl": kl,
            "ratio_mean": ratio.mean(1),
            "clip_fraction": clipped.mean(1),
        }
        return Terms(loss, shown, {"ratio_max": ratio.amax(1)})
