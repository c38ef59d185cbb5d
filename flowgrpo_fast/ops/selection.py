"""Which samples of a prompt survive, and which are best: selections and Pareto fronts, without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from flowgrpo_fast import _C
from flowgrpo_fast.ops._binding import bind, filled, require_int, require_tensor


def _indices(rewards: Tensor, size: int) -> Tensor:
    return rewards.new_empty((*rewards.shape[:1], size), dtype=torch.int64)


def _allocate(rewards: Tensor, size: int) -> Tensor:
    """None of a number that the kernel's check, still to come, names."""
    most = rewards.shape[-1] if rewards.ndim else 0
    return _indices(rewards, size if 0 <= size <= most else 0)


def _fill_subset(indices: Tensor, rewards: Tensor, k: int) -> None:
    _C.best_variance_subset(rewards, k, indices, torch.get_num_threads())


def _allocate_both(rewards: Tensor, num_top: int, num_bottom: int) -> Tensor:
    return _allocate(rewards, num_top + num_bottom)


def _fill_both(indices: Tensor, rewards: Tensor, num_top: int, num_bottom: int) -> None:
    _C.top_bottom(rewards, num_top, num_bottom, indices, torch.get_num_threads())


def _fronts(objectives: Tensor) -> Tensor:
    return objectives.new_empty(objectives.shape[:2], dtype=torch.int64)


def _fill_fronts(fronts: Tensor, objectives: Tensor) -> None:
    _C.pareto_fronts(objectives, fronts, torch.get_num_threads())


_subset_op = bind(
    "best_variance_subset",
    "(Tensor rewards, SymInt k) -> Tensor",
    filled("best_variance_subset", _allocate, _fill_subset),
    _indices,
)
_top_bottom_op = bind(
    "top_bottom",
    "(Tensor rewards, SymInt num_top, SymInt num_bottom) -> Tensor",
    filled("top_bottom", _allocate_both, _fill_both),
    lambda rewards, num_top, num_bottom: _indices(rewards, num_top + num_bottom),
)
_fronts_op = bind(
    "pareto_fronts", "(Tensor objectives) -> Tensor", filled("pareto_fronts", _fronts, _fill_fronts), _fronts
)


def best_variance_subset(rewards: Tensor, k: int) -> Tensor:
    r"""The `k` samples of each prompt whose rewards vary most, ``[P, k]`` int64, ascending.

    Pro-GRPO's survivors. The subset of maximal variance is always the ``i`` lowest and the ``k - i`` highest rewards
    for some ``i``, so after one sort a scan over ``i`` with running sums finds it. Of ``i`` that are equally good but
    for rounding the smallest is taken, that is the most high rewards; of equal rewards, those with the lower index.
    Where a prompt has a NaN or infinite reward, its `k` highest are taken, NaN counting as lower than everything.

    Args:
        rewards: ``[P, G]``, G at most 1024; float32, bfloat16, float16 or float64.
        k: how many survive, in ``1..G``.

    Raises:
        ValueError: wrong shape, dtype, device, layout or number.
    """
    require_tensor("best_variance_subset", "rewards", rewards)
    return _subset_op(rewards, require_int("best_variance_subset", "k", k))


def top_bottom(rewards: Tensor, num_top: int, num_bottom: int) -> Tensor:
    """The best samples of each prompt, best first, then the worst of the others, worst first: ``[P, num]`` int64.

    Of equal rewards those with the lower index come first. NaN counts as lower than everything.

    Args:
        rewards: ``[P, G]``, G at most 1024; float32, bfloat16, float16 or float64.
        num_top: how many of the best.
        num_bottom: how many of the worst; together 1 to G.

    Raises:
        ValueError: wrong shape, dtype, device, layout or number.
    """
    require_tensor("top_bottom", "rewards", rewards)
    return _top_bottom_op(
        rewards,
        require_int("top_bottom", "num_top", num_top),
        require_int("top_bottom", "num_bottom", num_bottom),
    )


def pareto_fronts(objectives: Tensor) -> Tensor:
    """The Pareto front each sample of a prompt is in, ``[P, G]`` int64; every objective is to be maximised.

    A sample dominates another if it is at least as high in every objective and higher in one. Front 0 holds the samples
    nobody dominates, front 1 those nobody dominates once front 0 is gone, and so on; equal samples share a front. NaN
    counts as lower than everything. The fronts of ``-objectives`` begin with the worst samples (POCA's ``P-``).

    Args:
        objectives: ``[P, G, R]``, G at most 64 and R at most 8; float32, bfloat16, float16 or float64.

    Raises:
        ValueError: wrong shape, dtype, device or layout.
    """
    require_tensor("pareto_fronts", "objectives", objectives)
    return _fronts_op(objectives)
