"""The preview: x0 prediction averaged over cells, and the Gram matrix of a group about its mean."""

from __future__ import annotations

import torch
from torch import Tensor

from flowgrpo_fast.ops._binding import Guidance
from flowgrpo_fast.ops.reference.flow import guided_velocity


def preview(
    latents: Tensor,
    velocity: Tensor,
    coeffs: Tensor,
    step_index: int | Tensor,
    pool: tuple[int, int, int],
    guidance: Guidance | None = None,
    grid: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``latents - sigma * v``, averaged over cells of `pool` (time, height, width) positions; shapes as the op's."""
    sigma = coeffs[torch.as_tensor(step_index, device=coeffs.device), 0].to(dtype)
    sigma = sigma.expand(latents.shape[0]).reshape(-1, *[1] * (latents.ndim - 1))
    x0 = latents.to(dtype) - sigma * guided_velocity(velocity, guidance, dtype)
    cells = pool[-(latents.ndim - 2) :] if grid is None else pool[-len(grid) :]
    first = 2 if grid is None else 1
    if grid is not None:
        x0 = x0.unflatten(1, grid)
    for axis, cell in enumerate(cells):
        # An axis becomes (cells, positions of a cell); the positions are averaged away before the next one.
        x0 = x0.unflatten(first + axis, (-1, cell)).mean(first + axis + 1)
    return x0 if grid is None else x0.flatten(1, len(grid))


def centred_gram(pooled: Tensor, group_size: int) -> Tensor:
    """Inner products ``[P, G, G]`` of the samples ``[P * G, ...]`` of each group, less the group's mean."""
    features = pooled.flatten(1).unflatten(0, (-1, group_size))
    centred = features - features.mean(1, keepdim=True)
    return centred @ centred.transpose(1, 2)
