"""Trust regions: how far a ratio may move before it stops paying."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flowgrpo_fast.checks import positive, require


class Trusted(NamedTuple):
    """Per edge `[E]`."""

    loss: Tensor  # with gradient
    ratio: Tensor  # detached
    clipped: Tensor  # 1 where the bound is active


class Trust(Protocol):
    """A bound on the importance ratio."""

    @property
    def range(self) -> float:
        """How far off 1 a first ratio may be before a run is refused; see `training.self_test`."""
        ...

    def __call__(self, log_ratio: Tensor, advantages: Tensor) -> Trusted:
        """The loss of edges `[E]` (or `[E, *region]`); gradient flows through `log_ratio`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """PPO's: `max(-A r, -A clip(r, 1 - range, 1 + upper))`. arXiv 1707.06347 eq. 7."""

    range: float = 1e-4
    upper: float = 0.0  # how far above 1; 0 = as far as below

    def __post_init__(self) -> None:
        """A clip range is positive."""
        positive(self, range=self.range)
        require(self.upper >= 0, f"Clip.upper is {self.upper}; it must be at least 0")

    def __call__(self, log_ratio: Tensor, advantages: Tensor) -> Trusted:
        """As of `Trust`."""
        ratio = torch.exp(log_ratio)
        plain = -advantages * ratio
        bounded = -advantages * ratio.clamp(1 - self.range, 1 + (self.upper or self.range))
        return Trusted(torch.maximum(plain, bounded), ratio.detach(), (bounded > plain).float().detach())
