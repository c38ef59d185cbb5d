"""The preview of running samples, pooled for latent-level scores, with the Gram matrix of each group."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, avg_pool3d

from benchmarks.baselines import make_workload
from benchmarks.cases import Case, Run, Size, nbytes
from flowgrpo_fast.ops import PreviewOutput, preview, reference


def layout(size: Size) -> tuple[tuple[int, ...] | None, int]:
    """The grid of packed tokens, and the largest side up to 8 of a cell that tiles the plane."""
    packed = len(size.sample) == 2
    side = math.isqrt(size.sample[0])
    plane = (side, side) if packed else size.sample[-2:]
    pool = max(p for p in range(1, 9) if all(axis % p == 0 for axis in plane))
    return (plane if packed else None), pool


def group_gram(pooled: Tensor) -> Tensor:
    """Of the whole batch as one group, by a matrix product."""
    features = pooled.flatten(1)
    centred = features - features.mean(0)
    return (centred @ centred.T)[None]


def cases(size: Size, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Reads latents and velocity, writes the small latents and one Gram matrix."""
    w = make_workload(size.shape, dtype)
    latents, velocity, coeffs, index = (t.to(device) for t in (w.latents, w.velocity, w.coeffs, w.step_index))
    grid, pool = layout(size)
    arguments = (latents, velocity, coeffs, index)

    def ours() -> PreviewOutput:
        out = preview(*arguments, pool, grid=grid, group_size=size.batch)
        assert isinstance(out, PreviewOutput)
        return out

    def eager() -> tuple[Tensor, Tensor]:
        sigma = coeffs[index, 0].view(-1, *[1] * (latents.ndim - 1))
        x0 = latents.float() - sigma * velocity.float()
        if grid is not None:
            pooled = avg_pool2d(x0.transpose(1, 2).unflatten(2, grid), pool).flatten(2).transpose(1, 2)
        elif latents.ndim == 5:
            pooled = avg_pool3d(x0, (1, pool, pool))
        else:
            pooled = avg_pool2d(x0, pool)
        return pooled, group_gram(pooled)

    @torch.compile
    def compiled() -> tuple[Tensor, Tensor]:
        pooled = reference.preview(*arguments, (1, pool, pool), None, grid)
        return pooled, reference.centred_gram(pooled, size.batch)

    run: dict[str, Run] = {"ours": ours, "eager": eager, "compiled": compiled}
    least = nbytes(latents, velocity, *ours()) + nbytes(coeffs, index)
    yield Case("preview", size, dtype, least, run)
