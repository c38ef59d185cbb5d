"""What running samples would become, small enough to score before anything is decoded."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from flowgrpo_fast import _C
from flowgrpo_fast.ops._binding import (
    TRANSITION_SCHEMA,
    Guidance,
    Transition,
    bind,
    filled,
    real_dtype,
    require_int,
    require_ints,
    require_tensor,
    split_flat,
    split_guidance,
    split_step,
)


class PreviewOutput(NamedTuple):
    """What `preview` returns where a group size is given."""

    pooled: (
        Tensor  # [B, C, *cells], or [B, cells, C] for packed latents; float32 (float64 for float64 latents)
    )
    gram: Tensor  # [P, G, G], the same dtype


def _view(latents: Tensor, grid: list[int] | tuple[int, ...]) -> tuple[int, int, int, int, int]:
    """A sample as (planes, time, height, width, inner): channels are planes, or inner where `grid` is given."""
    axes = tuple(grid) or tuple(latents.shape[2:])
    time = axes[0] if len(axes) == 3 else 1
    channels = latents.shape[-1] if grid else latents.shape[1]
    return (1 if grid else channels, time, axes[-2], axes[-1], channels if grid else 1)


def _allocate(*flat: Any) -> tuple[Tensor, Tensor]:
    latents, (pool, grid, group_size) = flat[0], flat[-3:]
    batch, *sample = latents.shape
    axes = grid or sample[1:]
    cells = [size // cell for size, cell in zip(axes, pool[-len(axes) :], strict=True)]
    shape = (batch, math.prod(cells), sample[-1]) if grid else (batch, sample[0], *cells)
    groups = (batch // group_size, group_size, group_size) if group_size else (0,)
    real = real_dtype(latents)
    return latents.new_empty(shape, dtype=real), latents.new_empty(groups, dtype=real)


def _fill(outputs: tuple[Tensor, Tensor], *flat: Any) -> None:
    transition, (pool, grid, group_size) = split_flat(flat)
    pooled, gram = outputs
    num_threads = torch.get_num_threads()
    _C.preview(transition, _view(transition.latents, grid), pool, pooled, num_threads)
    if group_size:
        _C.gram(pooled, torch.empty_like(pooled), gram, num_threads)


_op = bind(
    "preview",
    f"({TRANSITION_SCHEMA}, int[] pool, int[] grid, int group_size) -> (Tensor, Tensor)",
    filled("preview", _allocate, _fill),
    _allocate,
)


def _fail(message: str) -> NoReturn:
    raise ValueError(f"preview: {message}")


def _check_cells(
    latents: Tensor, pool: int | tuple[int, ...], grid: tuple[int, ...] | None
) -> tuple[int, ...]:
    """The cell as (time, height, width).

    Raises:
        ValueError: latents of another layout, or an axis that is not made of whole cells.
    """
    if grid is None:
        if latents.ndim not in (4, 5):
            _fail(
                f"latents has shape {list(latents.shape)}, must have [B, C, H, W] or [B, C, T, H, W], or a grid"
            )
        axes = tuple(latents.shape[2:])
    else:
        axes = require_ints("preview", "grid", grid, "(H, W) or (T, H, W)")
        fits = latents.ndim == 3 and len(axes) in (2, 3) and math.prod(axes) == latents.shape[1]
        if not fits or min(axes) < 1:
            _fail(
                f"grid is {list(axes)}, must be (H, W) or (T, H, W) of latents [B, L, C], here {list(latents.shape)}"
            )
    must = "a positive int, (height, width) or (time, height, width)"
    cell = (1, pool, pool) if isinstance(pool, int) else require_ints("preview", "pool", pool, must)
    if len(cell) == 2:
        cell = (1, *cell)
    if len(cell) != 3 or min(cell) < 1:
        _fail(f"pool is {pool}, must be {must}")
    full = axes if len(axes) == 3 else (1, *axes)
    if any(size % side for size, side in zip(full, cell, strict=True)):
        _fail(f"pool is {list(cell)}, must divide the grid {list(full)} (time, height, width)")
    return cell


def preview(
    latents: Tensor,
    velocity: Tensor,
    coeffs: Tensor,
    step_index: int | Tensor,
    pool: int | tuple[int, ...],
    guidance: Guidance | None = None,
    grid: tuple[int, ...] | None = None,
    group_size: int | None = None,
) -> Tensor | PreviewOutput:
    r"""The clean samples one step would jump to, averaged over cells: small latents to score before any decode.

    With ``sigma = coeffs[step_index, 0]`` and ``v`` as in `flow_step`::

        x0     = latents - sigma * v
        pooled = mean of x0 over each cell of `pool` neighbouring positions, channel by channel

    in one pass: every element is read once, only the small latents are written. Cells do not overlap and must tile the
    grid, so that every pooled value weighs the same number of elements. With `group_size` G it also returns the Gram
    matrix of each group of G neighbouring samples, of what sets them apart from the group's mean::

        gram[p, i, j] = sum_features (pooled_i - mean_p) * (pooled_j - mean_p)

    ``gram[i, i] + gram[j, j] - 2 * gram[i, j]`` is the squared distance of two candidates, as it would be without the
    mean, but without its rounding: what a diversity reward or a determinantal choice needs. Products are float32, sums
    float64 in a fixed order. The one-step estimate is that of Pro-GRPO (arXiv:2512.15347), there decoded; latent-level
    scores skip the decoder. Not differentiable.

    Args:
        latents: ``[B, C, H, W]``, ``[B, C, T, H, W]``, or packed ``[B, L, C]`` with `grid`; float32,
            bfloat16, float16 or float64.
        velocity: the same shape; any of these (float64 only together with float64 latents).
        coeffs: ``[T, 8]`` float32, rows ``(sigma, a, b, c, d, inv_var, log_norm, 0)``.
        step_index: row of the table; an int, or an int64 tensor, 0-d or ``[B]``.
        pool: side of a cell: height and width, ``(height, width)`` or ``(time, height, width)``.
        guidance: negative velocity (dtype of `velocity`) and scale.
        grid: ``(H, W)`` or ``(T, H, W)`` of packed latents, ``L`` in all; a token's channels stay apart.
        group_size: samples a group, neighbours in the batch.

    Returns:
        ``pooled`` ``[B, C, h, w]``, ``[B, C, t, h, w]`` or ``[B, l, C]`` float32 (float64 for float64 latents), or with
        `group_size` a `PreviewOutput` of it and ``gram`` ``[B / G, G, G]``.

    Raises:
        ValueError: wrong shape, dtype, device, layout, step, cell or group size. (A step outside the table in a CUDA
            tensor, which nobody on the host reads, gives NaN instead.)
    """
    require_tensor("preview", "latents", latents)
    cell = _check_cells(latents, pool, grid)
    if group_size is not None:
        group_size = require_int("preview", "group_size", group_size)
        if group_size < 1 or latents.shape[0] % group_size:
            _fail(f"group_size is {group_size}, must divide the batch of {latents.shape[0]}")
    transition = Transition(
        latents,
        velocity,
        coeffs,
        *split_step("preview", "step_index", step_index),
        *split_guidance("preview", guidance),
        None,
    )
    pooled, gram = _op(*transition, cell, tuple(grid or ()), group_size or 0)
    return pooled if group_size is None else PreviewOutput(pooled, gram)
