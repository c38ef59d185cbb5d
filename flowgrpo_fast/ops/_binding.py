"""One op from one forward/backward pair, for eager calls and for tracing.

Eager calls go straight to ``_C`` (through an ``autograd.Function`` where a gradient is needed). Under
``torch.compile``, for tensor subclasses and under a dispatch mode, the same functions run behind a ``torch.library``
op of the namespace ``flowgrpo_fast``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowgrpo_fast.ops._layout import on_stored, refuse_tangents

Forward = Callable[..., Any]

_library = torch.library.Library("flowgrpo_fast", "FRAGMENT")
_plain_tensors = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
_plain = frozenset((*_plain_tensors, int, float, bool, type(None), torch.dtype))
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


class Guidance(NamedTuple):
    """Classifier-free guidance fused into an op: ``v = negative + scale * (velocity - negative)``."""

    negative_velocity: Tensor
    scale: float


class Transition(NamedTuple):
    """What every op on a transition takes, in the order the kernels read it."""

    latents: Tensor  # [B, *S]
    velocity: Tensor  # [B, *S]
    coeffs: Tensor  # [T, 8]
    step: int  # row for all samples, unless step_index is given
    step_index: Tensor | None  # 0-d or [B] int64
    negative_velocity: Tensor | None  # [B, *S]
    guidance_scale: float
    x0_prev: Tensor | None  # [B, *S]


TRANSITION_SCHEMA = (
    "Tensor latents, Tensor velocity, Tensor coeffs, SymInt step, Tensor? step_index, "
    "Tensor? negative_velocity, float guidance_scale, Tensor? x0_prev"
)
_NUM_FIELDS = len(Transition._fields)


def split_flat(flat: tuple[Any, ...]) -> tuple[Transition, tuple[Any, ...]]:
    """The transition and the rest of an op's flat arguments."""
    return Transition(*flat[:_NUM_FIELDS]), flat[_NUM_FIELDS:]


def require_tensor(op: str, argument: str, value: object) -> None:
    """Raises ``ValueError`` if `value` is no tensor, or a nested one, which has no shape."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{op}: {argument} is a {type(value).__name__}, must be a torch.Tensor")
    if value.is_nested:
        raise ValueError(f"{op}: {argument} is a nested tensor, must be dense")


def require_bool(op: str, argument: str, value: bool) -> None:
    """Raises ``ValueError`` if `value` is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{op}: {argument} is a {type(value).__name__}, must be a bool")


def require_one_of(op: str, argument: str, value: object, choices: Sequence[object]) -> None:
    """Raises ``ValueError`` if `value` is none of the choices, all of which have one type."""
    kind = type(choices[0])
    if not isinstance(value, kind) or value not in choices:
        shown = repr(value) if isinstance(value, kind) else f"a {type(value).__name__}"
        raise ValueError(f"{op}: {argument} is {shown}, must be one of {', '.join(map(str, choices))}")


def require_int(op: str, argument: str, value: int, must: str = "an int") -> int:
    """The value as an int of 64 bits; raises ``ValueError`` if it is none. A symbolic one stays as it is."""
    if torch.compiler.is_compiling() or (type(value) is int and value.bit_length() < 64):
        return value
    if isinstance(value, torch.SymInt):
        return value
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{op}: {argument} is a {type(value).__name__}, must be {must}") from None
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError(f"{op}: {argument} is an int of {number.bit_length() + 1} bits, must be one of 64")
    return number


def require_ints(op: str, argument: str, values: Sequence[int], must: str) -> tuple[int, ...]:
    """The values as ints of 64 bits; raises ``ValueError`` if they are not, or no list or tuple."""
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{op}: {argument} is a {type(values).__name__}, must be {must}")
    if torch.compiler.is_compiling():
        return tuple(values)
    plain = [value for value in values if type(value) is int and value.bit_length() < 64]
    if len(plain) == len(values):
        return tuple(plain)
    return tuple(require_int(op, f"{argument}[{place}]", value) for place, value in enumerate(values))


def require_number(op: str, argument: str, value: float) -> float:
    """The value as a float; raises ``ValueError`` if it is no real number. A tensor is none: reading it would wait."""
    if type(value) is float:
        return value
    if isinstance(value, Tensor) or not hasattr(type(value), "__float__"):
        raise ValueError(f"{op}: {argument} is a {type(value).__name__}, must be a number")
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):
        raise ValueError(f"{op}: {argument} is out of range, must be a number that a float holds") from None


def split_step(op: str, argument: str, step: int | Tensor) -> tuple[int, Tensor | None]:
    """A step given as an integer or as a tensor, as the pair (integer, tensor or None) of the op schemas."""
    if isinstance(step, Tensor):
        return 0, step
    return require_int(op, argument, step, "an int or an int64 tensor"), None


def split_guidance(op: str, guidance: Guidance | None) -> tuple[Tensor | None, float]:
    """Guidance as the pair (negative velocity or None, scale) of the op schemas."""
    if guidance is None:
        return None, 1.0
    if not isinstance(guidance, tuple) or len(guidance) != 2:
        raise ValueError(
            f"{op}: guidance is a {type(guidance).__name__}, must be Guidance(negative_velocity, scale)"
        )
    negative_velocity, scale = guidance
    require_tensor(op, "guidance.negative_velocity", negative_velocity)
    return negative_velocity, require_number(op, "guidance.scale", scale)


def real_dtype(latents: Tensor) -> torch.dtype:
    """Dtype of the arithmetic and of everything that is not stored as latents."""
    return torch.float64 if latents.dtype is torch.float64 else torch.float32


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous, whatever the strides of what it is like."""
    return tensor.new_empty(tensor.shape, dtype=dtype)


def per_sample(latents: Tensor, dtype: torch.dtype) -> Tensor:
    """An output of one value a sample."""
    batch = latents.shape[0] if latents.ndim else 1  # the kernel's check names latents without a batch
    return torch.empty(batch, dtype=dtype, device=latents.device)


def workspace(latents: Tensor, chunk: int) -> Tensor | None:
    """Partial sums of the CUDA kernels; the CPU keeps its own."""
    if not latents.is_cuda:
        return None
    elements = latents.numel() // max(latents.shape[0], 1)
    return latents.new_empty((latents.shape[0], max(-(-elements // chunk), 1)), dtype=torch.float64)


def allocated(op: str, allocate: Callable[..., Any], *arguments: Any) -> Any:
    """What `allocate` makes. More than a CPU can give is one ``ValueError``; a GPU's error keeps torch's type."""
    try:
        return allocate(*arguments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        shapes = ", ".join(str(list(value.shape)) for value in arguments if isinstance(value, Tensor))
        message = f"{op}: the results of inputs {shapes} cannot be allocated, must fit into memory"
        raise ValueError(message) from error


def filled(op: str, allocate: Callable[..., Any], fill: Callable[..., None]) -> Forward:
    """The forward of an op that allocates its outputs, then has ``_C`` fill them: ``fill(outputs, *flat)``."""

    def forward(*flat: Any) -> Any:
        outputs = allocated(op, allocate, *flat)
        fill(outputs, *flat)
        return outputs

    return forward


def _has_subclass(values: tuple[Any, ...]) -> bool:
    """Whether one of the values, or of a tuple among them (lists come as such), is a tensor of a foreign type."""
    if _plain.issuperset(map(type, values)):  # three times as fast as looking at each value
        return False
    for value in values:
        if isinstance(value, tuple):
            if _has_subclass(value):
                return True
        elif type(value) not in _plain and isinstance(value, Tensor):
            return True
    return False


def _is_traced(flat: tuple[Any, ...]) -> bool:
    return torch.compiler.is_compiling() or _dispatch_modes() > 0 or _has_subclass(flat)


def _needs_grad(flat: tuple[Any, ...]) -> bool:
    """For arguments that are not traced: their tensors are of plain types, so isinstance() and its cost are spared."""
    if torch.is_grad_enabled():
        for value in flat:
            if type(value) in _plain_tensors and value.requires_grad:
                return True
    return False


class _Last(torch.autograd.Function):
    """A gradient as it is, whose own gradient is an error: without it, that of a constant, which is to say none."""

    @staticmethod
    def forward(ctx: Any, op: str, gradient: Tensor) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise ValueError(f"{ctx.op}: its gradient is differentiated, must be differentiated once only")


def bind(
    name: str,
    schema: str,
    forward: Forward,
    fake: Forward,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    says: str = "",
) -> Forward:
    """Builds the callable of an op whose flat arguments follow `schema`.

    `forward` calls ``_C``; `fake` makes outputs of the same shapes and dtypes without data. With `setup_context` and
    `backward` (as ``torch.library.register_autograd`` takes them) the op is differentiable, once. Errors are those of
    `says`, the function that users call, where it has another name.
    """
    op = says or name
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    forward = on_stored(op, getattr(torch.ops.flowgrpo_fast, name).default._schema, forward)
    for key in ("CPU", "CUDA"):
        _library.impl(name, forward, key)
    torch.library.register_fake(f"flowgrpo_fast::{name}", fake, lib=_library)
    traced = getattr(torch.ops.flowgrpo_fast, name)

    def undifferentiable(*flat: Any) -> Any:
        refuse_tangents(op, flat)
        return traced(*flat) if _is_traced(flat) else forward(*flat)

    if setup_context is None or backward is None:
        return undifferentiable

    def once(ctx: Any, *incoming: Any) -> tuple[Any, ...]:
        gradients = backward(ctx, *incoming)
        if not torch.is_grad_enabled() or _is_traced(gradients):
            return gradients
        return tuple(g if g is None else _Last.apply(op, g.detach().requires_grad_()) for g in gradients)

    torch.library.register_autograd(f"flowgrpo_fast::{name}", once, setup_context=setup_context, lib=_library)

    def forward_in_context(ctx: Any, *flat: Any) -> Any:
        # With setup_context on its own, apply() inspects signatures at every call, which costs more than a small op.
        outputs = forward(*flat)
        setup_context(ctx, flat, outputs)
        return outputs

    members = {"forward": staticmethod(forward_in_context), "backward": staticmethod(once)}
    function: Any = type(name, (torch.autograd.Function,), members)

    def call(*flat: Any) -> Any:
        refuse_tangents(op, flat)
        if _is_traced(flat):
            return traced(*flat)
        if not _needs_grad(flat):
            return forward(*flat)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise ValueError(
                f"{op}: is called under a torch.func transform, must be differentiated by torch.autograd"
            )
        return function.apply(*flat)

    return call
