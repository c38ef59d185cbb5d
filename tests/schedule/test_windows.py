from __future__ import annotations

import itertools
import math

import pytest

from flowgrpo_fast.schedule.windows import (
    AllSteps,
    Deterministic,
    EarlySteps,
    FractionOfSteps,
    FrozenWindow,
    RandomPair,
    RandomWindow,
    SlidingWindow,
)


def starts(window, num_steps: int, iterations: int, seed: int = 0) -> list[int]:
    return [window.steps(num_steps, i, seed).stochastic[0] for i in range(iterations)]


def test_all_and_fraction_leave_the_last_step_deterministic() -> None:
    assert AllSteps().steps(10, 3, 0).stochastic == tuple(range(9))
    assert AllSteps().steps(10, 3, 0).num_trained == 9
    some = FractionOfSteps(fraction=0.6).steps(16, 0, 0)
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
    assert [window.start_at(i, 6) for i in range(len(expected))] == expected


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
    assert {FrozenWindow(size=3, start=2).steps(10, i, 0).stochastic for i in range(50)} == {(2, 3, 4)}


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
        window.steps(10, 0, 0)


def test_deterministic_has_no_step() -> None:
    assert Deterministic().steps(10, 3, 0) == ((), 0, None)
    assert Deterministic().steps(10, 3, 0).kept == ()


def test_early_steps_are_trained_and_all_but_the_last_are_stochastic() -> None:
    found = EarlySteps(size=3).steps(10, 7, 0)
    assert found.stochastic == tuple(range(9))
    assert found.kept == (0, 1, 2)
    assert found.num_trained == 3


def test_a_random_pair_is_uniform_over_pairs_reproducible_and_ordered() -> None:
    window = RandomPair(low=1, high=6)
    drawn = [window.steps(10, i, 0).kept for i in range(4000)]
    assert drawn == [window.steps(10, i, 0).kept for i in range(4000)]
    assert drawn != [window.steps(10, i, 1).kept for i in range(4000)]
    assert all(window.steps(10, i, 0).stochastic == () for i in range(20))
    assert all(window.steps(10, i, 0).num_trained == 2 for i in range(20))
    pairs = list(itertools.combinations(range(1, 6), 2))
    counts = [drawn.count(pair) for pair in pairs]
    assert sum(counts) == 4000  # none out of order, none outside
    assert all(310 < count < 490 for count in counts)  # 400 expected, standard deviation 19
    assert (
        max(pair[1] for pair in (RandomPair().steps(5, i, 0).kept for i in range(200))) == 4
    )  # the last step too


def test_the_window_of_flow_grpo_fast_starts_at_0_to_8_and_is_cut_before_the_last_step() -> None:
    found = [RandomWindow(size=2, low=0, high=10).steps(10, i, 0) for i in range(500)]
    assert {window.stochastic for window in found} == {(0, 1), *((i, i + 1) for i in range(1, 8)), (8,)}
    assert all(window.num_trained == len(window.stochastic) for window in found)
    assert set(starts(RandomWindow(size=2, low=0, high=7), 10, 500)) == set(range(6))  # the code of 2025-09
    assert set(starts(RandomWindow(size=4, low=0, high=23), 25, 900)) == set(range(20))  # MixGRPO's random


def published_starts(pace: str, every: int, iterations: int, num_steps: int = 25) -> list[int]:
    """MixGRPO's state machine, in its own words: a counter, and a move when it is full."""
    start, count, end, found = 0, 0, num_steps - 2, []
    for _ in range(iterations):
        found.append(start)
        count += 1
        progress = start / end
        least = max(1, every // 4)
        rest = {
            "progressive": every,
            "decay": max(least, int(every * (1 - progress) + least * progress)),
            "exp_decay": math.ceil(every * math.exp(-0.1 * max(0, start - 13))),
        }[pace]
        if count >= rest:
            count, start = 0, 0 if start + 1 > end - 1 else start + 1
    return found


@pytest.mark.parametrize("pace", ["progressive", "decay", "exp_decay"])
def test_a_cut_window_is_mix_grpos(pace: str) -> None:
    window = SlidingWindow(size=4, every=25, every_min=6, pace=pace, cut=True)
    found = [window.steps(25, i, 0).stochastic for i in range(700)]
    wanted = published_starts(pace, 25, 700)
    assert found == [tuple(range(start, min(start + 4, 23))) for start in wanted]
    assert max(wanted) == 22


WINDOWS = [
    RandomWindow(size=2, low=0, high=8),
    SlidingWindow(size=4, every=2, cut=True),
    Deterministic(),
    RandomPair(),
    AllSteps(),
    EarlySteps(size=3),
    FractionOfSteps(),
    RandomWindow(size=2),
    RandomWindow(size=3, low=1, high=6),
    FrozenWindow(size=3, start=2),
    SlidingWindow(size=3, every=2),
    SlidingWindow(size=2, every=2, stride=3),
    SlidingWindow(size=2, every=1, stride=3, roll_back=False),
    SlidingWindow(size=4, every=5, pace="decay"),
    SlidingWindow(size=4, every=5, pace="exp_decay", decay_start=1),
]


@pytest.mark.parametrize("num_steps", [8, 11])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_the_bounds_over_all_iterations_are_those_that_occur(window, num_steps: int) -> None:
    """`latest_start` and `earliest_end` against every iteration that matters."""
    found = [window.steps(num_steps, i, 0).stochastic for i in range(300)]
    assert all(steps == tuple(range(steps[0], steps[-1] + 1)) for steps in found if steps)
    assert all(steps[0] >= 0 and steps[-1] <= num_steps - 2 for steps in found if steps)
    assert max((steps[0] if steps else num_steps) for steps in found) <= window.latest_start(num_steps)
    assert min((steps[-1] + 1 if steps else 0) for steps in found) >= window.earliest_end(num_steps)
    if not (isinstance(window, SlidingWindow) and window.stride > 1):  # its last start may be no multiple
        assert max((steps[0] if steps else num_steps) for steps in found) == window.latest_start(num_steps)
        assert min((steps[-1] + 1 if steps else 0) for steps in found) == window.earliest_end(num_steps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomPair(low=-1), "RandomPair.low is -1; it must be at least 0"),
        (lambda: RandomPair(low=4, high=5), r"RandomPair.high is 5; it must be at least low \+ 2 = 6"),
        (
            lambda: RandomPair(low=7).steps(8, 0, 0),
            r"RandomPair\(low=7, high=None\) .* two of the 8 steps .*; lower RandomPair.low or raise",
        ),
        (
            lambda: RandomPair(low=0, high=9).steps(8, 0, 0),
            r"RandomPair\(low=0, high=9\) .* the 8 steps .*; lower RandomPair.high",
        ),
        (lambda: EarlySteps(size=0), "EarlySteps.size is 0; it must be above 0"),
        (lambda: EarlySteps(size=8).steps(8, 0, 0), r"EarlySteps\(size=8\) reaches step 7, outside"),
        (lambda: FractionOfSteps(fraction=0), r"FractionOfSteps.fraction is 0; it must be in \(0, 1\]"),
        (lambda: RandomWindow(size=0), "RandomWindow.size is 0; it must be above 0"),
        (lambda: RandomWindow(low=-1), "RandomWindow.low is -1; it must be at least 0"),
        (
            lambda: RandomWindow(size=3, low=1, high=3),
            r"RandomWindow.high is 3; it must be at least low \+ size = 4",
        ),
        (lambda: FrozenWindow(size=0), "FrozenWindow.size is 0; it must be above 0"),
        (lambda: FrozenWindow(start=-1), "FrozenWindow.start is -1; it must be at least 0"),
        (lambda: SlidingWindow(every=0), "SlidingWindow.every is 0; it must be above 0"),
        (lambda: SlidingWindow(pace="slow"), "SlidingWindow.pace is 'slow'; it must be 'progressive'"),
    ],
)
def test_refusals_name_value_and_remedy(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
