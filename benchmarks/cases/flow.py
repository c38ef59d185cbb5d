"""The transition: a sampling step, its replay, and the replay with its gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.baselines import contenders, make_workload
from benchmarks.cases import Case, Size, nbytes


def cases(size: Size, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Each moves latents, velocity and next latents; the backward also writes the velocity's gradient."""
    w = make_workload(size.shape, dtype)
    w = type(w)(*(value.to(device) for value in vars(w).values()))
    small = nbytes(w.coeffs, w.step_index, w.seed) + 4 * size.batch
    moved = {"sampling": 3, "replay": 3, "replay_and_backward": 4}
    for operation, functions in contenders(w).items():
        yield Case(operation, size, dtype, moved[operation] * nbytes(w.latents) + small, functions)
