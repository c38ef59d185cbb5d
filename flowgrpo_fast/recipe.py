"""A recipe: one algorithm of the literature as data. Orthogonal frozen parts, validated on construction.

A part says *what*; the rooms below say *how* (`sampling.windows` turns a window into step indices, ...).
Paper numbers live in `recipes.py`; this file holds no algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _positive(owner: object, **values: float) -> None:
    for name, value in values.items():
        _require(value > 0, f"{type(owner).__name__}.{name} is {value}; it must be above 0")


def _fraction(owner: object, **values: float) -> None:
    for name, value in values.items():
        _require(0 < value <= 1, f"{type(owner).__name__}.{name} is {value}; it must be in (0, 1]")


# -------------------------------------------------------------------------------------------- sigmas


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicShift:
    """Shift that grows with the number of image tokens, as FLUX does: exp(mu), mu linear in the tokens."""

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_seq_len: int = 256
    max_seq_len: int = 4096

    def __post_init__(self) -> None:
        """Two distinct lengths define the line."""
        _require(
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

    def __post_init__(self) -> None:
        """At least two steps: one alone leaves nothing between noise and sample."""
        _require(
            self.num_inference_steps >= 2,
            f"Sigmas.num_inference_steps is {self.num_inference_steps}; it must be at least 2",
        )
        if not isinstance(self.shift, DynamicShift):
            _positive(self, shift=self.shift)
        _require(
            self.spacing in ("linear", "diffusers"),
            f"Sigmas.spacing is {self.spacing!r}; it must be 'linear' or 'diffusers'",
        )


# ------------------------------------------------------------------------------------------ dynamics


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSDE:
    """Flow-GRPO's SDE: noise rate eta * sqrt(sigma / (1 - sigma)). arXiv 2505.05470."""

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        """No noise, no log-prob."""
        _positive(self, noise_level=self.noise_level)


@dataclass(frozen=True, slots=True, kw_only=True)
class DanceSDE:
    """DanceGRPO's SDE: constant noise rate eta. arXiv 2505.07818."""

    noise_level: float = 0.3

    def __post_init__(self) -> None:
        """No noise, no log-prob."""
        _positive(self, noise_level=self.noise_level)


@dataclass(frozen=True, slots=True, kw_only=True)
class CPS:
    """Coefficient-preserving sampling: std sigma_next * sin(eta pi / 2). arXiv 2509.05952.

    Its score leaves the variance out: log_prob = -mean((next_latents - mean)^2).
    """

    noise_level: float = 0.8

    def __post_init__(self) -> None:
        """The angle stays in the first quadrant."""
        _fraction(self, noise_level=self.noise_level)


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
        _fraction(self, keep=self.keep)
        _require(
            self.variant in ("midpoint", "heun"),
            f"DPMSolver2M.variant is {self.variant!r}; it must be 'midpoint' or 'heun'",
        )


# ------------------------------------------------------------------------------------------- windows


@dataclass(frozen=True, slots=True, kw_only=True)
class AllSteps:
    """Every step but the last is stochastic and trained (Flow-GRPO)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FractionOfSteps:
    """Every step but the last is stochastic; each sample trains a random fraction of them (DanceGRPO)."""

    fraction: float = 0.6

    def __post_init__(self) -> None:
        """At least one step is left by the caller's schedule; see `sampling.windows`."""
        _fraction(self, fraction=self.fraction)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomWindow:
    """`size` consecutive stochastic steps, start drawn anew for each rollout from [low, high - size]."""

    size: int = 2
    low: int = 0
    high: int | None = None  # one past the last usable step; None = the step before the last

    def __post_init__(self) -> None:
        """The range must hold the window."""
        _positive(self, size=self.size)
        _require(self.low >= 0, f"RandomWindow.low is {self.low}; it must be at least 0")
        _require(
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
        _positive(self, size=self.size)
        _require(self.start >= 0, f"FrozenWindow.start is {self.start}; it must be at least 0")


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
        _positive(self, size=self.size, every=self.every, stride=self.stride, every_min=self.every_min)
        _require(
            self.pace in ("progressive", "decay", "exp_decay"),
            f"SlidingWindow.pace is {self.pace!r}; it must be 'progressive', 'decay' or 'exp_decay'",
        )


# --------------------------------------------------------------------------- credit, loss, optimiser


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
        _require(self.std in ("group", "batch"), f"Credit.std is {self.std!r}; it must be 'group' or 'batch'")
        _positive(self, clip=self.clip, eps=self.eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedRatio:
    """PPO's clipped importance ratio on the mean log-prob, with an optional KL to the start weights."""

    clip_range: float = 1e-4
    kl_beta: float = 0.0

    def __post_init__(self) -> None:
        """A clip range is positive, a KL weight not negative."""
        _positive(self, clip_range=self.clip_range)
        _require(self.kl_beta >= 0, f"ClippedRatio.kl_beta is {self.kl_beta}; it must be at least 0")


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
        _positive(self, lr=self.lr, max_grad_norm=self.max_grad_norm)
        _positive(self, num_updates=self.num_updates, ema_every=self.ema_every)
        _require(0 <= self.ema_decay < 1, f"Optimizer.ema_decay is {self.ema_decay}; it must be in [0, 1)")


# ---------------------------------------------------------------------------------------------- task


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTerm:
    """One reward: a function `package.module:function (images, prompts) -> [B]` and its weight."""

    function: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is trained, on which prompts, by which rewards, and who judges it."""

    model: str = "digits"  # a module of flowgrpo_fast.models, or package.module:function
    prompts: str = ""  # a text file, one prompt a line; empty = the model's own
    rewards: tuple[RewardTerm, ...] = (
        RewardTerm(function="flowgrpo_fast.rewards.rules:digit_log_prob"),
        RewardTerm(function="flowgrpo_fast.rewards.rules:ink_contrast", weight=0.2),
    )
    judge: str = "flowgrpo_fast.rewards.judges:DigitJudge"  # empty = none
    num_eval_samples: int = 500
    eval_every: int = 10

    def __post_init__(self) -> None:
        """There is something to learn from."""
        _require(len(self.rewards) > 0, "Task.rewards is empty; name at least one reward function")
        names = [term.function.rpartition(":")[2] for term in self.rewards]
        for name in names:
            _require(
                names.count(name) == 1,
                f"Task.rewards names {name!r} twice; metrics go by that name, so give each its own",
            )
        _positive(self, num_eval_samples=self.num_eval_samples, eval_every=self.eval_every)


# -------------------------------------------------------------------------------------------- recipe

Dynamics: TypeAlias = FlowSDE | DanceSDE | CPS
Solver: TypeAlias = Euler | DPMSolver2M
Window: TypeAlias = AllSteps | FractionOfSteps | RandomWindow | FrozenWindow | SlidingWindow


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything a run depends on, besides its code."""

    name: str
    sigmas: Sigmas = field(default_factory=Sigmas)
    dynamics: Dynamics = field(default_factory=FlowSDE)
    window: Window = field(default_factory=AllSteps)
    solver: Solver = field(default_factory=Euler)  # steps after the window; before it Euler
    share_start_noise: bool = False  # one start noise for a group
    guidance_scale: float = 1.0
    group_size: int = 24
    num_prompts: int = 48  # per training step
    credit: Credit = field(default_factory=Credit)
    loss: ClippedRatio = field(default_factory=ClippedRatio)
    optimizer: Optimizer = field(default_factory=Optimizer)
    precision: Literal["fp32", "bf16"] = "fp32"  # of the network's matrix products
    rows_per_forward: int = 0  # samples per forward in rollout and replay; 0 = all of one update's
    replay_rows: int = 0  # samples per forward of the replay; 0 = as in the rollout: first ratio exactly 1
    max_ratio_error: float = 0.0  # of the self-test before the first update; 0 = the loss's clip_range
    num_steps: int = 300
    seed: int = 0
    task: Task = field(default_factory=Task)

    def __post_init__(self) -> None:
        """Whatever the fields alone can break; the rest is checked where the schedule is resolved."""
        _require(
            self.group_size >= 2,
            f"Recipe.group_size is {self.group_size}; an advantage needs at least 2 samples per prompt",
        )
        _positive(self, num_prompts=self.num_prompts, num_steps=self.num_steps)
        _require(
            self.num_prompts * self.group_size % self.optimizer.num_updates == 0,
            f"Optimizer.num_updates is {self.optimizer.num_updates}; it must divide "
            f"num_prompts * group_size = {self.num_prompts * self.group_size}",
        )
        _require(
            self.precision in ("fp32", "bf16"),
            f"Recipe.precision is {self.precision!r}; it must be 'fp32' or 'bf16'",
        )
        for name in ("rows_per_forward", "replay_rows"):
            rows = getattr(self, name)
            _require(
                rows >= 0 and self.rows_per_update % (rows or 1) == 0,
                f"Recipe.{name} is {rows}; it must divide {self.rows_per_update}, the samples of one update",
            )

    @property
    def rows_per_update(self) -> int:
        """Samples behind one optimiser step."""
        return self.num_prompts * self.group_size // self.optimizer.num_updates

    @property
    def rollout_rows(self) -> int:
        """Samples per forward of the rollout."""
        return self.rows_per_forward or self.rows_per_update
