"""The transition: mean, noise, log-probability and x0 prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from flowgrpo_fast.ops._binding import Guidance


def _row(coeffs: Tensor, step_index: int | Tensor, latents: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """sigma, a, b, c, d, inv_var, log_norm, shaped to broadcast over the latents."""
    index = torch.as_tensor(step_index, device=coeffs.device)
    row = coeffs[index].to(dtype).expand(latents.shape[0], coeffs.shape[1])
    return tuple(row[:, i].reshape(-1, *[1] * (latents.ndim - 1)) for i in range(7))


def guided_velocity(velocity: Tensor, guidance: Guidance | None, dtype: torch.dtype) -> Tensor:
    """``negative + scale * (velocity - negative)``, or the velocity itself."""
    velocity = velocity.to(dtype)
    if guidance is None:
        return velocity
    negative = guidance[0].to(dtype)
    return negative + guidance[1] * (velocity - negative)


def transition_mean(
    latents: Tensor,
    velocity: Tensor,
    coeffs: Tensor,
    step_index: int | Tensor,
    x0_prev: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``a * latents + b * velocity + d * x0_prev``."""
    _, a, b, _, d, _, _ = _row(coeffs, step_index, latents, dtype)
    mean = a * latents.to(dtype) + b * velocity.to(dtype)
    return mean if x0_prev is None else mean + d * x0_prev.to(dtype)


def flow_step(
    latents: Tensor,
    velocity: Tensor,
    coeffs: Tensor,
    step_index: int | Tensor,
    noise: Tensor,
    guidance: Guidance | None = None,
    x0_prev: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Next latents (dtype of `latents`), log-probability ``[B]`` of the stored value, and ``latents - sigma * v``."""
    sigma, _, _, c, _, _, _ = _row(coeffs, step_index, latents, dtype)
    velocity = guided_velocity(velocity, guidance, dtype)
    mean = transition_mean(latents, velocity, coeffs, step_index, x0_prev, dtype)
    next_latents = (mean + c * noise.to(dtype)).to(latents.dtype)
    log_prob, _ = flow_log_prob(latents, velocity, next_latents, coeffs, step_index, None, x0_prev, dtype)
    return next_latents, log_prob, latents.to(dtype) - sigma * velocity


def flow_log_prob(
    latents: Tensor,
    velocity: Tensor,
    next_latents: Tensor,
    coeffs: Tensor,
    step_index: int | Tensor,
    guidance: Guidance | None = None,
    x0_prev: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """``-1/2 * inv_var * mean((next_latents - mean)^2) + log_norm`` ``[B]``, and the mean."""
    _, _, _, _, _, inv_var, log_norm = _row(coeffs, step_index, latents, dtype)
    velocity = guided_velocity(velocity, guidance, dtype)
    mean = transition_mean(latents, velocity, coeffs, step_index, x0_prev, dtype)
    squares = (next_latents.to(dtype) - mean).square().flatten(1).mean(1)
    return -0.5 * inv_var.flatten() * squares + log_norm.flatten(), mean


def flow_drift(
    velocity: Tensor,
    reference_velocity: Tensor,
    coeffs: Tensor,
    step_index: int | Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``mean((mean - reference_mean)^2)`` ``[B]`` of the transitions two (guided) velocities make from one state."""
    _, _, b, _, _, _, _ = _row(coeffs, step_index, velocity, dtype)
    return (b * (velocity.to(dtype) - reference_velocity.to(dtype))).square().flatten(1).mean(1)


def flow_log_prob_map(
    next_latents: Tensor,
    mean: Tensor,
    coeffs: Tensor,
    step_index: int | Tensor,
    axis: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The log-probability with the mean over the channel axis only, ``[B, *S]`` without that axis."""
    _, _, _, _, _, inv_var, log_norm = _row(coeffs, step_index, mean, dtype)
    squares = (next_latents.to(dtype) - mean.to(dtype)).square().mean(axis)
    return -0.5 * inv_var.squeeze(-1) * squares + log_norm.squeeze(-1)
