"""Noise schedules: `[T+1]` fp64 on the host, from 1 (noise) down to 0."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from flowgrpo_fast.recipe import DynamicShift, Sigmas

Array = NDArray[np.float64]

_NUM_TRAIN_TIMESTEPS = 1000  # diffusers' sigma_min is 1 / 1000 before any shift


def shift_sigmas(sigmas: Array, shift: float) -> Array:
    """Moves a schedule towards noise: `shift * s / (1 + (shift - 1) * s)`. arXiv 2403.03206 eq. 23."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def dynamic_shift(shift: DynamicShift, seq_len: int) -> float:
    """FLUX's shift `exp(mu)` for `seq_len` image tokens, `mu` linear through the two given lengths."""
    slope = (shift.max_shift - shift.base_shift) / (shift.max_seq_len - shift.base_seq_len)
    return math.exp(shift.base_shift + slope * (seq_len - shift.base_seq_len))


def resolve_shift(part: Sigmas, seq_len: int | None) -> float:
    """The schedule's shift as a number.

    Raises:
        ValueError: a `DynamicShift` without `seq_len`.
    """
    if not isinstance(part.shift, DynamicShift):
        return part.shift
    if seq_len is None:
        raise ValueError("Sigmas.shift is a DynamicShift; it needs the model's number of image tokens")
    return dynamic_shift(part.shift, seq_len)


def make_sigmas(part: Sigmas, seq_len: int | None = None) -> Array:
    """The schedule of a recipe, `[T+1]` fp64.

    `spacing="diffusers"` is the grid of `FlowMatchEulerDiscreteScheduler.set_timesteps(T)`: it ends at a
    sigma_min that is itself already shifted, and the shift is applied once more.

    Raises:
        ValueError: a `DynamicShift` without `seq_len`.
    """
    shift = resolve_shift(part, seq_len)
    last = 1 / part.num_inference_steps
    if part.spacing == "diffusers":
        ends = np.array([1.0, 1 / _NUM_TRAIN_TIMESTEPS])
        last = float((ends if isinstance(part.shift, DynamicShift) else shift_sigmas(ends, shift))[-1])
    grid = np.linspace(1.0, last, part.num_inference_steps)
    sigmas = shift_sigmas(grid, shift)
    if part.terminal:
        sigmas = 1 - (1 - sigmas) * (1 - part.terminal) / (1 - sigmas[-1])
    return np.append(sigmas, 0.0)


def respaced_tail(sigmas: Array, start: int, num_steps: int, shift: float) -> Array:
    """`sigmas[:start + 1]`, then `num_steps` steps to 0, linear in unshifted time (MixGRPO-Flash)."""
    unshifted = float(shift_sigmas(sigmas[start : start + 1], 1 / shift)[0])
    tail = shift_sigmas(np.linspace(unshifted, 0.0, num_steps + 1), shift)
    return np.concatenate([sigmas[: start + 1], tail[1:]])
