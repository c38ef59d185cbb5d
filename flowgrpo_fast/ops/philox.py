"""Counter-based noise: a pure function of (seed, step, stream, element), whatever the device and the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowgrpo_fast import _C
from flowgrpo_fast.ops._binding import (
    bind,
    filled,
    require_int,
    require_ints,
    require_one_of,
    require_tensor,
    split_step,
)

_SCHEMA = "(Tensor seed, SymInt[] shape, SymInt step, Tensor? step_index, SymInt stream, ScalarType dtype) -> Tensor"


def _allocate(*flat: Any) -> Tensor:
    seed, shape, _, _, _, dtype = flat
    return seed.new_empty((*seed.shape[:1], *shape), dtype=dtype)


def _fill(out: Tensor, *flat: Any) -> None:
    seed, _, step, step_index, stream, _ = flat
    _C.philox(seed, step if step_index is None else step_index, stream, out, torch.get_num_threads())


_op = bind("philox", _SCHEMA, filled("philox", _allocate, _fill), _allocate)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _draw(
    op: str, seed: Tensor, shape: Sequence[int], step: int | Tensor, stream: int, dtype: torch.dtype
) -> Tensor:
    require_tensor(op, "seed", seed)
    sample = require_ints(op, "shape", shape, "a list or tuple of ints")
    if not torch.compiler.is_compiling() and sample and min(sample) < 1:
        raise ValueError(f"{op}: shape is {list(sample)}, must be of sizes of at least 1")
    return _op(seed, sample, *split_step(op, "step", step), require_int(op, "stream", stream), dtype)


def philox_normal(
    seed: Tensor,
    shape: Sequence[int],
    step: int | Tensor = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise ``[B, *shape]``.

    Philox4x32-10 (Salmon et al., SC 2011) with key ``(seed low, seed high)`` and counter
    ``(block low, block high, step, stream)``, ``block = element // 4``; the two word pairs of a block give its four
    normals by Box-Muller. Stream 0 is the noise of steps (`flow_step` draws it itself), stream 1 that of the start.

    Args:
        seed: ``[B]`` int64, one a sample.
        shape: shape of one sample.
        step: an int in [0, 2^32), or an int64 tensor of such, 0-d or ``[B]``.
        stream: in [0, 2^32).
        dtype: float32, bfloat16, float16 (both rounded from float32) or float64 (the float32 values).

    Raises:
        ValueError: wrong shape, dtype, device or range. (Of a step in a CUDA tensor, which nobody on the host reads,
            the low 32 bits count.)
    """
    require_one_of("philox_normal", "dtype", dtype, _DTYPES)
    return _draw("philox_normal", seed, shape, step, stream, dtype)


def philox_uint32(seed: Tensor, shape: Sequence[int], step: int | Tensor = 0, stream: int = 0) -> Tensor:
    """The 32-bit words behind `philox_normal`, ``[B, *shape]`` int64 in [0, 2^32).

    Element i is word ``i % 4`` of block ``i // 4``; arguments and errors as there.
    """
    return _draw("philox_uint32", seed, shape, step, stream, torch.int64)
