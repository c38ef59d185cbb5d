"""Rows of several buffers, gathered in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowgrpo_fast import _C
from flowgrpo_fast.ops._binding import bind, filled, require_tensor


def _allocate(indices: Tensor, buffers: Sequence[Tensor]) -> list[Tensor]:
    num_rows = indices.numel()
    return [buffer.new_empty(num_rows, *buffer.shape[1:]) for buffer in buffers]


def _fill(out: Sequence[Tensor], indices: Tensor, buffers: Sequence[Tensor]) -> None:
    _C.compact(indices, tuple(buffers), tuple(out), torch.get_num_threads())


def _write(indices: Tensor, buffers: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    _fill(out, indices, buffers)
    torch.autograd.graph.increment_version(out)


def _allocate_nothing(indices: Tensor, buffers: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    return None


_op = bind(
    "compact",
    "(Tensor indices, Tensor[] buffers) -> Tensor[]",
    filled("compact", _allocate, _fill),
    _allocate,
)
_op_out = bind(
    "compact_out",
    "(Tensor indices, Tensor[] buffers, Tensor(a!)[] out) -> ()",
    _write,
    _allocate_nothing,
    says="compact",
)


def compact(indices: Tensor, *buffers: Tensor, out: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
    """``buffer[indices]`` of up to 16 buffers at once: what the survivors of a selection keep.

    Buffers may differ in dtype, row shape and number of rows; bytes are copied as they are. On a GPU it is one launch,
    on the CPU the rows are shared among the threads. Not differentiable.

    Args:
        indices: ``[K]`` int64, K at least 1, rows of every buffer, in any order and possibly repeated.
        buffers: ``[N, ...]`` each, of any dtype.
        out: where to write, one ``[K, ...]`` a buffer, for example the static buffers of a CUDA graph; must not share
            memory with the other arguments. None allocates.

    Returns:
        One ``[K, ...]`` tensor a buffer: those of `out`, or new ones.

    Raises:
        ValueError: wrong shape, dtype, device, layout or number of buffers, or an index that is no row. (One in a CUDA
            tensor, which nobody on the host reads, is clamped into the range.)
    """
    require_tensor("compact", "indices", indices)
    if out is not None and not isinstance(out, (list, tuple)):
        raise ValueError(f"compact: out is a {type(out).__name__}, must be a list or tuple of tensors")
    for name, tensors in (("buffers", buffers), ("out", out or ())):
        for number, tensor in enumerate(tensors):
            require_tensor("compact", f"{name}[{number}]", tensor)
            if name == "buffers" and tensor.ndim == 0:
                raise ValueError(f"compact: buffers[{number}] has 0 dimensions, must be [rows, ...]")
    if out is None:
        return tuple(_op(indices, buffers))
    out = tuple(out)
    _op_out(indices, buffers, out)
    return out
