"""Parts of a recipe: credit, loss and optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flowgrpo_fast.recipe.checks import positive, require


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """Rewards -> advantages: z-score against the group mean, divided by the group's or the batch's std."""

    std: Literal["group", "batch"] = "group"
    per_objective: bool = True  # normalise each reward, then add; False: add, then normalise
    clip: float = 5.0
    eps: float = 1e-4
    drop_zero_variance: bool = True

    def __post_init__(self) -> None:
        """A positive clip and eps."""
        require(self.std in ("group", "batch"), f"Credit.std is {self.std!r}; it must be 'group' or 'batch'")
        positive(self, clip=self.clip, eps=self.eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedRatio:
    """PPO's clipped importance ratio on the mean log-prob, with an optional KL to the start weights."""

    clip_range: float = 1e-4
    kl_beta: float = 0.0

    def __post_init__(self) -> None:
        """A clip range is positive, a KL weight not negative."""
        positive(self, clip_range=self.clip_range)
        require(self.kl_beta >= 0, f"ClippedRatio.kl_beta is {self.kl_beta}; it must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """AdamW and its surroundings."""

    lr: float = 1e-5
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    num_updates: int = 1  # optimiser steps per rollout, each on its own share of the samples
    ema_decay: float = 0.0  # 0 = off; else evaluation and the final weights use the moving average
    ema_every: int = 1  # optimiser steps between two averages

    def __post_init__(self) -> None:
        """Rates are positive, the average's decay below 1."""
        positive(self, lr=self.lr, max_grad_norm=self.max_grad_norm)
        positive(self, num_updates=self.num_updates, ema_every=self.ema_every)
        require(0 <= self.ema_decay < 1, f"Optimizer.ema_decay is {self.ema_decay}; it must be in [0, 1)")
