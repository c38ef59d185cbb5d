from __future__ import annotations

import numpy as np
import pytest
import torch

from flowgrpo_fast.credit import assign_credit
from flowgrpo_fast.ops import group_advantages
from flowgrpo_fast.recipe import Credit, RewardTerm
from flowgrpo_fast.types import Scores

A, B = RewardTerm(function="m:a", weight=1.0), RewardTerm(function="m:b", weight=0.5)


@pytest.mark.parametrize(("std", "key"), [("group", "adv_group_std"), ("batch", "adv_global_std")])
def test_recorded_advantages(golden, std: str, key: str) -> None:
    rewards, ids = (torch.from_numpy(golden[k]) for k in ("adv_rewards", "adv_group_ids"))
    ours = group_advantages(rewards, ids, std=std)
    np.testing.assert_allclose(ours, golden[key], rtol=1e-10, atol=1e-12)


def test_groups_of_any_size_and_order() -> None:
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.repeat(np.arange(5), [2, 3, 7, 4, 1]))
    rewards = rng.normal(size=17)
    ours = group_advantages(torch.from_numpy(rewards), torch.from_numpy(ids), 5)
    for group in range(5):
        own = rewards[ids == group]
        np.testing.assert_allclose(ours[ids == group], (own - own.mean()) / (own.std() + 1e-4), rtol=1e-10)


def test_norm_then_sum_and_sum_then_norm() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 8))
    ids = torch.arange(2).repeat_interleave(4)
    output = Scores(
        total=torch.from_numpy(a + 0.5 * b),
        objectives={"a": torch.from_numpy(a), "b": torch.from_numpy(100 * b)},
    )

    def z(values):
        grouped = values.reshape(2, 4)
        centred = grouped - grouped.mean(1, keepdims=True)
        return (centred / (grouped.std(1, keepdims=True) + 1e-4)).ravel()

    each, _ = assign_credit(output, ids, Credit(), (A, B))
    np.testing.assert_allclose(each, z(a) + 0.5 * z(100 * b), rtol=1e-5)  # blind to a reward's scale
    summed, _ = assign_credit(output, ids, Credit(per_objective=False), (A, B))
    np.testing.assert_allclose(summed, z(a + 0.5 * b), rtol=1e-5)


def test_clip_bounds_the_advantage() -> None:
    rewards = torch.zeros(100, dtype=torch.float64)
    rewards[0] = 1.0
    advantages, _ = assign_credit(Scores(total=rewards), torch.zeros(100, dtype=torch.int64), Credit(), ())
    assert advantages[0] == 5.0  # unclipped: 9.95


@pytest.mark.parametrize("drop", [True, False])
def test_groups_without_variance_are_dropped(drop: bool) -> None:
    rewards = torch.tensor([0.3, 0.3, 0.3, 0.1, 0.2, 0.4])
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    _, weight = assign_credit(Scores(total=rewards), ids, Credit(drop_zero_variance=drop), ())
    assert weight.tolist() == ([0, 0, 0, 1, 1, 1] if drop else [1] * 6)


def test_advantages_of_the_middle_of_a_group_are_kept() -> None:
    rewards = torch.tensor([0.0, 1.0, 2.0, 5.0, 5.0, 5.0])
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    advantages, weight = assign_credit(Scores(total=rewards), ids, Credit(), (), 2)
    assert advantages[1] == 0
    assert weight.tolist() == [1, 1, 1, 0, 0, 0]


def test_bad_rewards() -> None:
    ids = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"group_id has shape \[3\], must have \[2\]"):
        assign_credit(Scores(total=torch.zeros(2)), ids, Credit(), ())
    bad = torch.tensor([0.0, float("nan"), 1.0])
    with pytest.raises(ValueError, match="reward of sample 1 is nan"):
        assign_credit(Scores(total=bad), ids, Credit(), ())
    objectives = {"a": torch.zeros(3), "b": torch.tensor([0.0, 1.0, float("inf")])}
    with pytest.raises(ValueError, match="reward of sample 2 is inf"):
        assign_credit(Scores(total=torch.zeros(3), objectives=objectives), ids, Credit(), (A, B))
