"""Noise schedules: `[T+1]` fp64 on the host, from 1 (noise) down to 0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flowgrpo_fast.checks import one_of, positive, require

Array: TypeAlias = NDArray[np.float64]

_NUM_TRAIN_TIMESTEPS = 1000  # diffusers' sigma_min is 1 / 1000 before any shift


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicShift:
    """A shift that grows with the number of image tokens, as FLUX does: exp(mu), mu linear in the tokens."""

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_seq_len: int = 256
    max_seq_len: int = 4096

    def __post_init__(self) -> None:
        """Two distinct lengths define the line."""
        require(
            self.max_seq_len > self.base_seq_len > 0,
            f"DynamicShift.max_seq_len is {self.max_seq_len}; "
            f"it must be above base_seq_len = {self.base_seq_len}",
        )

    def value(self, seq_len: int) -> float:
        """`exp(mu)` for `seq_len` image tokens, mu linear through the two given lengths."""
        slope = (self.max_shift - self.base_shift) / (self.max_seq_len - self.base_seq_len)
        return math.exp(self.base_shift + slope * (seq_len - self.base_seq_len))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sigmas:
    """The noise schedule, 1 (noise) down to 0."""

    num_inference_steps: int = 10
    shift: float | DynamicShift = 3.0
    # "linear": 1, 1 - 1/T, ..., 0 before the shift. "diffusers": SD3's grid, which ends at its sigma_min.
    # "unipc", "dpm": the grids of those diffusers schedulers with flow sigmas (Wan; SANA, which begins just under 1).
    spacing: Literal["linear", "diffusers", "unipc", "dpm"] = "linear"
    # The shifted schedule is stretched to end here before 0 (Qwen-Image: 0.02); 0 = not.
    terminal: float = 0.0

    def __post_init__(self) -> None:
        """At least two steps: one alone leaves nothing between noise and sample."""
        require(
            self.num_inference_steps >= 2,
            f"Sigmas.num_inference_steps is {self.num_inference_steps}; it must be at least 2",
        )
        if not isinstance(self.shift, DynamicShift):
            positive(self, shift=self.shift)
        one_of(self, ("linear", "diffusers", "unipc", "dpm"), spacing=self.spacing)
        require(0 <= self.terminal < 1, f"Sigmas.terminal is {self.terminal}; it must be in [0, 1)")

    def shift_value(self, seq_len: int | None = None) -> float:
        """The shift as a number.

        Raises:
            ValueError: a `DynamicShift` without `seq_len`.
        """
        if not isinstance(self.shift, DynamicShift):
            return self.shift
        if seq_len is None:
            raise ValueError("Sigmas.shift is a DynamicShift; it needs the model's number of image tokens")
        return self.shift.value(seq_len)

    def grid(self, seq_len: int | None = None) -> Array:
        """The schedule, `[T+1]` fp64.

        `spacing="diffusers"` is the grid of `FlowMatchEulerDiscreteScheduler.set_timesteps(T)`: it ends at a
        sigma_min that is itself already shifted, and the shift is applied once more.

        Args:
            seq_len: image tokens of a sample; a dynamic shift needs it.

        Raises:
            ValueError: a `DynamicShift` without `seq_len`.
        """
        shift = self.shift_value(seq_len)
        last = 1 / self.num_inference_steps
        if self.spacing == "diffusers":
            ends = np.array([1.0, 1 / _NUM_TRAIN_TIMESTEPS])
            last = float((ends if isinstance(self.shift, DynamicShift) else shift_sigmas(ends, shift))[-1])
        grid = np.linspace(1.0, last, self.num_inference_steps)
        if self.spacing in ("unipc", "dpm"):
            grid = flow_sigmas_grid(self.num_inference_steps, from_one=self.spacing == "unipc")
        sigmas = shift_sigmas(grid, shift)
        if self.terminal:
            sigmas = 1 - (1 - sigmas) * (1 - self.terminal) / (1 - sigmas[-1])
        return np.append(sigmas, 0.0)


def flow_sigmas_grid(num_steps: int, from_one: bool) -> Array:
    """`[T]`, before the shift: what diffusers' multi-step solvers space evenly with `use_flow_sigmas`.

    UniPC goes from 1 (where it subtracts 1e-6 for its logarithm; not here) to 0.001, DPM-Solver from 0.999 to 0; both
    leave their end out.
    """
    below = 0.0 if from_one else 1 / _NUM_TRAIN_TIMESTEPS
    return np.linspace(1 - below, 1 / _NUM_TRAIN_TIMESTEPS - below, num_steps + 1)[:-1]


def shift_sigmas(sigmas: Array, shift: float) -> Array:
    """Moves a schedule towards noise: `shift * s / (1 + (shift - 1) * s)`. arXiv 2403.03206 eq. 23.

    1 stays 1 to the bit: for a shift below 0.5 the quotient misses it by a rounding, and rates are infinite near 1.
    """
    return np.where(sigmas == 1, 1.0, shift * sigmas / (1 + (shift - 1) * sigmas))


def respaced_tail(sigmas: Array, start: int, num_steps: int, shift: float) -> Array:
    """`sigmas[:start + 1]`, then `num_steps` steps to 0, linear in unshifted time (MixGRPO-Flash)."""
    unshifted = float(shift_sigmas(sigmas[start : start + 1], 1 / shift)[0])
    tail = shift_sigmas(np.linspace(unshifted, 0.0, num_steps + 1), shift)
    return np.concatenate([sigmas[: start + 1], tail[1:]])
