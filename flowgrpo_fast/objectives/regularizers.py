"""Penalties beside a policy gradient, on the statistics that its surrogate measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from flowgrpo_fast.checks import require
from flowgrpo_fast.objectives.objective import Requires, Stats
from flowgrpo_fast.objectives.snapshots import Frozen, SnapshotRule


class Regularizer(Protocol):
    """A weighted penalty of each edge."""

    @property
    def requires(self) -> Requires:
        """What it needs."""
        ...

    @property
    def beta(self) -> float:
        """Its weight."""
        ...

    @property
    def to(self) -> str:
        """The snapshot it measures from: the surrogate then gives `distance/<to>`, and `drift/<to>` of transitions.

        Empty = none.
        """
        ...

    def penalty(self, stats: Stats) -> Tensor:
        """`[E]` with gradient."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitionKL:
    """Flow-GRPO's KL between two policies' transitions from the same latents. arXiv 2505.05470.

        kl = drift / (2 * rate^2)      drift = mean((mean - ref_mean)^2), rate^2 = c^2 / -dt

    `rate` is the SDE's diffusion rate *without* sqrt(-dt): the authors' heuristic. `exact` divides by c^2 instead: the
    KL of the two Gaussians.
    """

    beta: float = 0.04
    to: str = "start"
    rule: SnapshotRule = field(
        default_factory=Frozen
    )  # how the weights it measures from follow the trained ones
    exact: bool = False

    def __post_init__(self) -> None:
        """A weight is not negative."""
        require(self.beta >= 0, f"TransitionKL.beta is {self.beta}; it must be at least 0")

    @property
    def requires(self) -> Requires:
        """The snapshot it names."""
        return Requires(log_probs=True, snapshots={self.to: self.rule})

    def penalty(self, stats: Stats) -> Tensor:
        """`[E]` fp32; gradient flows through the drift."""
        variance = stats["std"].square()
        drift = stats[f"drift/{self.to}"]
        return drift / (2 * variance) if self.exact else drift * stats["interval"] / (2 * variance)


@dataclass(frozen=True, slots=True, kw_only=True)
class VelocityKL:
    """The mean square distance of velocities from a snapshot's."""

    beta: float = 1e-4
    to: str = "start"
    rule: SnapshotRule = field(
        default_factory=Frozen
    )  # how the weights it measures from follow the trained ones

    def __post_init__(self) -> None:
        """A weight is not negative."""
        require(self.beta >= 0, f"VelocityKL.beta is {self.beta}; it must be at least 0")

    @property
    def requires(self) -> Requires:
        """The snapshot it names."""
        return Requires(snapshots={self.to: self.rule})

    def penalty(self, stats: Stats) -> Tensor:
        """`[E]` fp32; gradient flows through the distance."""
        return stats[f"distance/{self.to}"]
