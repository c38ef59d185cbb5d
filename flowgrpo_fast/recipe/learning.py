"""Parts of a recipe: credit, loss and optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from flowgrpo_fast.checks import fraction, positive, require


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
class NFT:
    """DiffusionNFT: finished samples noised again; good ones attract, bad ones repel. arXiv 2509.16117.

    Samples come from an old policy, which follows the trained one after every training step n (from 1):
    `old = d * old + (1 - d) * new` with `d = min(old_decay_max, old_decay_rate * max(0, n - old_decay_start))`.
    """

    beta: float = 1.0  # how far the implicit policies lie from the old one
    kl_beta: float = 0.0  # weight of the mean square distance of velocities from the start weights'
    # Of the schedule's sigmas: each sample trains on that many, drawn without repetition.
    fraction: float = 0.99
    old_decay_start: int = 0
    old_decay_rate: float = 0.001
    old_decay_max: float = 0.5  # 0 = the old policy is the one before the update

    def __post_init__(self) -> None:
        """Weights are not negative, decays below 1."""
        positive(self, beta=self.beta)
        fraction(self, fraction=self.fraction)
        for name in ("kl_beta", "old_decay_start", "old_decay_rate"):
            value = getattr(self, name)
            require(value >= 0, f"NFT.{name} is {value}; it must be at least 0")
        require(
            0 <= self.old_decay_max < 1, f"NFT.old_decay_max is {self.old_decay_max}; it must be in [0, 1)"
        )


Loss: TypeAlias = ClippedRatio | NFT


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
        """Rates are positive, decays not negative, those of averages below 1."""
        positive(self, lr=self.lr, max_grad_norm=self.max_grad_norm)
        positive(self, num_updates=self.num_updates, ema_every=self.ema_every)
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"Optimizer.betas is {self.betas}; it must be two numbers in [0, 1)",
        )
        require(0 <= self.ema_decay < 1, f"Optimizer.ema_decay is {self.ema_decay}; it must be in [0, 1)")
        require(
            self.weight_decay >= 0, f"Optimizer.weight_decay is {self.weight_decay}; it must be at least 0"
        )
