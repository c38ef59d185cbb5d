"""Rewards -> group-relative advantages, in one call and without a host sync."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from flowgrpo_fast import _C
from flowgrpo_fast.ops._binding import (
    bind,
    filled,
    real_dtype,
    require_int,
    require_number,
    require_one_of,
    require_tensor,
)

Aggregate = Literal["sum", "per_objective", "gdpo", "separate"]
AGGREGATES = ("sum", "per_objective", "gdpo", "separate")  # in the order of the kernels' enum
MAX_REWARDS = 16

_SCHEMA = (
    "(Tensor rewards, Tensor group_id, SymInt num_groups, float[]? weights, int aggregate, bool batch_std, float eps, "
    "float clip, float soft_clip) -> Tensor"
)


class Clip(NamedTuple):
    """Bounds of an advantage: cut at ``+-hard``, then bent as ``soft * tanh(A / soft)``; None leaves one out."""

    hard: float | None = None
    soft: float | None = None


def _allocate(*flat: Any) -> Tensor:
    rewards, aggregate = flat[0], flat[4]
    shape = rewards.shape if aggregate == 3 else rewards.shape[:1]
    return rewards.new_empty(shape, dtype=real_dtype(rewards))


def _fill(advantages: Tensor, *flat: Any) -> None:
    rewards, group_id = flat[:2]
    workspaces: tuple[Tensor | None, Tensor | None] = (None, None)
    if rewards.is_cuda:
        batch = rewards.shape[0] if rewards.ndim else 1
        sums = rewards.new_empty(MAX_REWARDS + batch, dtype=torch.float64)
        workspaces = (rewards.new_empty(batch, dtype=torch.int64), sums)
    _C.group_advantages(rewards, group_id, flat[2:], advantages, workspaces, torch.get_num_threads())


_op = bind("group_advantages", _SCHEMA, filled("group_advantages", _allocate, _fill), _allocate)


def _bound(argument: str, value: float | None) -> float:
    """0 for no bound, as the kernels take it."""
    if value is None:
        return 0.0
    bound = require_number("group_advantages", argument, value)
    if not 0 < bound < float("inf"):
        raise ValueError(f"group_advantages: {argument} is {value}, must be positive and finite, or None")
    return bound


def _bounds(clip: Clip | float | None) -> tuple[float, float]:
    if not isinstance(clip, tuple):
        return _bound("clip.hard", clip), 0.0
    if len(clip) != 2:
        raise ValueError(f"group_advantages: clip has {len(clip)} value(s), must have 2, hard and soft")
    return _bound("clip.hard", clip[0]), _bound("clip.soft", clip[1])


def _numbers(weights: Sequence[float] | None) -> list[float] | None:
    if weights is None:
        return None
    if isinstance(weights, (str, Tensor)) or not hasattr(type(weights), "__len__"):
        raise ValueError(
            f"group_advantages: weights is a {type(weights).__name__}, must be a sequence of numbers"
        )
    return [
        require_number("group_advantages", f"weights[{place}]", weight)
        for place, weight in enumerate(weights)
    ]


def group_advantages(
    rewards: Tensor,
    group_id: Tensor,
    num_groups: int | None = None,
    weights: Sequence[float] | None = None,
    aggregate: Aggregate = "sum",
    std: Literal["group", "batch"] = "group",
    eps: float = 1e-4,
    clip: Clip | float | None = None,
) -> Tensor:
    r"""How much better than its group each sample did, ``[B]``.

    A reward ``r``, or a sum of rewards, is normalised as ``z(r) = (r - mean of its group) / (std + eps)``, with the
    population's standard deviation (no Bessel correction) of the group or of the whole batch. With weights ``w``:

    ===============  =====================================  ==========================================
    `aggregate`      advantage                              used by
    ===============  =====================================  ==========================================
    "sum"            ``z(sum_r w_r r)``                     Flow-GRPO, Flow-Factory ("sum")
    "per_objective"  ``sum_r w_r z(r)``                     MixGRPO, DanceGRPO
    "gdpo"           ``z_batch(sum_r w_r z(r))``            Flow-Factory ("gdpo"), GDPO
    "separate"       ``w_r z(r)``, ``[B, R]``, not summed   losses that mix the objectives themselves
    ===============  =====================================  ==========================================

    where ``z_batch`` takes mean and standard deviation over the batch. Then ``A = clamp(A, +-hard)`` and
    ``A = soft * tanh(A / soft)`` (V-GRPO, eq. 17). All arithmetic is float64. A group whose rewards are all equal gets
    exactly 0 (before ``z_batch``).

    A NaN or infinite reward makes its whole group NaN, and nothing else; with ``std="batch"`` and with "gdpo", where
    every advantage depends on it, the whole batch. It is not an error, since nobody on the host reads the rewards.

    Not differentiable.

    Args:
        rewards: ``[B]`` or ``[B, R]``, R at most 16; float32, bfloat16, float16 or float64.
        group_id: ``[B]`` int64 in ``0..num_groups - 1``, in any order; groups of any size, also empty ones.
        num_groups: at most 2^24, or B if that is more; None takes B. On a GPU a block a group runs, so the true number
            is cheaper.
        weights: one a reward; None is all 1.
        aggregate: see above.
        std: standard deviation of the group or of the batch; "gdpo" needs "group".
        eps: added to every standard deviation; where the sum is 0 the result is 0.
        clip: both bounds, the hard one alone, or None.

    Returns:
        Advantages ``[B]`` (``[B, R]`` for "separate"), float32 (float64 for float64 rewards).

    Raises:
        ValueError: wrong shape, dtype, device, layout or option, or a group outside the range. (One in a CUDA tensor
            gives its sample NaN and leaves the others alone.)
    """
    require_tensor("group_advantages", "rewards", rewards)
    require_one_of("group_advantages", "aggregate", aggregate, AGGREGATES)
    require_one_of("group_advantages", "std", std, ("group", "batch"))
    if std == "batch" and aggregate == "gdpo":
        raise ValueError("group_advantages: std is 'batch', must be 'group' with aggregate='gdpo'")
    if num_groups is None:
        num_groups = rewards.shape[0] if rewards.ndim else 1
    return _op(
        rewards,
        group_id,
        require_int("group_advantages", "num_groups", num_groups),
        _numbers(weights),
        AGGREGATES.index(aggregate),
        std == "batch",
        require_number("group_advantages", "eps", eps),
        *_bounds(clip),
    )
