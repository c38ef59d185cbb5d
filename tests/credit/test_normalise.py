"""Advantages against their definition, written out in numpy, and against recorded trainers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowgrpo_fast.credit.chain import assign
from flowgrpo_fast.credit.normalise import Normalise
from flowgrpo_fast.credit.shape import Bound, DropIdle
from flowgrpo_fast.ops import group_advantages

FULL = (Normalise(), Bound(), DropIdle())
WEIGHTS = {"a": 1.0, "b": 0.5}


@pytest.mark.parametrize(("std", "key"), [("group", "adv_group_std"), ("batch", "adv_global_std")])
def test_recorded_advantages(golden, std: str, key: str) -> None:
    rewards, ids = (torch.from_numpy(golden[k]) for k in ("adv_rewards", "adv_group_ids"))
    ours = group_advantages(rewards, ids, std=std)
    np.testing.assert_allclose(ours, golden[key], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("std", "key"), [("group", "adv_group_std"), ("batch", "adv_global_std")])
def test_the_part_gives_the_recorded_advantages(golden, scored, std: str, key: str) -> None:
    rewards, ids = (torch.from_numpy(golden[k]) for k in ("adv_rewards", "adv_group_ids"))
    credit = assign((Normalise(std=std, aggregate="sum"),), scored(rewards, ids))
    np.testing.assert_allclose(credit.advantages, golden[key], rtol=1e-6, atol=1e-7)


def test_groups_of_any_size_and_order() -> None:
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.repeat(np.arange(5), [2, 3, 7, 4, 1]))
    rewards = rng.normal(size=17)
    ours = group_advantages(torch.from_numpy(rewards), torch.from_numpy(ids), 5)
    for group in range(5):
        own = rewards[ids == group]
        np.testing.assert_allclose(ours[ids == group], (own - own.mean()) / (own.std() + 1e-4), rtol=1e-10)


def test_norm_then_sum_and_sum_then_norm(scored) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 8))
    ids = torch.arange(2).repeat_interleave(4)
    output = scored(
        torch.from_numpy(a + 0.5 * b),
        ids,
        {"a": torch.from_numpy(a), "b": torch.from_numpy(100 * b)},
        WEIGHTS,
    )

    def z(values):
        grouped = values.reshape(2, 4)
        centred = grouped - grouped.mean(1, keepdims=True)
        return (centred / (grouped.std(1, keepdims=True) + 1e-4)).ravel()

    each = assign(FULL, output).advantages
    np.testing.assert_allclose(each, z(a) + 0.5 * z(100 * b), rtol=1e-5)  # blind to a reward's scale
    summed = assign((Normalise(aggregate="sum"), Bound(), DropIdle()), output).advantages
    np.testing.assert_allclose(summed, z(a + 0.5 * b), rtol=1e-5)


def test_clip_bounds_the_advantage(scored) -> None:
    rewards = torch.zeros(100, dtype=torch.float64)
    rewards[0] = 1.0
    advantages = assign(FULL, scored(rewards, torch.zeros(100, dtype=torch.int64))).advantages
    assert advantages[0] == 5.0  # unclipped: 9.95


def written_out(part: Normalise, values: np.ndarray, ids: np.ndarray, weights: list[float]) -> np.ndarray:
    """The definition, a group and a reward at a time: `[B]`, or `[B, Q]` of "separate"."""
    columns = [values @ np.array(weights)] if part.aggregate == "sum" else list(values.T)
    scores = []
    for column in columns:
        z = np.zeros(len(column))
        for group in np.unique(ids):
            own = column[ids == group]
            std = (own if part.std == "group" else column).std(ddof=part.ddof)
            z[ids == group] = (own - own.mean()) / (std + part.eps)
        scores.append(z)
    if part.aggregate == "sum":
        return scores[0]
    weighted = np.stack(scores, 1) * np.array(weights)
    if part.aggregate == "separate":
        return weighted
    total = weighted.sum(1)
    return (total - total.mean()) / (total.std() + part.eps) if part.aggregate == "gdpo" else total


@pytest.mark.parametrize("group_size", [2, 3, 8, 24])
@pytest.mark.parametrize("eps", [1e-8, 1e-4, 0.3])
@pytest.mark.parametrize(
    "part",
    [
        Normalise(std=std, aggregate=aggregate, ddof=ddof)
        for std in ("group", "batch")
        for aggregate in ("sum", "per_objective", "gdpo", "separate")
        for ddof in (0, 1)
        if aggregate != "gdpo" or (std == "group" and ddof == 0)
    ],
    ids=lambda part: f"{part.std}-{part.aggregate}-{part.ddof}",
)
def test_every_option_is_its_definition(scored, part: Normalise, group_size: int, eps: float) -> None:
    part = Normalise(std=part.std, aggregate=part.aggregate, ddof=part.ddof, eps=eps)
    rng = np.random.default_rng(group_size)
    values = rng.normal(size=(5 * group_size, 2)) * (1.0, 30.0) + (0.0, 7.0)
    ids = np.repeat(np.arange(5), group_size)
    named = {"a": torch.from_numpy(values[:, 0]), "b": torch.from_numpy(values[:, 1])}
    total = torch.from_numpy(values @ np.array([1.0, 0.5]))
    expected = written_out(part, values, ids, [1.0, 0.5])
    output = scored(total, torch.from_numpy(ids), named, WEIGHTS)
    credit = assign((part,), output)
    assert credit.advantages.dtype == torch.float32
    np.testing.assert_allclose(credit.advantages, expected, rtol=2e-6, atol=1e-6)
    assert torch.equal(credit.weight, torch.ones(len(ids), dtype=total.dtype))
    # The path of samples without a score gives the same where all have one.
    all_valid = torch.ones(len(ids), dtype=torch.bool)
    masked = assign((part,), scored(total, torch.from_numpy(ids), named, WEIGHTS, all_valid))
    np.testing.assert_allclose(masked.advantages, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("std", ["group", "batch"])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("aggregate", ["sum", "per_objective", "gdpo", "separate"])
def test_samples_without_a_score_count_nowhere(scored, std: str, ddof: int, aggregate: str) -> None:
    """Those that have one are worth what they are without the others; the others weigh 0."""
    if aggregate == "gdpo" and (std == "batch" or ddof):
        return
    part = Normalise(std=std, aggregate=aggregate, ddof=ddof)
    rng = np.random.default_rng(2)
    values = rng.normal(size=(12, 2)) + 5
    ids = np.repeat(np.arange(3), 4)
    valid = np.array([1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1], dtype=bool)
    values[~valid] = 0.0
    expected = written_out(part, values[valid], ids[valid], [1.0, 0.5])
    credit = assign(
        (part, Bound(limit=1e3), DropIdle()),
        scored(
            torch.from_numpy(values @ np.array([1.0, 0.5])),
            torch.from_numpy(ids),
            {"a": torch.from_numpy(values[:, 0]), "b": torch.from_numpy(values[:, 1])},
            WEIGHTS,
            torch.from_numpy(valid),
        ),
    )
    np.testing.assert_allclose(credit.advantages[valid], expected, rtol=2e-6, atol=1e-6)
    assert not credit.advantages[~torch.from_numpy(valid)].any()
    assert credit.weight.tolist() == valid.astype(float).tolist()


def test_a_group_with_one_score_or_none_teaches_nothing(scored) -> None:
    rewards = torch.tensor([3.0, 0.0, 0.0, 0.0, 1.0, 2.0])
    valid = torch.tensor([True, False, False, False, True, True])
    ids = torch.arange(3).repeat_interleave(2)
    credit = assign(FULL, scored(rewards, ids, valid=valid))
    assert credit.weight.tolist() == [0, 0, 0, 0, 1, 1]
    assert torch.isfinite(credit.advantages).all()
    np.testing.assert_allclose(credit.advantages, [0, 0, 0, 0, -0.5 / 0.5001, 0.5 / 0.5001], rtol=1e-6)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.floats(-1e6, 1e6, allow_nan=False),
    eps=st.sampled_from([1e-8, 1e-4]),
    missing=st.sets(st.integers(0, 5), max_size=5),
)
def test_equal_rewards_are_dropped_whatever_their_rounding(
    scored, value: float, eps: float, missing: set
) -> None:
    rewards = torch.full((6,), value)
    valid = torch.tensor([i not in missing for i in range(6)])
    for mask in (None, valid):
        credit = assign(
            (Normalise(eps=eps), DropIdle()), scored(rewards, torch.zeros(6, dtype=torch.int64), valid=mask)
        )
        assert not credit.advantages.any()
        assert not credit.weight.any()


@pytest.mark.parametrize("drop", [True, False])
def test_groups_without_variance_are_dropped(scored, drop: bool) -> None:
    rewards = torch.tensor([0.3, 0.3, 0.3, 0.1, 0.2, 0.4])
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    chain = FULL if drop else FULL[:2]
    assert assign(chain, scored(rewards, ids)).weight.tolist() == ([0, 0, 0, 1, 1, 1] if drop else [1] * 6)


def test_advantages_of_the_middle_of_a_group_are_kept(scored) -> None:
    rewards = torch.tensor([0.0, 1.0, 2.0, 5.0, 5.0, 5.0])
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    credit = assign(FULL, scored(rewards, ids, num_groups=2))
    assert credit.advantages[1] == 0
    assert credit.weight.tolist() == [1, 1, 1, 0, 0, 0]


def test_a_group_is_alive_by_the_largest_of_its_objectives(scored) -> None:
    """`[B, Q]` advantages: one objective that differs is enough."""
    ids = torch.arange(2).repeat_interleave(3)
    objectives = {"a": torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0]), "b": torch.tensor([0.0, 1, 2, 4, 4, 4])}
    output = scored(objectives["a"], ids, objectives, WEIGHTS)
    credit = assign((Normalise(aggregate="separate"), DropIdle()), output)
    assert credit.advantages.shape == (6, 2)
    assert credit.weight.tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(("limit", "soft"), [(5.0, 0.0), (5.0, 3.0), (1.0, 0.5)])
def test_bound_cuts_then_bends(scored, limit: float, soft: float) -> None:
    values = np.linspace(-9, 9, 31)
    ids = torch.zeros(31, dtype=torch.int64)
    credit = assign((Bound(limit=limit, soft=soft),), scored(torch.from_numpy(values), ids))
    cut = np.clip(values, -limit, limit)
    np.testing.assert_allclose(credit.advantages, soft * np.tanh(cut / soft) if soft else cut, rtol=1e-12)


def test_worked_cases(methods, scored) -> None:
    """Sample standard deviations (MAR-GRPO, G2RPO) and V-GRPO's soft bound."""
    case = methods["mar_grpo_mask"]
    rewards = torch.tensor(case["inputs"]["rewards"], dtype=torch.float64)
    ids = torch.zeros(4, dtype=torch.int64)
    ours = assign((Normalise(ddof=1, eps=1e-4),), scored(rewards, ids)).advantages
    np.testing.assert_allclose(ours, case["expected"]["A"], rtol=1e-6)

    case = methods["g2rpo_granularity"]
    objectives = {
        name: torch.tensor(case["inputs"][f"rewards_stride{name}"], dtype=torch.float64) for name in "12"
    }
    output = scored(objectives["1"], torch.zeros(3, dtype=torch.int64), objectives, dict.fromkeys("12", 1.0))
    ours = assign((Normalise(ddof=1, eps=1e-8),), output).advantages
    np.testing.assert_allclose(ours, case["expected"]["A"], rtol=1e-6)

    case = methods["v_grpo"]
    named = torch.tensor(case["inputs"]["A"], dtype=torch.float64)
    output = scored(named, torch.zeros(2, dtype=torch.int64))
    ours = assign((Bound(limit=5.0, soft=case["inputs"]["eta"]),), output).advantages
    np.testing.assert_allclose(ours, case["expected"]["A_soft"], rtol=1e-12)


def test_bad_rewards(scored) -> None:
    ids = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"group_id has shape \[3\], must have \[2\]"):
        assign(FULL, scored(torch.zeros(2), ids))
    bad = torch.tensor([0.0, float("nan"), 1.0])
    with pytest.raises(ValueError, match="reward of sample 1 is nan"):
        assign(FULL, scored(bad, ids))
    objectives = {"a": torch.zeros(3), "b": torch.tensor([0.0, 1.0, float("inf")])}
    with pytest.raises(ValueError, match="reward of sample 2 is inf"):
        assign(FULL, scored(torch.zeros(3), ids, objectives, WEIGHTS))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normalise(std="all"), "Normalise.std is 'all'; it must be 'group' or 'batch'"),
        (
            lambda: Normalise(aggregate="mean"),
            "Normalise.aggregate is 'mean'; it must be 'sum', 'per_objective'",
        ),
        (lambda: Normalise(eps=0), "Normalise.eps is 0; it must be above 0"),
        (lambda: Normalise(ddof=2), "Normalise.ddof is 2; it must be 0 or 1"),
        (lambda: Normalise(ddof=1, aggregate="gdpo"), "Normalise.ddof is 1, which 'gdpo' does not know"),
        (lambda: Normalise(std="batch", aggregate="gdpo"), "Normalise.std is 'batch', .* set std='group'"),
        (lambda: Bound(limit=0), "Bound.limit is 0; it must be above 0"),
        (lambda: Bound(soft=-1), "Bound.soft is -1; it must be at least 0"),
    ],
)
def test_refusals_name_value_and_remedy(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("aggregate", ["sum", "per_objective", "separate"])
def test_weights_may_be_shares_of_one(scored, aggregate: str, masked: bool) -> None:
    """MixGRPO divides the rewards' weights by their sum."""
    a, b = torch.from_numpy(np.random.default_rng(2).normal(size=(2, 8)))
    ids, valid = torch.arange(2).repeat_interleave(4), torch.ones(8, dtype=torch.bool) if masked else None
    given, shares = {"a": 3.0, "b": 1.0}, {"a": 0.75, "b": 0.25}
    found = assign(
        (Normalise(aggregate=aggregate, unit_weights=True),),
        scored(3 * a + b, ids, {"a": a, "b": b}, given, valid=valid),
    )
    expected = assign(
        (Normalise(aggregate=aggregate),),
        scored(0.75 * a + 0.25 * b, ids, {"a": a, "b": b}, shares, valid=valid),
    )
    torch.testing.assert_close(found.advantages, expected.advantages, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"Normalise.unit_weights .* which is 0: give them a positive one"):
        assign((Normalise(unit_weights=True),), scored(a, ids, {"a": a, "b": b}, {"a": 1.0, "b": -1.0}))


def test_what_becomes_of_idle_groups(scored) -> None:
    rewards = torch.tensor([1.0, 1, 1, 1, 0, 1, 2, 1])
    ids = torch.arange(2).repeat_interleave(4)
    chains = {mode: (Normalise(), DropIdle(mode=mode)) for mode in ("dropped", "kept", "filtered")}
    found = {mode: assign(chain, scored(rewards, ids)) for mode, chain in chains.items()}
    live = [0.0] * 4 + [1.0] * 4
    assert found["dropped"].weight.tolist() == live
    assert found["kept"].weight.tolist() == [1.0] * 8
    assert found["filtered"].weight.tolist() == [0, 0, 0, 0, 1, 0, 1, 0]  # any sample of advantage 0
    assert [found[mode].refills for mode in chains] == [False, False, True]
    for mode in ("dropped", "kept"):
        assert found[mode].idle.tolist() == [True] * 4 + [False] * 4
    assert found["filtered"].idle.tolist() == [True] * 4 + [False, True, False, True]
    assert found["kept"].advantages[:4].tolist() == [0.0] * 4
    valid = torch.tensor([True, False, True, True] * 2)
    unscored = assign(chains["filtered"], scored(rewards * valid, ids, valid=valid))
    assert unscored.idle.tolist() == [True, False, True, True, False, False, False, True]
    assert unscored.weight.tolist() == [0, 0, 0, 0, 1, 0, 1, 0]  # one is the mean of those that have a score
