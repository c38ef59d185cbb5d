"""Residuals of the forward process: what losses without a trajectory or a log-probability are made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowgrpo_fast import _C
from flowgrpo_fast.ops._binding import bind, per_sample, real_dtype, require_tensor
from flowgrpo_fast.ops.flow_step import CHUNK


class Matching(NamedTuple):
    """What `matching` returns: ``[B]`` each, float32 (float64 for float64 velocities), None without its velocity."""

    error: Tensor
    error_abs: Tensor  # constant, as everything that does not contain the velocity's square
    old_error: Tensor | None = None
    old_error_abs: Tensor | None = None
    old_drift: Tensor | None = None
    positive: Tensor | None = None
    positive_abs: Tensor | None = None
    negative: Tensor | None = None
    negative_abs: Tensor | None = None
    reference_error: Tensor | None = None
    reference_drift: Tensor | None = None


# In the order of the kernels' means.
_OWN = ("error", "error_abs")
_OLD = Matching._fields[2:9]
_REFERENCE = Matching._fields[9:]
# In the order of the backward's incoming gradients.
_DIFFERENTIABLE = ("error", "old_drift", "positive", "negative", "reference_drift")


def _names(with_old: bool, with_reference: bool) -> tuple[str, ...]:
    return _OWN + (_OLD if with_old else ()) + (_REFERENCE if with_reference else ())


def _allocate(
    velocity: Tensor,
    target: Tensor,
    old_velocity: Tensor | None,
    reference_velocity: Tensor | None,
    weight: Tensor | None,
    beta: float,
) -> tuple[Tensor, ...]:
    first = per_sample(velocity, real_dtype(velocity))
    names = _names(old_velocity is not None, reference_velocity is not None)
    return (first, *(torch.empty_like(first) for _ in names[1:]))


def _workspace(velocity: Tensor, num_means: int) -> Tensor | None:
    """Partial sums of the CUDA kernels; the CPU keeps its own."""
    if not velocity.is_cuda:
        return None
    batch = velocity.shape[0] if velocity.ndim else 1
    chunks = -(-velocity.numel() // max(batch * CHUNK, 1))
    return velocity.new_empty((num_means, batch, chunks), dtype=torch.float64)


def _forward(*flat: Any) -> tuple[Tensor, ...]:
    velocity, beta = flat[0], flat[-1]
    means = _allocate(*flat)
    _C.matching(flat[:-1], beta, means, _workspace(velocity, len(means)), torch.get_num_threads())
    return means


def _allocate_gradient(*flat: Any) -> Tensor:
    return torch.empty_like(flat[0])


def _backward_forward(*flat: Any) -> Tensor:
    inputs, beta, incoming = flat[:5], flat[5], flat[6:]
    gradient = _allocate_gradient(*flat)
    grads = tuple(grad if grad is None else grad.contiguous() for grad in incoming)
    _C.matching_backward(inputs, beta, grads, gradient, torch.get_num_threads())
    return gradient


_SCHEMA = "Tensor velocity, Tensor target, Tensor? old_velocity, Tensor? reference_velocity, Tensor? weight, float beta"

_backward_op = bind(
    "matching_backward",
    f"({_SCHEMA}, {', '.join(f'Tensor? grad_{name}' for name in _DIFFERENTIABLE)}) -> Tensor",
    _backward_forward,
    _allocate_gradient,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])
    ctx.beta = inputs[5]
    names = _names(inputs[2] is not None, inputs[3] is not None)
    ctx.mark_non_differentiable(
        *(mean for mean, name in zip(output, names, strict=True) if name not in _DIFFERENTIABLE)
    )


def _backward(ctx: Any, *incoming: Any) -> tuple[Any, ...]:
    grads = incoming[0] if isinstance(incoming[0], list) else incoming  # a traced op's outputs are one list
    inputs = ctx.saved_tensors
    given = dict(zip(_names(inputs[2] is not None, inputs[3] is not None), grads, strict=True))
    wanted = (given.get(name) for name in _DIFFERENTIABLE)
    return _backward_op(*inputs, ctx.beta, *wanted), None, None, None, None, None


_op = bind("matching", f"({_SCHEMA}) -> Tensor[]", _forward, _allocate, _setup_context, _backward)


def matching(
    velocity: Tensor,
    target: Tensor,
    *,
    old_velocity: Tensor | None = None,
    reference_velocity: Tensor | None = None,
    weight: Tensor | None = None,
    beta: float = 1.0,
) -> Matching:
    r"""How far velocity predictions are from the target and from each other, sample by sample, in one pass.

    With ``u`` the target (``noise - clean`` of a linear path), ``v+ = (1 - beta) * old_velocity + beta * velocity``,
    ``v- = (1 + beta) * old_velocity - beta * velocity`` and ``mean`` over the elements of a sample::

        error           = mean(weight * (velocity - u)^2)
        old_error       = mean(weight * (old_velocity - u)^2)
        old_drift       = mean(weight * (velocity - old_velocity)^2)
        positive        = mean(weight * (v+ - u)^2)
        negative        = mean(weight * (v- - u)^2)
        reference_error = mean(weight * (reference_velocity - u)^2)
        reference_drift = mean(weight * (velocity - reference_velocity)^2)

    and ``error_abs``, ``old_error_abs``, ``positive_abs``, ``negative_abs``, the same means of absolute values: the
    adaptive weights of the losses, constants to the gradient. From these ``[B]`` numbers come the losses of
    DiffusionNFT (arXiv:2509.16117), AWM (arXiv:2509.25050), Diffusion-DPO (arXiv:2311.12908), DGPO (arXiv:2510.08425),
    CRD (arXiv:2603.14128) and V-GRPO (arXiv:2604.23380), and the KL between velocities.

    Losses on the clean sample need no other call. The prediction ``x0 = x - sigma * v`` differs from the clean sample
    ``x - sigma * u`` by ``-sigma`` times the residual of the velocity: means of squares are to be multiplied by
    ``sigma^2``, those of absolute values by ``sigma``. So the self-normalised error ``mean((x0 - clean)^2) /
    mean(|x0 - clean|)`` is ``sigma * error / error_abs``, and a floor under the absolute mean belongs under
    ``sigma * error_abs``.

    The mean is over all elements, whatever the weights; divide by ``weight``'s own mean for a weighted average.

    The backward is in closed form, one pass for all outputs together. Only `velocity` gets a gradient (the others are
    treated as constants), and it is not differentiable again.

    Args:
        velocity: ``[B, *S]``, contiguous; float32, bfloat16, float16 or float64.
        target: ``[B, *S]``; any of these, as the other velocities (float64 only if all tensors are).
        old_velocity: ``[B, *S]``; asks for ``old_*``, ``positive*`` and ``negative*``.
        reference_velocity: ``[B, *S]``; asks for ``reference_*``. With guidance, the guided one.
        weight: float32 (float64 for float64 velocities), shape of `velocity` with 1 in place of the batch or of
            neighbouring axes: ``[B, 1, H, W]``, ``[B, 1, T, H, W]``, packed ``[B, L, 1]``, or whole.
        beta: how far ``v+`` and ``v-`` lie from `old_velocity`.

    Returns:
        `Matching`, ``[B]`` float32 (float64 for float64 velocities) each, None for what was not asked for.

    Raises:
        ValueError: wrong shape, dtype, device, layout or beta.
    """
    require_tensor("matching", "velocity", velocity)
    if not isinstance(beta, (int, float, torch.SymFloat)):
        raise ValueError(f"matching: beta is a {type(beta).__name__}, must be a number")
    means = _op(velocity, target, old_velocity, reference_velocity, weight, float(beta))
    return Matching(
        **dict(zip(_names(old_velocity is not None, reference_velocity is not None), means, strict=True))
    )
