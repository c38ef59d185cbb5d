from __future__ import annotations

import math

import pytest
from flowgrpo_fast.sampling.windows import sliding_start, window_steps

from flowgrpo_fast.recipe import (
    AllSteps,
    FractionOfSteps,
    FrozenWindow,
    RandomWindow,
    SlidingWindow,
)


def starts(window, num_steps: int, iterations: int, seed: int = 0) -> list[int]:
    return [window_steps(window, num_steps, i, seed).stochastic[0] for i in range(iterations)]


def test_all_and_fraction_leave_the_last_step_deterministic() -> None:
    assert window_steps(AllSteps(), 10, 3).stochastic == tuple(range(9))
    assert window_steps(AllSteps(), 10, 3).num_trained == 9
    some = window_steps(FractionOfSteps(fraction=0.6), 16, 0)
    assert some.stochastic == tuple(range(15))
    assert some.num_trained == 9  # DanceGRPO's 16 steps: floor(0.6 * 15)


def test_progressive_rests_moves_and_rolls_back() -> None:
    window = SlidingWindow(size=4, every=3, stride=2)
    assert (
        starts(window, 10, 15) == [0] * 3 + [2] * 3 + [4] * 3 + [0] * 3 + [2] * 3
    )  # 6 does not fit: 6..9 is last
    clamped = SlidingWindow(size=4, every=3, stride=2, roll_back=False)
    assert starts(clamped, 10, 15) == [0] * 3 + [2] * 3 + [4] * 3 + [5] * 6


def test_decay_rests_shorter_and_shorter() -> None:
    window = SlidingWindow(size=2, every=6, every_min=2, pace="decay")
    rests = [max(2, int(6 * (1 - at / 5) + 2 * at / 5)) for at in range(6)]
    expected = [start for start, rest in enumerate(rests) for _ in range(rest)]
    assert starts(window, 8, len(expected)) == expected
    assert starts(window, 8, len(expected) + 1)[-1] == 0


def test_exp_decay_has_a_threshold() -> None:
    window = SlidingWindow(size=1, every=10, pace="exp_decay", decay_start=2, decay_rate=0.5)
    rests = [math.ceil(10 * math.exp(-0.5 * max(0, at - 2))) for at in range(7)]
    expected = [start for start, rest in enumerate(rests) for _ in range(rest)]
    assert [sliding_start(window, 6, i) for i in range(len(expected))] == expected


def test_random_window_is_uniform_reproducible_and_inside() -> None:
    window = RandomWindow(size=2, low=1, high=6)
    drawn = starts(window, 10, 2000)
    assert drawn == starts(window, 10, 2000)
    assert drawn != starts(window, 10, 2000, seed=1)
    counts = [drawn.count(start) for start in range(1, 5)]
    assert sum(counts) == 2000
    assert all(400 < count < 600 for count in counts)
    assert max(starts(RandomWindow(size=3), 10, 500)) == 6  # 6, 7, 8; step 9 is the last


def test_frozen_never_moves() -> None:
    assert {window_steps(FrozenWindow(size=3, start=2), 10, i).stochastic for i in range(50)} == {(2, 3, 4)}


@pytest.mark.parametrize(
    "window",
    [
        FrozenWindow(size=4, start=6),
        RandomWindow(size=10),
        RandomWindow(size=2, low=0, high=12),
        SlidingWindow(size=10),
    ],
)
def test_a_window_outside_the_schedule_is_refused(window) -> None:
    with pytest.raises(ValueError, match="outside the schedule: with 10 steps the last stochastic one is 8"):
        window_steps(window, 10, 0)
