"""When each rule moves its snapshot, and how far."""

from __future__ import annotations

import pytest

from flowgrpo_fast.objectives.objective import Requires
from flowgrpo_fast.objectives.snapshots import EMA, Frozen, Loaded, Moment, Ramp, ResetWhen


def after_update(num_updates: int) -> Moment:
    return Moment(step=0, num_updates=num_updates, ends_step=False, metrics={})


def after_step(step: int, **metrics: float) -> Moment:
    return Moment(step=step, num_updates=2 * step, ends_step=True, metrics=metrics)


MOMENTS = [after_update(n) for n in range(1, 20)] + [after_step(n, kl=1.0) for n in range(1, 20)]


@pytest.mark.parametrize("rule", [Frozen(), Loaded(path="teacher")])
def test_some_never_move(rule) -> None:
    assert all(rule.keep(moment) is None for moment in MOMENTS)
    assert not rule.moves


@pytest.mark.parametrize("every", [1, 3, 8])
def test_an_average_follows_every_few_optimiser_steps(every: int) -> None:
    rule = EMA(decay=0.75, every=every)
    assert rule.moves
    for n in range(1, 30):
        assert rule.keep(after_update(n)) == (0.75 if n % every == 0 else None)
        assert rule.keep(after_step(n)) is None


@pytest.mark.parametrize(("every", "calls", "left"), [(8, 1, 0.1396), (8, 2, 0.0195), (1, 1, 0.0)])
def test_an_average_warms_up_as_the_published_one(every: int, calls: int, left: float) -> None:
    """Flow-GRPO's: due where `every` divides n + 1, at `min((1 + n) / (10 + n), decay)`; 0.02 of the start weights are
    left after 40 updates at two calls a global step, where a constant 0.9 leaves 0.59."""
    rule = EMA(decay=0.9, every=every, warm_up=True, calls=calls)
    due, start = [], 1.0
    for n in range(1, 41):
        kept = rule.keep(after_update(n))
        assert rule.keep(after_step(n)) is None
        if kept is not None:
            due.append(n)
            assert kept == pytest.approx(min((1 + n) / (10 + n), 0.9) ** calls, rel=1e-12)
            start *= kept
    assert due == ([7, 15, 23, 31, 39] if every == 8 else list(range(1, 41)))
    assert start == pytest.approx(left, abs=1e-4)


def test_a_ramp_follows_at_the_end_of_a_step() -> None:
    rule = Ramp(start=3, rate=0.25, most=0.6)
    assert rule.moves
    assert [rule.keep(after_step(n)) for n in range(1, 9)] == [0, 0, 0, 0.25, 0.5, 0.6, 0.6, 0.6]
    assert all(rule.keep(after_update(n)) is None for n in range(1, 9))
    assert Ramp(most=0.0).keep(after_step(100)) == 0.0  # the weights before the update


def test_a_reset_waits_for_its_metric_or_its_time() -> None:
    rule = ResetWhen(metric="kl", above=0.5)
    assert rule.moves
    assert rule.keep(after_step(1, kl=0.6)) == 0.0
    assert rule.keep(after_step(1, kl=0.5)) is None
    assert rule.keep(after_step(1, other=9.0)) is None
    assert rule.keep(after_update(1)) is None
    timed = ResetWhen(metric="kl", above=0.5, every=4)
    assert [timed.keep(after_step(n, kl=0.0)) for n in range(1, 9)] == [None, None, None, 0.0] * 2
    assert timed.keep(after_step(5, kl=0.6)) == 0.0


def test_where_weights_come_from() -> None:
    assert [rule.path for rule in (Frozen(), EMA(), Ramp(), ResetWhen())] == [""] * 4
    assert Loaded(path="a/b").path == "a/b"


def test_needs_of_two_parts_join() -> None:
    both = Requires(log_probs=True, snapshots={"start": Frozen()}, signals=frozenset({"a"})).joined(
        Requires(sampled_by="old", snapshots={"old": Ramp()}, all_steps=True, signals=frozenset({"b"}))
    )
    assert both == Requires(
        log_probs=True,
        sampled_by="old",
        snapshots={"start": Frozen(), "old": Ramp()},
        all_steps=True,
        signals=frozenset({"a", "b"}),
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(decay=1.0), r"EMA.decay is 1.0; it must be in \[0, 1\)"),
        (lambda: EMA(every=0), "EMA.every is 0; it must be above 0"),
        (lambda: Ramp(start=-1), "Ramp.start is -1; it must be at least 0"),
        (lambda: Ramp(rate=-1), "Ramp.rate is -1; it must be at least 0"),
        (lambda: Ramp(most=1.0), r"Ramp.most is 1.0; it must be in \[0, 1\)"),
        (lambda: ResetWhen(every=-1), "ResetWhen.every is -1; it must be at least 0"),
        (lambda: ResetWhen(metric=""), "ResetWhen.metric is empty; name a metric"),
        (lambda: Loaded(), "Loaded.path is empty; name a checkpoint folder"),
    ],
)
def test_refusals_name_value_and_remedy(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
