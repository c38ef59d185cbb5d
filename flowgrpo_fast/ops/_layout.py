"""Tensors as trainers have them, and tensors as the kernels read and write them: in order, with nothing pending.

Slices of a stack, transposed, channels-last, expanded, negated and conjugated tensors are copied before an op reads
them. What an op is to write to such is written aside and copied into place. Whatever else torch has (sparse, mkldnn,
quantised) is left to the kernels' checks, which name it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


class _Given(NamedTuple):
    """A tensor among an op's arguments."""

    name: str
    tensor: Tensor
    is_written: bool


def refuse_tangents(op: str, values: Sequence[Any]) -> None:
    """Raises ``ValueError`` if a tensor carries a forward-mode tangent, which an op would drop."""
    if forward_ad._current_level < 0:
        return
    for value in values:
        if isinstance(value, (list, tuple)):
            refuse_tangents(op, value)
        elif isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise ValueError(f"{op}: an input has a forward-mode tangent, must have none (use reverse mode)")


def _is_in_order(tensor: Tensor) -> bool:
    """Whether a kernel can use it in place. Every call asks, so it asks no more than real numbers need."""
    try:
        return tensor.is_contiguous() and not tensor.is_neg()
    except RuntimeError:  # compressed layouts have no such notion
        return True


def _in_order(op: str, given: _Given) -> Tensor:
    """The values as a kernel reads them; the tensor itself where that needs no copy, or where there are none."""
    tensor = given.tensor
    in_order = _is_in_order(tensor) and not (tensor.is_complex() and tensor.is_conj())
    if in_order or tensor.layout is not torch.strided or not tensor.untyped_storage().nbytes():
        return tensor
    try:
        return tensor.detach().resolve_conj().resolve_neg().contiguous()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        was = f"{given.name} has shape {list(tensor.shape)} and strides {tensor.stride()}"
        raise ValueError(f"{op}: {was}, must be contiguous, or fit into memory as a copy that is") from error


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share bytes. Slices of one stack do not, though each reaches across the other."""
    (first_a, last_a), (first_b, last_b) = _extent(a), _extent(b)
    if first_a >= last_b or first_b >= last_a:
        return False
    period = a.stride(0) * a.itemsize if a.ndim else 0
    if not period or not b.ndim or period != b.stride(0) * b.itemsize:
        return True
    (first_a, last_a), (first_b, last_b) = _extent(a[0]), _extent(b[0])
    place = (first_b - first_a) % period
    return place < last_a - first_a or place + last_b - first_b > period


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Its first byte, and the one after its last."""
    first, sides = tensor.data_ptr(), zip(tensor.shape, tensor.stride(), strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in sides) if tensor.numel() else 0
    return first, first + elements * tensor.itemsize


def _check_written(op: str, given: Sequence[_Given]) -> None:
    """Raises ``ValueError`` where an element that is written is another one, too, or part of another argument."""
    plain = [each for each in given if each.tensor.layout is torch.strided and not each.tensor.is_meta]
    for number, (name, tensor, is_written) in enumerate(plain):
        if not is_written:
            continue
        if torch._debug_has_internal_overlap(tensor) == 1:
            was = f"{name} has shape {list(tensor.shape)} and strides {tensor.stride()}"
            raise ValueError(f"{op}: {was}, must have memory of its own for every element")
        for place, other in enumerate(plain):
            comes_later = place >= number and other.is_written  # and meets this one then
            if comes_later or other.tensor.device != tensor.device:
                continue
            if _overlap(tensor, other.tensor):
                raise ValueError(
                    f"{op}: {name} shares memory with another argument, must be memory of its own"
                )


def on_stored(op: str, schema: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, whose flat arguments follow the schema, on tensors of any strides."""
    names = [argument.name for argument in schema.arguments]
    written = [
        argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments
    ]
    is_simple = not any(written) and not any("List[Tensor]" in str(each.type) for each in schema.arguments)

    def ordered(flat: tuple[Any, ...]) -> Any:
        given: list[_Given] = []
        for name, value, is_written in zip(names, flat, written, strict=True):
            if isinstance(value, Tensor):
                given.append(_Given(name, value, is_written))
            elif isinstance(value, (list, tuple)):
                listed = [each for each in value if isinstance(each, Tensor)]
                given += [_Given(f"{name}[{place}]", each, is_written) for place, each in enumerate(listed)]
        if any(written):
            _check_written(op, given)
        use = [_in_order(op, each) for each in given]
        aside = [
            (each.tensor, tensor)
            for each, tensor in zip(given, use, strict=True)
            if each.is_written and tensor is not each.tensor
        ]
        left = iter(use)
        outputs = forward(
            *(
                next(left)
                if isinstance(value, Tensor)
                else [next(left) for _ in value]
                if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor)
                else value
                for value in flat
            )
        )
        for place, tensor in aside:
            place.detach().copy_(tensor)
        return outputs

    def run(*flat: Any) -> Any:
        if is_simple:
            for value in flat:
                if isinstance(value, Tensor) and not _is_in_order(value):
                    return ordered(flat)
            return forward(*flat)
        return ordered(flat)

    return run
