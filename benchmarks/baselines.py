"""What the ops are measured against: the step as trainers write it, and torch.compile of the same mathematics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowgrpo_fast.ops import flow_log_prob, flow_step, reference

NOISE_LEVEL = 0.7
NUM_STEPS = 10
_MULTIPLIERS, _WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)  # of Philox4x32
_LOW = 0xFFFFFFFF


@dataclass
class Workload:
    """One transition of a batch in the middle of a shifted ten-step schedule, with Flow-SDE's coefficients."""

    latents: Tensor
    velocity: Tensor
    next_latents: Tensor
    timesteps: Tensor  # [T]
    sigmas: Tensor  # [T+1]
    coeffs: Tensor  # [T, 8]
    step_index: Tensor  # [B]
    seed: Tensor  # [B]

    @property
    def timestep(self) -> Tensor:
        """What a trainer passes: the timestep of each sample."""
        return self.timesteps[self.step_index]


def flow_sde_table(sigmas: Tensor) -> Tensor:
    """Flow-SDE's rows, in float64; sigma = 1 uses the next sigma inside the square root."""
    sigma, sigma_next = sigmas[:-1].double(), sigmas[1:].double()
    dt = sigma_next - sigma
    diffusion = NOISE_LEVEL * (sigma / (1 - torch.where(sigma == 1, sigmas[1].double(), sigma))).sqrt()
    c = diffusion * (-dt).sqrt()
    a = 1 + diffusion**2 * dt / (2 * sigma)
    b = (1 + diffusion**2 * (1 - sigma) / (2 * sigma)) * dt
    zero = torch.zeros_like(sigma)
    log_norm = -c.log() - 0.5 * math.log(2 * math.pi)
    return torch.stack([sigma, a, b, c, zero, c**-2, log_norm, zero], dim=1).float()


def make_workload(shape: tuple[int, ...] = (24, 16, 64, 64), dtype: torch.dtype = torch.float32) -> Workload:
    generator = torch.Generator().manual_seed(0)
    linear = torch.linspace(1, 1 / NUM_STEPS, NUM_STEPS)
    sigmas = torch.cat([3 * linear / (1 + 2 * linear), torch.zeros(1)])
    latents, velocity = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    coeffs, step_index = flow_sde_table(sigmas), torch.full((shape[0],), 4)
    seed = torch.arange(shape[0])
    next_latents = flow_step(latents, velocity, coeffs, step_index, seed).next_latents
    return Workload(latents, velocity, next_latents, 1000 * sigmas[:-1], sigmas, coeffs, step_index, seed)


def unfused_mean(w: Workload, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """Flow-SDE's mean and spread op by op: schedule look-up per sample, upcasts, mean."""
    velocity, sample = velocity.float(), w.latents.float()
    index = [(w.timesteps == t).nonzero()[0].item() for t in w.timestep]
    shape = (-1, *[1] * (sample.ndim - 1))
    sigma = w.sigmas[index].view(shape)
    sigma_next = w.sigmas[[i + 1 for i in index]].view(shape)
    sigma_max = w.sigmas[1].item()
    dt = sigma_next - sigma
    diffusion = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))) * NOISE_LEVEL
    mean = sample * (1 + diffusion**2 / (2 * sigma) * dt)
    mean = mean + velocity * (1 + diffusion**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, diffusion * torch.sqrt(-1 * dt)


def unfused_density(prev_sample: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """The log-density of every element, with its constants."""
    return (
        -((prev_sample.detach().float() - mean) ** 2) / (2 * spread**2)
        - torch.log(spread)
        - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
    )


def unfused_step(w: Workload, velocity: Tensor, prev_sample: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Flow-SDE op by op: mean, noise, log-density; what a trainer calls to sample and to replay."""
    mean, spread = unfused_mean(w, velocity)
    if prev_sample is None:
        prev_sample = mean + spread * torch.randn(velocity.shape, device=velocity.device)
    log_prob = unfused_density(prev_sample, mean, spread)
    return prev_sample, log_prob.mean(dim=tuple(range(1, log_prob.ndim)))


def same_step(w: Workload, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """The op's mathematics over a coefficient table, for torch.compile; noise from torch's generator."""
    noise = torch.randn(velocity.shape, device=velocity.device)
    return reference.flow_step(w.latents, velocity, w.coeffs, w.step_index, noise)[:2]


def same_log_prob(w: Workload, velocity: Tensor) -> Tensor:
    """The replay's mathematics over a coefficient table, for torch.compile."""
    return reference.flow_log_prob(w.latents, velocity, w.next_latents, w.coeffs, w.step_index)[0]


def same_noise(seed: Tensor, sample: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`philox_normal` at step 0 of stream 0 to its last few bits, for torch.compile: words are int64, normals fp32."""
    block = torch.arange(-(-math.prod(sample) // 4), device=seed.device).expand(len(seed), -1)
    w0, w1, w2, w3 = block & _LOW, block >> 32, torch.zeros_like(block), torch.zeros_like(block)
    k0, k1 = (seed & _LOW)[:, None], (seed >> 32 & _LOW)[:, None]
    for _ in range(10):
        first, second = (
            _MULTIPLIERS[0] * w0,
            _MULTIPLIERS[1] * w2,
        )  # modulo 2^64, so the upper words need a mask
        w0, w1 = (second >> 32 & _LOW) ^ w1 ^ k0, second & _LOW
        w2, w3 = (first >> 32 & _LOW) ^ w3 ^ k1, first & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    words = torch.stack((w0, w1, w2, w3), -1).unflatten(-1, (2, 2))
    uniform = ((words[..., 0] >> 1).float() + 0.5) * 2.0**-31
    radius, angle = (-2 * uniform.log()).sqrt(), words[..., 1].float() * (2 * math.pi * 2.0**-32)
    normal = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(1)
    return normal[:, : math.prod(sample)].unflatten(1, sample).to(dtype)


def with_backward(log_prob_of: Callable[[Tensor], Tensor], velocity: Tensor) -> Callable[[], Tensor]:
    """Forward and backward of a replay, as a training step runs it."""
    leaf = velocity.clone().requires_grad_()

    def run() -> Tensor:
        leaf.grad = None
        log_prob_of(leaf).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    return run


def contenders(w: Workload) -> dict[str, dict[str, Callable[[], Any]]]:
    """For each measured operation: ours, the unfused eager one, and torch.compile of the same mathematics."""
    compiled_step, compiled_log_prob = torch.compile(same_step), torch.compile(same_log_prob)

    def fused_log_prob(velocity: Tensor) -> Tensor:
        return flow_log_prob(w.latents, velocity, w.next_latents, w.coeffs, w.step_index)

    def eager_log_prob(velocity: Tensor) -> Tensor:
        return unfused_step(w, velocity, w.next_latents)[1]

    return {
        "sampling": {
            "ours": lambda: flow_step(w.latents, w.velocity, w.coeffs, w.step_index, w.seed),
            "eager": lambda: unfused_step(w, w.velocity),
            "compiled": lambda: compiled_step(w, w.velocity),
        },
        "replay": {
            "ours": lambda: fused_log_prob(w.velocity),
            "eager": lambda: eager_log_prob(w.velocity),
            "compiled": lambda: compiled_log_prob(w, w.velocity),
        },
        "replay_and_backward": {
            "ours": with_backward(fused_log_prob, w.velocity),
            "eager": with_backward(eager_log_prob, w.velocity),
            "compiled": with_backward(lambda velocity: compiled_log_prob(w, velocity), w.velocity),
        },
    }
