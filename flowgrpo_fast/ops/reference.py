"""The ops in plain PyTorch: what the kernels must compute, in any dtype including float64, differentiable throughout.

The noise is an argument. Nothing here calls a kernel; tests and benchmarks compare against it.
"""

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


def philox4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One Philox4x32-10 block in Python integers (Salmon et al., SC 2011)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def normal_of_words(words: Tensor) -> Tensor:
    """Box-Muller in float64 on 32-bit words ``[..., n]`` (int64): pairs ``(r cos, r sin)``; n must be even."""
    pairs = words.to(torch.float64).unflatten(-1, (-1, 2))
    # The kernels take the upper 31 bits of the first word, rounded to float32.
    uniform = ((words.unflatten(-1, (-1, 2))[..., 0] >> 1).to(torch.float32) + 0.5).to(
        torch.float64
    ) * 2.0**-31
    radius, angle = (-2.0 * uniform.log()).sqrt(), pairs[..., 1] * (2.0 * torch.pi / 2.0**32)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(-2)
