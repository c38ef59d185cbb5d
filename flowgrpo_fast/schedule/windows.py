"""Which steps are stochastic: a pure function of the iteration, so that a resumed run goes on where it was.

Every rank draws the same window: it depends on (seed, iteration) only. The last step ends at sigma = 0 and is never
stochastic, so of T steps `usable = T - 1` may be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from flowgrpo_fast.checks import fraction, one_of, positive, require
from flowgrpo_fast.schedule.sigmas import Array


class WindowSteps(NamedTuple):
    """The steps of one iteration that are stochastic, and those that are kept to train on."""

    stochastic: tuple[int, ...]
    num_trained: int  # of the kept ones, how many each sample trains on
    only: tuple[int, ...] | None = None  # kept, where these are others than the stochastic ones

    @property
    def kept(self) -> tuple[int, ...]:
        """All that is stored."""
        return self.stochastic if self.only is None else self.only


class Window(Protocol):
    """Where noise enters."""

    def steps(self, num_steps: int, iteration: int, seed: int) -> WindowSteps:
        """The stochastic steps of one iteration of a schedule of `num_steps`.

        Raises:
            ValueError: the window does not fit the schedule.
        """
        ...

    def latest_start(self, num_steps: int) -> int:
        """The last step at which it may begin, over all iterations; `num_steps` for one without steps."""
        ...

    def earliest_end(self, num_steps: int) -> int:
        """The least step at which it may be over, over all iterations."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Deterministic:
    """No step is stochastic: the solver walks the ODE from start to end. For objectives without a log-prob."""

    def steps(self, num_steps: int, iteration: int, seed: int) -> WindowSteps:
        """As of `Window`."""
        return WindowSteps((), 0)

    def latest_start(self, num_steps: int) -> int:
        """As of `Window`."""
        return num_steps

    def earliest_end(self, num_steps: int) -> int:
        """As of `Window`."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomPair:
    """No step is stochastic; the states before two steps, drawn anew for each rollout, are kept (LeapAlign)."""

    low: int = 0
    high: int | None = None  # one past the last step that may be drawn; None = the end of the schedule

    def __post_init__(self) -> None:
        """Room for two."""
        require(self.low >= 0, f"RandomPair.low is {self.low}; it must be at least 0")
        require(
            self.high is None or self.high - self.low >= 2,
            f"RandomPair.high is {self.high}; it must be at least low + 2 = {self.low + 2}",
        )

    def steps(self, num_steps: int, iteration: int, seed: int) -> WindowSteps:
        """As of `Window`; all pairs are equally likely."""
        high = num_steps if self.high is None else self.high
        require(
            high <= num_steps,
            f"RandomPair(low={self.low}, high={self.high}) reaches past the {num_steps} steps of the schedule; lower "
            "RandomPair.high, or raise num_inference_steps",
        )
        require(
            self.low + 2 <= high,
            f"RandomPair(low={self.low}, high={self.high}) leaves no two of the {num_steps} steps to draw from; lower "
            "RandomPair.low or raise num_inference_steps",
        )
        generator = np.random.default_rng([seed, iteration, 0x706169])
        first, second = sorted(generator.choice(np.arange(self.low, high), size=2, replace=False).tolist())
        return WindowSteps((), 2, (first, second))

    def latest_start(self, num_steps: int) -> int:
        """As of `Window`."""
        return num_steps

    def earliest_end(self, num_steps: int) -> int:
        """As of `Window`."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AllSteps:
    """Every step but the last is stochastic and trained (Flow-GRPO)."""

    def steps(self, num_steps: int, iteration: int, seed: int) -> WindowSteps:
        """As of `Window`."""
        return WindowSteps(tuple(range(num_steps - 1)), num_steps - 1)

    def latest_start(self, num_steps: int) -> int:
        """As of `Window`."""
        return 0

    def earliest_end(self, num_steps: int) -> int:
        """As of `Window`."""
        return num_steps - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlySteps:
    """Every step but the last is stochastic; the first `size` of them are trained (OP-GRPO)."""

    size: int = 6

    def __post_init__(self) -> None:
        """At least one."""
        positive(self, size=self.size)

    def steps(self, num_steps: int, iteration: int, seed: int) -> WindowSteps:
        """As of `Window`."""
        _check_fit(f"EarlySteps(size={self.size})", self.size, num_steps)
        return WindowSteps(tuple(range(num_steps - 1)), self.size, tuple(range(self.size)))

    def latest_start(self, num_steps: int) -> int:
        """As of `Window`."""
        return 0

    def earliest_end(self, num_steps: int) -> int:
        """As of `Window`."""
        return num_steps - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FractionOfSteps:
    """Every step but the last is stochastic; each sample trains a random fraction of them (DanceGRPO)."""

    fraction: float = 0.6

    def __post_init__(self) -> None:
        """A share of the steps."""
        fraction(self, fraction=self.fraction)

    def steps(self, num_steps: int, iteration: int, seed: int) -> WindowSteps:
        """As of `Window`; which of them a sample trains on is drawn for each, see `Choices`."""
        usable = num_steps - 1
        return WindowSteps(tuple(range(usable)), max(1, int(self.fraction * usable)))

    def latest_start(self, num_steps: int) -> int:
        """As of `Window`."""
        return 0

    def earliest_end(self, num_steps: int) -> int:
        """As of `Window`."""
        return num_steps - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomWindow:
    """`size` consecutive stochastic steps, start drawn anew for each rollout from [low, high - size].

    `high` may be the schedule's length, as Flow-GRPO configures it: a window that then reaches the last step, which is
    never stochastic here, is cut before it.
    """

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

    def steps(self, num_steps: int, iteration: int, seed: int) -> WindowSteps:
        """As of `Window`."""
        high = num_steps - 1 if self.high is None else self.high
        what = f"RandomWindow(size={self.size}, low={self.low}, high={self.high})"
        _check_fit(
            what,
            max(min(high, num_steps - 1) if high <= num_steps else high, self.low + self.size),
            num_steps,
        )
        generator = np.random.default_rng([seed, iteration, 0x77696E])
        start = int(generator.integers(self.low, self.latest_start(num_steps), endpoint=True))
        return _cut(start, self.size, num_steps - 1)

    def latest_start(self, num_steps: int) -> int:
        """As of `Window`; a cut window keeps at least one step."""
        return min((num_steps - 1 if self.high is None else self.high) - self.size, num_steps - 2)

    def earliest_end(self, num_steps: int) -> int:
        """As of `Window`."""
        return self.low + self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class GeometricWindow:
    """`size` consecutive stochastic steps whose start is drawn anew for each rollout, early ones more often (TreeGRPO).

    `Pr[start = i] = (1 - ratio) ratio^i / (1 - ratio^n)` for the n = T - size starts that leave the last step alone.
    """

    size: int = 3
    ratio: float = 0.5

    def __post_init__(self) -> None:
        """A geometric law that falls."""
        positive(self, size=self.size)
        require(0 < self.ratio < 1, f"GeometricWindow.ratio is {self.ratio}; it must be between 0 and 1")

    def probabilities(self, num_steps: int) -> Array:
        """`[T - size]`, of each start."""
        num_starts = num_steps - self.size
        weights = np.power(self.ratio, np.arange(num_starts), dtype=np.float64)
        return np.asarray((1 - self.ratio) * weights / (1 - self.ratio**num_starts))

    def steps(self, num_steps: int, iteration: int, seed: int) -> WindowSteps:
        """As of `Window`."""
        _check_fit(f"GeometricWindow(size={self.size})", self.size, num_steps)
        generator = np.random.default_rng([seed, iteration, 0x67656F])
        start = int(generator.choice(num_steps - self.size, p=self.probabilities(num_steps)))
        return WindowSteps(tuple(range(start, start + self.size)), self.size)

    def latest_start(self, num_steps: int) -> int:
        """As of `Window`."""
        return num_steps - 1 - self.size

    def earliest_end(self, num_steps: int) -> int:
        """As of `Window`."""
        return self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenWindow:
    """The same `size` consecutive stochastic steps in every iteration."""

    size: int = 4
    start: int = 0

    def __post_init__(self) -> None:
        """Indices count from 0."""
        positive(self, size=self.size)
        require(self.start >= 0, f"FrozenWindow.start is {self.start}; it must be at least 0")

    def steps(self, num_steps: int, iteration: int, seed: int) -> WindowSteps:
        """As of `Window`."""
        end = self.start + self.size
        _check_fit(f"FrozenWindow(start={self.start}, size={self.size})", end, num_steps)
        return WindowSteps(tuple(range(self.start, end)), self.size)

    def latest_start(self, num_steps: int) -> int:
        """As of `Window`."""
        return self.start

    def earliest_end(self, num_steps: int) -> int:
        """As of `Window`."""
        return self.start + self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidingWindow:
    """MixGRPO's window: `size` steps, moved by `stride` after some iterations. arXiv 2507.21802.

    How long it rests at start l: `progressive`: `every` iterations; `decay`: from `every` at l = 0 linearly
    to `every_min` at the end; `exp_decay`: ceil(every * exp(-decay_rate * max(0, l - decay_start))).

    `cut` is the authors' code: the window starts at up to T - 3 and what of it lies past T - 3 is cut off; `decay` then
    divides l by T - 2. Without it the window is always whole and reaches T - 2.
    """

    size: int = 4
    every: int = 25
    stride: int = 1
    pace: Literal["progressive", "decay", "exp_decay"] = "progressive"
    roll_back: bool = True  # past the end: start again at 0, or stay at the end
    every_min: int = 1
    decay_rate: float = 0.1
    decay_start: int = 13
    cut: bool = False

    def __post_init__(self) -> None:
        """All counts are positive."""
        positive(self, size=self.size, every=self.every, stride=self.stride, every_min=self.every_min)
        one_of(self, ("progressive", "decay", "exp_decay"), pace=self.pace)

    def steps(self, num_steps: int, iteration: int, seed: int) -> WindowSteps:
        """As of `Window`."""
        _check_fit(f"SlidingWindow(size={self.size})", self.size + self.cut, num_steps)
        start = self.start_at(iteration, self.latest_start(num_steps))
        return _cut(start, self.size, num_steps - 1 - self.cut)

    def start_at(self, iteration: int, last_start: int) -> int:
        """Where the window starts at `iteration`, `last_start` being the last start that fits."""
        start, left = 0, iteration
        while left >= (rest := self._rest(start, last_start)):
            left -= rest
            start += self.stride
            if start > last_start:
                if not self.roll_back:
                    return last_start
                start = 0
        return start

    def _rest(self, start: int, last_start: int) -> int:
        """Iterations the window stays at `start`."""
        if self.pace == "decay":
            whole = last_start + self.cut
            share = start / whole if whole else 0.0
            return max(self.every_min, int(self.every * (1 - share) + self.every_min * share))
        if self.pace == "exp_decay":
            return math.ceil(self.every * math.exp(-self.decay_rate * max(0, start - self.decay_start)))
        return self.every

    def latest_start(self, num_steps: int) -> int:
        """As of `Window`."""
        return num_steps - 3 if self.cut else num_steps - 1 - self.size

    def earliest_end(self, num_steps: int) -> int:
        """As of `Window`."""
        return self.size


def _cut(start: int, size: int, end: int) -> WindowSteps:
    """The window from `start` on, as far as it lies before `end`; all of it is trained."""
    steps = tuple(range(start, min(start + size, end)))
    return WindowSteps(steps, len(steps))


def _check_fit(window: str, end: int, num_steps: int) -> None:
    if end > num_steps - 1:
        raise ValueError(
            f"{window} reaches step {end - 1}, outside the schedule: with {num_steps} steps the last "
            f"stochastic one is {num_steps - 2}; shrink or move the window, or raise num_inference_steps"
        )
