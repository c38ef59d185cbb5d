"""Parts of a recipe: the noise schedule, how a step moves, and which steps are stochastic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from flowgrpo_fast.checks import fraction, positive, require


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicShift:
    """Shift that grows with the number of image tokens, as FLUX does: exp(mu), mu linear in the tokens."""

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_seq_len: int = 256
    max_seq_len: int = 4096

    def __post_init__(self) -> None:
        """Two distinct lengths define the line."""
        require(
            self.max_seq_len > self.base_seq_len > 0,
            f"DynamicShift.max_seq_len is {self.max_seq_len}; "
            f"it must be above base_seq_len = {self.base_seq_len}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sigmas:
    """The noise schedule, 1 (noise) down to 0."""

    num_inference_steps: int = 10
    shift: float | DynamicShift = 3.0
    # "linear": 1, 1 - 1/T, ..., 0 before the shift. "diffusers": SD3's grid, which ends at its sigma_min.
    spacing: Literal["linear", "diffusers"] = "linear"
    # The shifted schedule is stretched to end here before 0 (Qwen-Image: 0.02); 0 = not.
    terminal: float = 0.0

    def __post_init__(self) -> None:
        """At least two steps: one alone leaves nothing between noise and sample."""
        require(
            self.num_inference_steps >= 2,
            f"Sigmas.num_inference_steps is {self.num_inference_steps}; it must be at least 2",
        )
        if not isinstance(self.shift, DynamicShift):
            positive(self, shift=self.shift)
        require(
            self.spacing in ("linear", "diffusers"),
            f"Sigmas.spacing is {self.spacing!r}; it must be 'linear' or 'diffusers'",
        )
        require(0 <= self.terminal < 1, f"Sigmas.terminal is {self.terminal}; it must be in [0, 1)")


# ------------------------------------------------------------------------------------------ dynamics


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSDE:
    """Flow-GRPO's SDE: noise rate eta * sqrt(sigma / (1 - sigma)). arXiv 2505.05470."""

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        """No noise, no log-prob."""
        positive(self, noise_level=self.noise_level)


@dataclass(frozen=True, slots=True, kw_only=True)
class DanceSDE:
    """DanceGRPO's SDE: constant noise rate eta. arXiv 2505.07818."""

    noise_level: float = 0.3

    def __post_init__(self) -> None:
        """No noise, no log-prob."""
        positive(self, noise_level=self.noise_level)


@dataclass(frozen=True, slots=True, kw_only=True)
class CPS:
    """Coefficient-preserving sampling: std sigma_next * sin(eta pi / 2). arXiv 2509.05952.

    Its score leaves the variance out: log_prob = -mean((next_latents - mean)^2).
    """

    noise_level: float = 0.8

    def __post_init__(self) -> None:
        """The angle stays in the first quadrant."""
        fraction(self, noise_level=self.noise_level)


@dataclass(frozen=True, slots=True, kw_only=True)
class Euler:
    """First-order step of the probability-flow ODE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DPMSolver2M:
    """DPM-Solver++ 2M on x0 predictions, for the steps after the window. arXiv 2211.01095.

    `keep` is the share of those steps that is run (MixGRPO-Flash: 0.4).
    """

    keep: float = 1.0
    variant: Literal["midpoint", "heun"] = "midpoint"

    def __post_init__(self) -> None:
        """Between one step and all of them."""
        fraction(self, keep=self.keep)
        require(
            self.variant in ("midpoint", "heun"),
            f"DPMSolver2M.variant is {self.variant!r}; it must be 'midpoint' or 'heun'",
        )


# ------------------------------------------------------------------------------------------- windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Deterministic:
    """No step is stochastic: the solver walks the ODE from start to end. For losses without a log-prob."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllSteps:
    """Every step but the last is stochastic and trained (Flow-GRPO)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FractionOfSteps:
    """Every step but the last is stochastic; each sample trains a random fraction of them (DanceGRPO)."""

    fraction: float = 0.6

    def __post_init__(self) -> None:
        """At least one step is left by the caller's schedule; see `sampling.windows`."""
        fraction(self, fraction=self.fraction)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomWindow:
    """`size` consecutive stochastic steps, start drawn anew for each rollout from [low, high - size]."""

    size: int = 2
    low: int = 0
    high: int | None = None  # one past the last usable step; None = the step before the last

    def __post_init__(self) -> None:
        """The range must hold the window."""
        positive(self, size=self.size)
        require(self.low >= 0, f"RandomWindow.low is {self.low}; it must be at least 0")
        require(
            self.high is None or self.high - self.low >= self.size,
            f"RandomWindow.high is {self.high}; it must be at least low + size = {self.low + self.size}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenWindow:
    """The same `size` consecutive stochastic steps in every iteration."""

    size: int = 4
    start: int = 0

    def __post_init__(self) -> None:
        """Indices count from 0."""
        positive(self, size=self.size)
        require(self.start >= 0, f"FrozenWindow.start is {self.start}; it must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidingWindow:
    """MixGRPO's window: `size` steps, moved by `stride` after some iterations. arXiv 2507.21802.

    How long it rests at start l: `progressive`: `every` iterations; `decay`: from `every` at l = 0 linearly
    to `every_min` at the end; `exp_decay`: ceil(every * exp(-decay_rate * max(0, l - decay_start))).
    """

    size: int = 4
    every: int = 25
    stride: int = 1
    pace: Literal["progressive", "decay", "exp_decay"] = "progressive"
    roll_back: bool = True  # past the end: start again at 0, or stay at the end
    every_min: int = 1
    decay_rate: float = 0.1
    decay_start: int = 13

    def __post_init__(self) -> None:
        """All counts are positive."""
        positive(self, size=self.size, every=self.every, stride=self.stride, every_min=self.every_min)
        require(
            self.pace in ("progressive", "decay", "exp_decay"),
            f"SlidingWindow.pace is {self.pace!r}; it must be 'progressive', 'decay' or 'exp_decay'",
        )


Dynamics: TypeAlias = FlowSDE | DanceSDE | CPS
Solver: TypeAlias = Euler | DPMSolver2M
Window: TypeAlias = Deterministic | AllSteps | FractionOfSteps | RandomWindow | FrozenWindow | SlidingWindow
