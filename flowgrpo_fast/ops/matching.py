"""Residuals of the forward process: what losses without a trajectory or a log-probability are made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowgrpo_fast import _C
from flowgrpo_fast.ops._binding import (
    bind,
    empty_like,
    filled,
    per_sample,
    real_dtype,
    require_number,
    require_tensor,
)
from flowgrpo_fast.ops.flow_step import CHUNK


class Matching(NamedTuple):
    """What `matching` returns: ``[B]`` each, float32 (float64 for float64 velocities)."""

    error: Tensor
    error_abs: Tensor  # constant to the gradient, as all that ends so
    old_error: Tensor | None  # these with an old velocity only
    old_error_abs: Tensor | None
    old_drift: Tensor | None
    reference_drift: Tensor | None  # these with a reference velocity only
    reference_error: Tensor | None


class ImplicitMatching(NamedTuple):
    """What `implicit_matching` returns: ``[B]`` each, float32 (float64 for float64 velocities)."""

    positive: Tensor
    positive_abs: Tensor  # constant to the gradient
    negative: Tensor
    negative_abs: Tensor
    reference_drift: Tensor | None  # with a reference velocity only


# Outputs in the order of the kernels, by what they need, and the incoming gradients of the backward.
_OWN, _OLD, _REFERENCE = Matching._fields[:2], Matching._fields[2:5], Matching._fields[5:]
_DIFFERENTIABLE = ("error", "old_drift", "positive", "negative", "reference_drift")


def _names(
    old_velocity: Tensor | None, reference_velocity: Tensor | None, beta: float | None
) -> tuple[str, ...]:
    """Of the means that are computed."""
    if beta is not None:
        return ImplicitMatching._fields if reference_velocity is not None else ImplicitMatching._fields[:4]
    old = _OLD if old_velocity is not None else ()
    return _OWN + old + (_REFERENCE if reference_velocity is not None else ())


def _allocate(
    velocity: Tensor,
    target: Tensor,
    old_velocity: Tensor | None,
    reference_velocity: Tensor | None,
    weight: Tensor | None,
    beta: float | None,
) -> tuple[Tensor, ...]:
    first = per_sample(velocity, real_dtype(velocity))
    names = _names(old_velocity, reference_velocity, beta)
    return (first, *[empty_like(first) for _ in names[1:]])


def _workspace(velocity: Tensor, num_means: int) -> Tensor | None:
    """Partial sums of the CUDA kernels; the CPU keeps its own."""
    if not velocity.is_cuda:
        return None
    batch = velocity.shape[0] if velocity.ndim else 1
    chunks = -(-velocity.numel() // max(batch * CHUNK, 1))
    return velocity.new_empty((num_means, batch, chunks), dtype=torch.float64)


def _fill(means: tuple[Tensor, ...], *flat: Any) -> None:
    velocity, beta = flat[0], flat[-1]
    _C.matching(flat[:-1], beta, means, _workspace(velocity, len(means)), torch.get_num_threads())


def _allocate_gradient(*flat: Any) -> Tensor:
    return empty_like(flat[0])


def _backward_fill(gradient: Tensor, *flat: Any) -> None:
    inputs, beta, incoming = flat[:5], flat[5], flat[6:]
    _C.matching_backward(inputs, beta, incoming, gradient, torch.get_num_threads())


_SCHEMA = (
    "Tensor velocity, Tensor target, Tensor? old_velocity, Tensor? reference_velocity, Tensor? weight, "
    "float? beta"
)

_backward_op = bind(
    "matching_backward",
    f"({_SCHEMA}, {', '.join(f'Tensor? grad_{name}' for name in _DIFFERENTIABLE)}) -> Tensor",
    filled("matching", _allocate_gradient, _backward_fill),
    _allocate_gradient,
    says="matching",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])
    ctx.beta = inputs[5]
    names = _names(inputs[2], inputs[3], inputs[5])
    ctx.mark_non_differentiable(
        *(mean for mean, name in zip(output, names, strict=True) if name not in _DIFFERENTIABLE)
    )


def _backward(ctx: Any, *incoming: Any) -> tuple[Any, ...]:
    grads = incoming[0] if isinstance(incoming[0], list) else incoming  # a traced op's outputs are one list
    inputs = ctx.saved_tensors
    given = dict(zip(_names(inputs[2], inputs[3], ctx.beta), grads, strict=True))
    wanted = (given.get(name) for name in _DIFFERENTIABLE)
    return _backward_op(*inputs, ctx.beta, *wanted), None, None, None, None, None


_op = bind(
    "matching",
    f"({_SCHEMA}) -> Tensor[]",
    filled("matching", _allocate, _fill),
    _allocate,
    _setup_context,
    _backward,
)


def matching(
    velocity: Tensor,
    target: Tensor,
    *,
    old_velocity: Tensor | None = None,
    reference_velocity: Tensor | None = None,
    weight: Tensor | None = None,
) -> Matching:
    r"""How far velocity predictions are from the target and from each other, sample by sample, in one pass.

    With ``u`` the target (``noise - clean`` of a linear path) and ``mean`` over the elements of a sample::

        error           = mean(weight * (velocity - u)^2)
        error_abs       = mean(weight * |velocity - u|)
        old_error       = mean(weight * (old_velocity - u)^2)
        old_error_abs   = mean(weight * |old_velocity - u|)
        old_drift       = mean(weight * (velocity - old_velocity)^2)
        reference_drift = mean(weight * (velocity - reference_velocity)^2)
        reference_error = mean(weight * (reference_velocity - u)^2)

    From these numbers come AWM (arXiv:2509.25050), Diffusion-DPO (arXiv:2311.12908), DGPO (arXiv:2510.08425), CRD
    (arXiv:2603.14128), V-GRPO (arXiv:2604.23380) and the KL between velocities; for DiffusionNFT see
    `implicit_matching`. Means of absolute values are the adaptive weights of these losses, and constants to the
    gradient.

    Losses on the clean sample need no other call. The prediction ``x0 = x - sigma * velocity`` differs from the clean
    sample ``x - sigma * u`` by ``-sigma`` times the residual of the velocity: means of squares are to be multiplied by
    ``sigma^2``, those of absolute values by ``sigma``. So the self-normalised error of V-GRPO is ``sigma * error /
    error_abs``, and a floor under the absolute mean belongs under ``sigma * error_abs``.

    The mean is over all elements, whatever the weights; divide by their own mean for a weighted average.

    The backward is in closed form, one pass for all outputs together. Only `velocity` gets a gradient (the others are
    treated as constants), and it is not differentiable again.

    Args:
        velocity: ``[B, *S]``; float32, bfloat16, float16 or float64.
        target: ``[B, *S]``; any of these, as the other velocities (float64 only if all tensors are).
        old_velocity: ``[B, *S]``; asks for ``old_*``.
        reference_velocity: ``[B, *S]``; asks for ``reference_*``. With guidance, the guided one.
        weight: float32 (float64 for float64 velocities), shape of `velocity` with 1 in place of the batch or of
            neighbouring axes: ``[B, 1, H, W]``, ``[B, 1, T, H, W]``, packed ``[B, L, 1]``, or whole.

    Returns:
        `Matching`, ``[B]`` float32 (float64 for float64 velocities) each, None for what was not asked for.

    Raises:
        ValueError: wrong shape, dtype, device or layout.
    """
    require_tensor("matching", "velocity", velocity)
    means = _op(velocity, target, old_velocity, reference_velocity, weight, None)
    own, rest = means[:2], means[2:]
    old, reference = (rest[:3], rest[3:]) if old_velocity is not None else ((None,) * 3, rest)
    return Matching(*own, *old, *(reference if reference_velocity is not None else (None, None)))


def implicit_matching(
    velocity: Tensor,
    target: Tensor,
    old_velocity: Tensor,
    beta: float,
    *,
    reference_velocity: Tensor | None = None,
    weight: Tensor | None = None,
) -> ImplicitMatching:
    r"""How far the implicit positive and negative predictions of DiffusionNFT (arXiv:2509.16117) are from the target.

    With ``v+ = (1 - beta) * old_velocity + beta * velocity``, ``v- = (1 + beta) * old_velocity - beta * velocity`` and
    the rest as in `matching`::

        positive        = mean(weight * (v+ - u)^2)
        positive_abs    = mean(weight * |v+ - u|)
        negative        = mean(weight * (v- - u)^2)
        negative_abs    = mean(weight * |v- - u|)
        reference_drift = mean(weight * (velocity - reference_velocity)^2)

    The loss on velocities is made of ``positive / positive_abs`` and ``negative / negative_abs``, that on the clean
    sample of ``sigma`` times these; per-objective losses (ParetoSlider, arXiv:2604.20816) share them.

    Args:
        velocity: as for `matching`, as the others.
        target: ``[B, *S]``.
        old_velocity: ``[B, *S]``.
        beta: how far the implicit predictions lie from `old_velocity`.
        reference_velocity: ``[B, *S]``; asks for ``reference_drift``.
        weight: shape of `velocity`, with 1 in place of the batch or of neighbouring axes.

    Returns:
        `ImplicitMatching`, ``[B]`` float32 (float64 for float64 velocities) each.

    Raises:
        ValueError: wrong shape, dtype, device, layout or beta.
    """
    require_tensor("implicit_matching", "velocity", velocity)
    beta = require_number("implicit_matching", "beta", beta)
    means = _op(velocity, target, old_velocity, reference_velocity, weight, beta)
    return ImplicitMatching(*means, *(() if reference_velocity is not None else (None,)))
