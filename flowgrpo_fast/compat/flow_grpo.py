"""Flow-GRPO's step function over our op: its signature, its tuple, its conventions. arXiv 2505.05470."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from flowgrpo_fast.compat.scheduler import Generators, check_choice, check_same, draw_seeds
from flowgrpo_fast.compat.tables import (
    COEFFICIENT_PRESERVING,
    FLOW_SDE,
    Kind,
    as_timesteps,
    per_sample,
    sampled,
    schedule_table,
    scored,
)

_KINDS: dict[str, Kind] = {"sde": FLOW_SDE, "cps": COEFFICIENT_PRESERVING}


class HasSchedule(Protocol):
    """A diffusers flow scheduler after `set_timesteps`."""

    sigmas: Tensor  # [T+1], falling from at most 1 to 0
    timesteps: Tensor  # [T]


def sde_step_with_logprob(  # noqa: PLR0913 (Flow-GRPO's signature)
    self: HasSchedule,
    model_output: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: Generators = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
) -> tuple[Tensor, ...]:
    r"""One step of Flow-GRPO's sampler, or the score of a step that was taken.

    With ``mean`` affine in ``sample`` and ``model_output`` (`schedule.dynamics`), ``dt = sigma_next - sigma``, and
    ``error`` the mean of ``(prev_sample - mean)^2`` over all dimensions but the first::

        sde: log_prob = -error / (2 std^2) - log(std) - log(2 pi) / 2    with std = std_dev_t * sqrt(-dt)
        cps: log_prob = -error

    What it samples, it scores to the same bits again: the first importance ratio of the loop is exactly 1. The
    log-prob and the mean are differentiable in ``model_output`` alone. Noise is counter-based: its seeds, not its
    values, are drawn from `generator`, so images differ from those of torch's normal noise under that generator.

    Args:
        self: a diffusers flow scheduler after `set_timesteps`.
        model_output: velocity `[B, *S]`, any floating-point dtype.
        timestep: `[1]` or `[B]`, entries of ``self.timesteps``; each finds its row by one comparison on its own device.
        sample: latents `[B, *S]`.
        noise_level: above 0. Sampling also takes 0, as the loop does outside its window and to evaluate: an Euler step
            with log-prob 0.
        prev_sample: next latents `[B, *S]` to score; None samples them.
        generator: one generator or one per sample, read only when sampling; None = torch's default.
        sde_type: "sde" or "cps".
        return_sqrt_dt: appends ``sqrt(-dt)``.

    Returns:
        ``(prev_sample, log_prob, prev_sample_mean, std_dev_t[, sqrt_dt])``, all fp32: `[B, *S]`, `[B]`, `[B, *S]`, and
        `[N, 1, ...]` with N the length of `timestep`. ``std_dev_t`` is without ``sqrt(-dt)`` for "sde", and the
        whole std for "cps".

    Raises:
        ValueError: an unknown `sde_type`; a `noise_level` out of range; shapes or devices that differ; a timestep on
            the host that is not in the schedule (one that only a device has seen gives NaN).
    """
    check_choice("sde_type", sde_type, _KINDS)
    check_same("sample", sample, model_output=model_output, prev_sample=prev_sample)
    _check_noise_level(noise_level, sde_type, prev_sample)
    table = schedule_table((self.sigmas, self.timesteps), _KINDS[sde_type], float(noise_level), sample.device)
    rows = table.rows(as_timesteps("timestep", timestep, len(sample)))
    if prev_sample is None:
        seed = draw_seeds(generator, len(sample), sample.device)
        prev_sample, _ = sampled(sample.detach().float(), model_output.detach(), rows, seed)
    # After sampling too: the step gives no mean, and callers may differentiate through it.
    log_prob, mean = scored(sample, model_output, prev_sample, rows)
    outputs = (prev_sample.float(), log_prob, mean, per_sample(rows.std, sample))
    return (*outputs, per_sample(torch.sqrt(-rows.dt), sample)) if return_sqrt_dt else outputs


def _check_noise_level(noise_level: float, sde_type: str, prev_sample: Tensor | None) -> None:
    if not isinstance(noise_level, (int, float)):
        raise ValueError(f"noise_level is a {type(noise_level).__name__}; pass a Python float")
    if not noise_level >= 0:
        raise ValueError(f"noise_level is {noise_level}; it must be above 0 (0 only to sample an Euler step)")
    if noise_level == 0 and sde_type == "sde" and prev_sample is not None:
        raise ValueError(
            "noise_level is 0, and a step without noise has no log-prob; pass the noise_level the step was sampled with"
        )
