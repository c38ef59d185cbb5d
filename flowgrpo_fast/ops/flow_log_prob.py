"""Replay of a transition: the log-probability of given next latents, differentiable in the velocity."""

from __future__ import annotations

from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from flowgrpo_fast import _C
from flowgrpo_fast.ops._binding import (
    TRANSITION_SCHEMA,
    Guidance,
    Transition,
    bind,
    empty_like,
    filled,
    per_sample,
    real_dtype,
    require_bool,
    require_tensor,
    split_flat,
    split_guidance,
    split_step,
    workspace,
)
from flowgrpo_fast.ops.flow_step import CHUNK


class Extras(NamedTuple):
    """What `flow_log_prob` computes besides the log-probability."""

    mean: bool = False  # whether to return the mean
    reference_velocity: Tensor | None = None  # [B, *S]: asks for the drift from it
    reference_negative: Tensor | None = None  # [B, *S]: its unconditional half, guided with the same scale
    map_axis: int | None = None  # 1 or -1, the channel axis: asks for the log-probability of every position


class FlowLogProbOutput(NamedTuple):
    """What `flow_log_prob` returns where extras are asked for; the others are None."""

    log_prob: Tensor  # [B], float32 (float64 for float64 latents), as the following
    mean: Tensor | None  # [B, *S]
    drift: Tensor | None  # [B]
    log_prob_map: Tensor | None  # [B, *S without the channel axis]


_EXTRAS_SCHEMA = "Tensor? reference_velocity, Tensor? reference_negative, SymInt map_axis"
_NO_MAP = 0  # the batch's axis, which cannot be the channels'


def _allocate(*flat: Any) -> Tensor:
    return per_sample(flat[0], real_dtype(flat[0]))


def _fill(log_prob: Tensor, *flat: Any) -> None:
    transition, (next_latents,) = split_flat(flat)
    written = (log_prob, workspace(transition.latents, CHUNK))
    _C.flow_log_prob(transition, next_latents, written, (), torch.get_num_threads())


def _map_shape(latents: Tensor, axis: int) -> tuple[int, ...]:
    return (*latents.shape[:1], *latents.shape[2:]) if axis == 1 else tuple(latents.shape[:-1])


def _allocate_extras(*flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    latents, (return_mean, reference_velocity, _, map_axis) = flat[0], flat[-4:]
    real = real_dtype(latents)
    absent = (0,)
    return (
        per_sample(latents, real),
        latents.new_empty(latents.shape if return_mean else absent, dtype=real),
        latents.new_empty(latents.shape[:1] if reference_velocity is not None else absent, dtype=real),
        latents.new_empty(_map_shape(latents, map_axis) if map_axis != _NO_MAP else absent, dtype=real),
    )


def _fill_extras(outputs: tuple[Tensor, Tensor, Tensor, Tensor], *flat: Any) -> None:
    transition, (next_latents, return_mean, reference_velocity, reference_negative, map_axis) = split_flat(
        flat
    )
    log_prob, mean, drift, log_prob_map = outputs
    with_drift = reference_velocity is not None
    extras = (
        mean if return_mean else None,
        reference_velocity,
        reference_negative,
        drift if with_drift else None,
        workspace(transition.latents, CHUNK) if with_drift else None,
        log_prob_map if map_axis != _NO_MAP else None,
        map_axis,
    )
    written = (log_prob, workspace(transition.latents, CHUNK))
    _C.flow_log_prob(transition, next_latents, written, extras, torch.get_num_threads())


def _allocate_gradients(*flat: Any) -> list[Tensor]:
    return [empty_like(flat[1]) for needed in flat[-2:] if needed]


def _backward_fill(outputs: list[Tensor], *flat: Any) -> None:
    transition, rest = split_flat(flat)
    next_latents, *incoming, reference_velocity, reference_negative, map_axis = rest[:-2]
    need_velocity, need_negative = rest[-2:]
    grad_log_prob, grad_mean, grad_drift, grad_map = incoming
    gradients = (
        grad_log_prob,
        outputs[0] if need_velocity else None,
        outputs[-1] if need_negative else None,
    )
    extras: tuple[Any, ...] = ()
    if not (grad_mean is None and grad_drift is None and grad_map is None):
        extras = (grad_mean, reference_velocity, reference_negative, grad_drift, grad_map, map_axis)
    _C.flow_log_prob_backward(transition, next_latents, gradients, extras, torch.get_num_threads())


_backward_op = bind(
    "flow_log_prob_backward",
    f"({TRANSITION_SCHEMA}, Tensor next_latents, Tensor? grad_log_prob, Tensor? grad_mean, Tensor? grad_drift, "
    f"Tensor? grad_map, {_EXTRAS_SCHEMA}, bool need_velocity, bool need_negative) -> Tensor[]",
    filled("flow_log_prob", _allocate_gradients, _backward_fill),
    _allocate_gradients,
    says="flow_log_prob",
)


def _save(ctx: Any, inputs: tuple[Any, ...], reference: tuple[Tensor | None, Tensor | None]) -> None:
    latents, velocity, coeffs, step, step_index, negative_velocity, guidance_scale, x0_prev = inputs[:8]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        latents, velocity, coeffs, step_index, negative_velocity, x0_prev, inputs[8], *reference
    )
    ctx.step, ctx.guidance_scale, ctx.num_inputs = step, guidance_scale, len(inputs)


def _gradients(ctx: Any, incoming: tuple[Tensor | None, ...], map_axis: int) -> tuple[Any, ...]:
    """The gradients of all inputs, from those of log_prob, mean, drift and map."""
    latents, velocity, coeffs, step_index, negative, x0_prev, next_latents, *reference = ctx.saved_tensors
    need_velocity, need_negative = ctx.needs_input_grad[1], ctx.needs_input_grad[5]
    transition = (latents, velocity, coeffs, ctx.step, step_index, negative, ctx.guidance_scale, x0_prev)
    found = _backward_op(
        *transition, next_latents, *incoming, *reference, map_axis, need_velocity, need_negative
    )
    gradients: list[Any] = [None] * ctx.num_inputs
    if need_velocity:
        gradients[1] = found[0]
    if need_negative:
        gradients[5] = found[-1]
    return tuple(gradients)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs, (None, None))


def _backward(ctx: Any, grad_log_prob: Tensor | None) -> tuple[Any, ...]:
    return _gradients(ctx, (grad_log_prob, None, None, None), _NO_MAP)


def _setup_context_extras(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    return_mean, reference_velocity, reference_negative, map_axis = inputs[-4:]
    _save(ctx, inputs, (reference_velocity, reference_negative))
    ctx.map_axis = map_axis
    ctx.asked = (True, return_mean, reference_velocity is not None, map_axis != _NO_MAP)
    ctx.mark_non_differentiable(
        *(tensor for tensor, asked in zip(output, ctx.asked, strict=True) if not asked)
    )


def _backward_extras(ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
    asked = tuple(grad if asked else None for grad, asked in zip(incoming, ctx.asked, strict=True))
    return _gradients(ctx, asked, ctx.map_axis)


_op = bind(
    "flow_log_prob",
    f"({TRANSITION_SCHEMA}, Tensor next_latents) -> Tensor",
    filled("flow_log_prob", _allocate, _fill),
    _allocate,
    _setup_context,
    _backward,
)

_op_extras = bind(
    "flow_log_prob_extras",
    f"({TRANSITION_SCHEMA}, Tensor next_latents, bool return_mean, {_EXTRAS_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    filled("flow_log_prob", _allocate_extras, _fill_extras),
    _allocate_extras,
    _setup_context_extras,
    _backward_extras,
    says="flow_log_prob",
)


def _check_extras(extras: Extras, latents: Tensor, guided: bool) -> int:
    """The channel axis of the map, not negative, or `_NO_MAP`.

    Raises:
        ValueError: no `Extras`, an axis that is neither 1 nor the last of latents that have it, or a negative that
            nothing scales.
    """
    if not isinstance(extras, Extras):
        raise ValueError(f"flow_log_prob: extras is a {type(extras).__name__}, must be Extras(...)")
    require_bool("flow_log_prob", "extras.mean", extras.mean)
    if extras.reference_velocity is not None:
        require_tensor("flow_log_prob", "extras.reference_velocity", extras.reference_velocity)
    if extras.reference_negative is not None:
        require_tensor("flow_log_prob", "extras.reference_negative", extras.reference_negative)
        if extras.reference_velocity is None or not guided:
            raise ValueError(
                "flow_log_prob: extras.reference_negative is given alone, "
                "must come with reference_velocity and guidance"
            )
    if extras.map_axis is None:
        return _NO_MAP
    if latents.ndim < 2:
        raise ValueError(f"flow_log_prob: latents has {latents.ndim} dimension(s), must be [batch, ...]")
    if not isinstance(extras.map_axis, int) or extras.map_axis not in (1, -1, latents.ndim - 1):
        raise ValueError(f"flow_log_prob: extras.map_axis is {extras.map_axis}, must be 1 or -1")
    return extras.map_axis % latents.ndim


@overload
def flow_log_prob(
    latents: Tensor,
    velocity: Tensor,
    next_latents: Tensor,
    coeffs: Tensor,
    step_index: int | Tensor,
    guidance: Guidance | None = ...,
    x0_prev: Tensor | None = ...,
    extras: None = ...,
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
    extras: Extras,
) -> FlowLogProbOutput: ...


def flow_log_prob(
    latents: Tensor,
    velocity: Tensor,
    next_latents: Tensor,
    coeffs: Tensor,
    step_index: int | Tensor,
    guidance: Guidance | None = None,
    x0_prev: Tensor | None = None,
    extras: Extras | None = None,
) -> Tensor | FlowLogProbOutput:
    r"""Log-probability of a transition that was taken, in one pass; the replay of `flow_step`.

    With ``sigma, a, b, c, d, inv_var, log_norm = coeffs[step_index]`` and ``v`` as in `flow_step`::

        mean     = a * latents + b * v + d * x0_prev
        log_prob = -1/2 * inv_var * mean_over_elements((next_latents - mean)^2) + log_norm

    On the tensors of a `flow_step` it returns that step's ``log_prob`` bit for bit, whatever else is asked for.
    `extras` adds the mean, and::

        drift        = mean_over_elements((mean - reference_mean)^2) = b^2 * mean_over_elements((v - v_reference)^2)
        log_prob_map = -1/2 * inv_var * mean_over_channels((next_latents - mean)^2) + log_norm

    ``drift * inv_var / 2`` is the KL divergence between the two transitions a latent element; GRPO-Guard
    (arXiv:2510.22319) and Flow-DPPO (arXiv:2606.11025) take it from the old policy. ``v_reference`` is
    `reference_velocity` as it is, or guided like `velocity` where `reference_negative` is given. The map's mean over
    positions is ``log_prob`` up to rounding; ViPO (arXiv:2511.18719) weighs ratios by position. It costs a second
    pass over the latents, except where it is asked for alone, channels first, on a CPU with samples for most threads.

    The backward is in closed form, one pass whatever is asked for, with ``D`` elements a sample and ``C`` channels::

        d log_prob / d v     = inv_var * b * (next_latents - mean) / D
        d mean / d v         = b
        d drift / d v        = 2 * b^2 * (v - v_reference) / D
        d log_prob_map / d v = inv_var * b * (next_latents - mean) / C

    times ``scale`` for `velocity` and ``1 - scale`` for the negative velocity. Only these two get gradients (the others
    are treated as constants), and the backward is not differentiable again.

    Args:
        latents: ``[B, *S]``; float32, bfloat16, float16 or float64.
        velocity: ``[B, *S]``; any of these (float64 only if all tensors are).
        next_latents: ``[B, *S]``, the stored next latents; any of these.
        coeffs: ``[T, 8]`` float32, rows ``(sigma, a, b, c, d, inv_var, log_norm, 0)``.
        step_index: row of the table; an int, or an int64 tensor, 0-d or ``[B]``.
        guidance: negative velocity (dtype of `velocity`) and scale.
        x0_prev: ``[B, *S]`` float32 (float64 for float64 latents).
        extras: what else to compute: ``mean``; ``reference_velocity`` ``[B, *S]``, any of these dtypes (and
            ``reference_negative`` of the same, with `guidance`); ``map_axis``, 1 for ``[B, C, *S]``, -1 for packed
            ``[B, L, C]``.

    Returns:
        ``log_prob`` ``[B]`` float32 (float64 for float64 latents), or with `extras` a `FlowLogProbOutput` of that dtype
        with ``mean`` ``[B, *S]``, ``drift`` ``[B]``, ``log_prob_map`` ``[B, *S]`` without the channel axis, None where
        not asked for.

    Raises:
        ValueError: wrong shape, dtype, device, layout, step or axis. (A step outside the table in a CUDA tensor, which
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
    if extras is None:
        return _op(*transition, next_latents)
    map_axis = _check_extras(extras, latents, guidance is not None)
    log_prob, mean, drift, log_prob_map = _op_extras(
        *transition, next_latents, extras.mean, extras.reference_velocity, extras.reference_negative, map_axis
    )
    return FlowLogProbOutput(
        log_prob,
        mean if extras.mean else None,
        drift if extras.reference_velocity is not None else None,
        log_prob_map if extras.map_axis is not None else None,
    )
