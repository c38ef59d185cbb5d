"""Which steps are stochastic: a pure function of the iteration, so that a resumed run goes on where it was.

Every rank draws the same window: it depends on (seed, iteration) only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from flowgrpo_fast.recipe import (
    AllSteps,
    Deterministic,
    FractionOfSteps,
    FrozenWindow,
    RandomWindow,
    SlidingWindow,
    Window,
)


@dataclass(frozen=True, slots=True)
class WindowSteps:
    """The stochastic steps of one iteration, and on how many of them each sample trains."""

    stochastic: tuple[int, ...]
    num_trained: int


def window_steps(window: Window, num_steps: int, iteration: int, seed: int = 0) -> WindowSteps:
    """Resolves a window for one iteration of a schedule of `num_steps`.

    The last step ends at sigma = 0 and is never stochastic.

    Raises:
        ValueError: the window does not fit the schedule.
    """
    usable = num_steps - 1
    match window:
        case Deterministic():
            return WindowSteps((), 0)
        case AllSteps():
            return WindowSteps(tuple(range(usable)), usable)
        case FractionOfSteps():
            return WindowSteps(tuple(range(usable)), max(1, int(window.fraction * usable)))
        case FrozenWindow():
            start, size = window.start, window.size
            _check_fit(f"FrozenWindow(start={start}, size={size})", start + size, num_steps)
        case RandomWindow():
            high = usable if window.high is None else window.high
            size = window.size
            what = f"RandomWindow(size={size}, low={window.low}, high={window.high})"
            _check_fit(what, max(high, window.low + size), num_steps)
            generator = np.random.default_rng([seed, iteration, 0x77696E])
            start = int(generator.integers(window.low, high - size, endpoint=True))
        case SlidingWindow():
            size = window.size
            _check_fit(f"SlidingWindow(size={size})", size, num_steps)
            start = sliding_start(window, usable - size, iteration)
    return WindowSteps(tuple(range(start, start + size)), size)


def _check_fit(window: str, end: int, num_steps: int) -> None:
    if end > num_steps - 1:
        raise ValueError(
            f"{window} reaches step {end - 1}, outside the schedule: with {num_steps} steps the last "
            f"stochastic one is {num_steps - 2}; shrink or move the window, or raise num_inference_steps"
        )


def latest_start(window: Window, num_steps: int) -> int:
    """The last step at which the window may begin, over all iterations; `num_steps` for one without steps."""
    usable = num_steps - 1
    match window:
        case Deterministic():
            return num_steps
        case AllSteps() | FractionOfSteps():
            return 0
        case FrozenWindow():
            return window.start
        case RandomWindow():
            return (usable if window.high is None else window.high) - window.size
        case SlidingWindow():
            return usable - window.size


def earliest_end(window: Window, num_steps: int) -> int:
    """The least step at which the window may be over, over all iterations."""
    match window:
        case Deterministic():
            return 0
        case AllSteps() | FractionOfSteps():
            return num_steps - 1
        case FrozenWindow():
            return window.start + window.size
        case RandomWindow():
            return window.low + window.size
        case SlidingWindow():
            return window.size


def sliding_start(window: SlidingWindow, last_start: int, iteration: int) -> int:
    """Where MixGRPO's window starts at `iteration`, `last_start` being the last start that fits."""
    start, left = 0, iteration
    while left >= (rest := _rest(window, start, last_start)):
        left -= rest
        start += window.stride
        if start > last_start:
            if not window.roll_back:
                return last_start
            start = 0
    return start


def _rest(window: SlidingWindow, start: int, last_start: int) -> int:
    """Iterations the window stays at `start`."""
    if window.pace == "decay":
        share = start / last_start if last_start else 0.0
        return max(window.every_min, int(window.every * (1 - share) + window.every_min * share))
    if window.pace == "exp_decay":
        return math.ceil(window.every * math.exp(-window.decay_rate * max(0, start - window.decay_start)))
    return window.every
