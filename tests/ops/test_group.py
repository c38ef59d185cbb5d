"""group_advantages: against the fp64 reference, against loops over groups in numpy, and its promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import zscore

from flowgrpo_fast.ops import Clip, group_advantages, reference

AGGREGATES = ("sum", "per_objective", "gdpo", "separate")
WEIGHTS = (1.0, 0.5, -2.0)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {
    torch.float32: {"rtol": 1e-6, "atol": 1e-7},  # one rounding of what is computed in float64
    torch.float64: {"rtol": 1e-11, "atol": 1e-12},
}
MODES = [(a, s) for a in AGGREGATES for s in ("group", "batch") if (a, s) != ("gdpo", "batch")]


def ragged(num_groups=5, num_rewards=3, dtype=torch.float32, largest=9, seed=0):
    """Rewards of groups of 1 to `largest` samples, mixed up."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.repeat(np.arange(num_groups), rng.integers(1, largest + 1, num_groups)))
    rewards = rng.normal(3, 2, (len(ids), num_rewards))
    return torch.from_numpy(rewards).to(dtype), torch.from_numpy(ids)


def by_loops(rewards, ids, weights, aggregate, std, eps, hard, soft):
    """The same, one group at a time, as the published trainers do it."""
    values, weights = rewards.astype(np.float64), np.asarray(weights)
    if aggregate == "sum":
        values, weights = (values @ weights)[:, None], np.ones(1)
    z = np.zeros_like(values)
    for group in np.unique(ids):
        own = values[ids == group]
        spread = own.std(0) if std == "group" else values.std(0)
        z[ids == group] = (own - own.mean(0)) / (spread + eps)
    advantages = z * weights if aggregate == "separate" else z @ weights
    if aggregate == "gdpo":
        advantages = (advantages - advantages.mean()) / (advantages.std() + eps)
    advantages = np.clip(advantages, -hard, hard)
    return soft * np.tanh(advantages / soft)


@pytest.mark.witness
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("aggregate", "std"), MODES)
def test_matches_reference_and_loops(device, aggregate, std, dtype):
    rewards, ids = ragged(dtype=dtype)
    clip = Clip(hard=1.5, soft=1.25)
    ours = group_advantages(rewards.to(device), ids.to(device), 5, WEIGHTS, aggregate, std, 1e-4, clip).cpu()
    assert ours.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    tolerance = TOLERANCE[ours.dtype]
    exact = reference.group_advantages(rewards.double(), ids, 5, WEIGHTS, aggregate, std, 1e-4, clip)
    torch.testing.assert_close(ours.double(), exact, **tolerance)
    loops = by_loops(rewards.double().numpy(), ids.numpy(), WEIGHTS, aggregate, std, 1e-4, *clip)
    torch.testing.assert_close(ours.double(), torch.from_numpy(loops), **tolerance)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_groups=st.integers(1, 6),
    num_rewards=st.integers(1, 16),
    largest=st.integers(1, 70),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_matches_reference_on_any_groups(num_groups, num_rewards, largest, mode, dtype, seed):
    rewards, ids = ragged(num_groups, num_rewards, dtype, largest, seed)
    weights = np.random.default_rng(seed).normal(size=num_rewards).tolist()
    ours = group_advantages(rewards, ids, None, weights, *mode, clip=5)
    exact = reference.group_advantages(rewards.double(), ids, num_groups, weights, *mode, clip=(5, None))
    tolerance = 1e-9 if dtype is torch.float64 else 1e-6
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.witness
def test_group_std_without_eps_is_scipys_zscore(device):
    rewards = torch.randn(4, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.arange(4).repeat_interleave(33)
    ours = group_advantages(rewards.flatten().to(device), ids.to(device), 4, eps=0).cpu()
    np.testing.assert_allclose(ours, zscore(rewards.numpy(), axis=1).ravel(), rtol=1e-11)


@pytest.mark.witness
@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("value", [0.3, 1e30, -7.1, 1 / 3])
def test_equal_rewards_give_exactly_zero(device, value, eps):
    rewards = torch.full((70,), value, dtype=torch.float64, device=device)
    ids = (torch.arange(70, device=device) % 3).clamp(max=1)  # groups of 24 and 46, the third is empty
    assert not group_advantages(rewards, ids, 3, [0.7], eps=eps).any()
    assert not group_advantages(rewards[:, None], ids, 3, [0.7], "gdpo", eps=eps).any()


@pytest.mark.witness
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_reward_poisons_its_group_or_the_batch(device, bad):
    rewards, ids = ragged(4, 2)
    rewards[0, 1] = bad
    arguments = (rewards.to(device), ids.to(device), 4)
    for aggregate in ("sum", "per_objective", "separate"):
        poisoned = group_advantages(*arguments, None, aggregate, clip=Clip(5, 3)).isnan().cpu()
        if aggregate == "separate":
            assert not poisoned[:, 0].any()
            poisoned = poisoned[:, 1]
        assert torch.equal(poisoned, ids == ids[0])
        assert (
            group_advantages(*arguments, None, aggregate, "batch")
            .isnan()
            .any(-1 if aggregate == "separate" else 0)
            .all()
        )
    assert group_advantages(*arguments, None, "gdpo").isnan().all()


@pytest.mark.witness
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_a_group_outside_the_range(device, aggregate):
    rewards, ids = ragged(3, 2)
    inside = ids < 2
    if device == "cpu":
        place = int((~inside).nonzero()[0])
        with pytest.raises(
            ValueError, match=rf"group_id is 2 at {place}, must be in \[0, 2\) for that many groups"
        ):
            group_advantages(rewards, ids, 2, None, aggregate)
        return
    ids[~inside] = torch.tensor([-1, 2, 2**62]).repeat(3)[: int((~inside).sum())]
    ours = group_advantages(rewards.to(device), ids.to(device), 2, None, aggregate).cpu()
    assert ours[~inside].isnan().all()
    alone = reference.group_advantages(rewards[inside].double(), ids[inside], 2, None, aggregate)
    torch.testing.assert_close(ours[inside].double(), alone, rtol=1e-6, atol=1e-7)


@pytest.mark.witness
@pytest.mark.parametrize("aggregate", ["sum", "per_objective", "separate"])
def test_a_group_is_the_same_bits_whatever_is_around_it(device, aggregate):
    rewards, ids = ragged(4, 3, largest=40)
    together = group_advantages(rewards.to(device), ids.to(device), 4, WEIGHTS, aggregate).cpu()
    for group in range(4):
        own = rewards[ids == group].to(device)
        alone = group_advantages(own, torch.full((len(own),), 1, device=device), 3, WEIGHTS, aggregate)
        assert torch.equal(alone.cpu(), together[ids == group])


@pytest.mark.parametrize(("aggregate", "std"), MODES)
def test_the_same_bits_on_any_number_of_threads(aggregate, std):
    rewards, ids = ragged(900, 2, largest=60)
    results = []
    before = torch.get_num_threads()
    for num_threads in (1, 3, 4):
        torch.set_num_threads(num_threads)
        results.append(group_advantages(rewards, ids, 900, None, aggregate, std))
    torch.set_num_threads(before)
    assert len(rewards) > 16384
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_separate_columns_add_up_to_per_objective():
    rewards, ids = ragged()
    each = group_advantages(rewards, ids, 5, WEIGHTS, "separate")
    assert each.shape == rewards.shape
    summed = group_advantages(rewards, ids, 5, WEIGHTS, "per_objective")
    torch.testing.assert_close(each.sum(1), summed, rtol=1e-5, atol=1e-6)
    assert group_advantages(rewards[:, 0].contiguous(), ids, 5, None, "separate").shape == ids.shape


def test_clips():
    rewards, ids = torch.zeros(100, dtype=torch.float64), torch.zeros(100, dtype=torch.int64)
    rewards[0] = 1.0
    plain = group_advantages(rewards, ids, 1)
    assert plain[0] == pytest.approx(9.94, abs=0.01)
    assert group_advantages(rewards, ids, 1, clip=5)[0] == 5
    soft = group_advantages(rewards, ids, 1, clip=Clip(soft=3.0))
    torch.testing.assert_close(soft, 3 * torch.tanh(plain / 3), rtol=1e-14, atol=0)
    assert group_advantages(rewards, ids, 1, clip=Clip(5.0, 3.0))[0] == pytest.approx(3 * np.tanh(5 / 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_flushing_subnormals_changes_nothing(dtype):
    subnormal = torch.finfo(dtype).smallest_normal * torch.arange(1.0, 9) * 3 / 32
    rewards = subnormal.to(dtype)
    ids = torch.arange(8) // 4
    expected = group_advantages(rewards, ids, 2, eps=0.0)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        assert torch.equal(group_advantages(rewards, ids, 2, eps=0.0), expected)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.gpu
@pytest.mark.parametrize(("aggregate", "std"), MODES)
def test_in_a_cuda_graph(aggregate, std):
    rewards, ids = (t.cuda() for t in ragged(48, 3, largest=24))
    group_advantages(rewards, ids, 48, None, aggregate, std)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = group_advantages(rewards, ids, 48, None, aggregate, std)
    rewards.copy_(rewards.flip(1))
    graph.replay()
    assert torch.equal(captured, group_advantages(rewards, ids, 48, None, aggregate, std))
