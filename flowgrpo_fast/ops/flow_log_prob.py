"""Replay of a transition: the log-probability of given next latents, differentiable in the velocity."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from flowgrpo_fast import _C
from flowgrpo_fast.ops._binding import (
    TRANSITION_SCHEMA,
    Guidance,
    Transition,
    bind,
    per_sample,
    real_dtype,
    require_tensor,
    split_flat,
    split_guidance,
    split_step,
    workspace,
)
from flowgrpo_fast.ops.flow_step import CHUNK


def _allocate(*flat: Any) -> tuple[Tensor, Tensor]:
    latents, return_mean = flat[0], flat[-1]
    real = real_dtype(latents)
    mean = (
        torch.empty_like(latents, dtype=real)
        if return_mean
        else torch.empty(0, dtype=real, device=latents.device)
    )
    return per_sample(latents, real), mean


def _forward(*flat: Any) -> tuple[Tensor, Tensor]:
    transition, (next_latents, return_mean) = split_flat(flat)
    log_prob, mean = outputs = _allocate(*flat)
    written = (log_prob, mean if return_mean else None, workspace(transition.latents, CHUNK))
    _C.flow_log_prob(transition, next_latents, written, torch.get_num_threads())
    return outputs


def _allocate_gradients(*flat: Any) -> tuple[Tensor, Tensor]:
    velocity, (need_velocity, need_negative) = flat[1], flat[-2:]
    return (
        torch.empty_like(velocity)
        if need_velocity
        else torch.empty(0, dtype=velocity.dtype, device=velocity.device),
        torch.empty_like(velocity)
        if need_negative
        else torch.empty(0, dtype=velocity.dtype, device=velocity.device),
    )


def _backward_forward(*flat: Any) -> tuple[Tensor, Tensor]:
    transition, (next_latents, grad_log_prob, grad_mean, need_velocity, need_negative) = split_flat(flat)
    grad_velocity, grad_negative = outputs = _allocate_gradients(*flat)
    gradients = (
        None if grad_log_prob is None else grad_log_prob.contiguous(),
        None if grad_mean is None else grad_mean.contiguous(),
        grad_velocity if need_velocity else None,
        grad_negative if need_negative else None,
    )
    _C.flow_log_prob_backward(transition, next_latents, gradients, torch.get_num_threads())
    return outputs


_backward_op = bind(
    "flow_log_prob_backward",
    f"({TRANSITION_SCHEMA}, Tensor next_latents, Tensor? grad_log_prob, Tensor? grad_mean, bool need_velocity, "
    "bool need_negative) -> (Tensor, Tensor)",
    _backward_forward,
    _allocate_gradients,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    transition, (next_latents, return_mean) = split_flat(inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        transition.latents,
        transition.velocity,
        transition.coeffs,
        transition.step_index,
        transition.negative_velocity,
        transition.x0_prev,
        next_latents,
    )
    ctx.step, ctx.guidance_scale, ctx.return_mean = transition.step, transition.guidance_scale, return_mean
    if not return_mean:
        ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_log_prob: Tensor | None, grad_mean: Tensor | None) -> tuple[Any, ...]:
    latents, velocity, coeffs, step_index, negative_velocity, x0_prev, next_latents = ctx.saved_tensors
    need_velocity, need_negative = ctx.needs_input_grad[1], ctx.needs_input_grad[5]
    transition = Transition(
        latents, velocity, coeffs, ctx.step, step_index, negative_velocity, ctx.guidance_scale, x0_prev
    )
    if not ctx.return_mean:
        grad_mean = None
    grad_velocity, grad_negative = _backward_op(
        *transition, next_latents, grad_log_prob, grad_mean, need_velocity, need_negative
    )
    gradients: list[Any] = [None] * (len(transition) + 2)
    gradients[1] = grad_velocity if need_velocity else None
    gradients[5] = grad_negative if need_negative else None
    return tuple(gradients)


_op = bind(
    "flow_log_prob",
    f"({TRANSITION_SCHEMA}, Tensor next_latents, bool return_mean) -> (Tensor, Tensor)",
    _forward,
    _allocate,
    _setup_context,
    _backward,
)


@overload
def flow_log_prob(
    latents: Tensor,
    velocity: Tensor,
    next_latents: Tensor,
    coeffs: Tensor,
    step_index: int | Tensor,
    guidance: Guidance | None = ...,
    x0_prev: Tensor | None = ...,
    return_mean: Literal[False] = ...,
) -> Tensor: ...


@overload
def flow_log_prob(
    latents: Tensor,
    velocity: Tensor,
    next_latents: Tensor,
    coeffs: Tensor,
    step_index: int | Tensor,
    guidance: Guidance | None = ...,
    x0_prev: Tensor | None = ...,
    *,
    return_mean: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def flow_log_prob(
    latents: Tensor,
    velocity: Tensor,
    next_latents: Tensor,
    coeffs: Tensor,
    step_index: int | Tensor,
    guidance: Guidance | None = None,
    x0_prev: Tensor | None = None,
    return_mean: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-probability of a transition that was taken, in one pass; the replay of `flow_step`.

    With ``sigma, a, b, c, d, inv_var, log_norm = coeffs[step_index]`` and ``v`` as in `flow_step`::

        mean     = a * latents + b * v + d * x0_prev
        log_prob = -1/2 * inv_var * mean_over_elements((next_latents - mean)^2) + log_norm

    On the tensors of a `flow_step` it returns that step's ``log_prob`` bit for bit. The backward is in closed form, one
    pass: ``d log_prob / d v = inv_var * b * (next_latents - mean) / D`` for ``D`` elements a sample,
    ``d mean / d v = b``; times ``scale`` for `velocity` and ``1 - scale`` for the negative velocity. Only these two get
    gradients (the others are treated as constants), and the backward is not differentiable again.

    Args:
        latents: ``[B, *S]``, contiguous; float32, bfloat16, float16 or float64.
        velocity: ``[B, *S]``; any of these (float64 only if all tensors are).
        next_latents: ``[B, *S]``, the stored next latents; any of these.
        coeffs: ``[T, 8]`` float32, rows ``(sigma, a, b, c, d, inv_var, log_norm, 0)``.
        step_index: row of the table; an int, or an int64 tensor, 0-d or ``[B]``.
        guidance: negative velocity (dtype of `velocity`) and scale.
        x0_prev: ``[B, *S]`` float32 (float64 for float64 latents).
        return_mean: whether to return the mean too.

    Returns:
        ``log_prob`` ``[B]`` float32 (float64 for float64 latents), or ``(log_prob, mean)`` with ``mean`` ``[B, *S]``.

    Raises:
        ValueError: wrong shape, dtype, device, layout or step. (A step outside the table in a CUDA tensor, which
            nobody on the host reads, gives NaN instead.)
    """
    require_tensor("flow_log_prob", "latents", latents)
    transition = Transition(
        latents,
        velocity,
        coeffs,
        *split_step("flow_log_prob", "step_index", step_index),
        *split_guidance("flow_log_prob", guidance),
        x0_prev,
    )
    log_prob, mean = _op(*transition, next_latents, return_mean)
    return (log_prob, mean) if return_mean else log_prob
