"""How a step moves: every dynamics of the field is one row of scalars, and each carries its own.

    mean         = a * latents + b * velocity + d * x0_prev
    next_latents = mean + c * noise
    log_prob     = -1/2 * inv_var * mean((next_latents - mean)^2) + log_norm

A row is `(sigma, a, b, c, d, inv_var, log_norm, 0)`, computed in fp64 on the host, once per schedule.
`s` is the step's sigma, `t` the one it ends at, `dt = t - s < 0`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from flowgrpo_fast.checks import fraction, one_of, positive
from flowgrpo_fast.schedule.sigmas import Array, respaced_tail

# Above it a sigma counts as 1 where a rate would be infinite there; 1000 training timesteps end at it.
NEAR_ONE = 1 - 1e-3

Row: TypeAlias = tuple[float, float, float, float, float, float, float, float]


class Dynamics(Protocol):
    """A stochastic step. Its log-probability is what the ratio of a policy gradient is made of."""

    def row(self, sigmas: Array, step: int, to: int) -> Row:
        """The row of the step from `sigmas[step]` to `sigmas[to]`, fp64; `to > step + 1` merges several steps.

        The table asks for it only where `0 < sigmas[to]`: the last step ends at the sample and is never stochastic.
        """
        ...


class Solver(Protocol):
    """A deterministic step; its row has c = 0."""

    def row(self, sigmas: Array, step: int, to: int) -> Row:
        """As of a `Dynamics`. A multi-step solver may read `sigmas[step - 1]`, the step before."""
        ...

    def tail(self, sigmas: Array, start: int, shift: float) -> Array:
        """The schedule it walks from `start` on: `sigmas` itself, or with another number of steps to 0."""
        ...


def coefficients(sigmas: Array, rules: Sequence[Dynamics | Solver]) -> Tensor:
    """The table `[T, 8]` fp32 (host) of a schedule `[T+1]` with one rule per step.

    Raises:
        ValueError: the schedule does not fall strictly from at most 1 to at least 0, or a length differs.
    """
    if len(rules) != len(sigmas) - 1:
        raise ValueError(f"{len(rules)} rules for {len(sigmas) - 1} steps; give one per step")
    check_falling(sigmas)
    return table([rule.row(sigmas, step, step + 1) for step, rule in enumerate(rules)])


def table(rows: Sequence[Row]) -> Tensor:
    """Rows as the kernels take them, `[N, 8]` fp32 on the host."""
    return torch.tensor(rows, dtype=torch.float64).to(torch.float32).reshape(-1, 8)


def check_falling(sigmas: Array) -> None:
    """Raises ValueError for a schedule that does not fall strictly from at most 1 to at least 0."""
    if not (np.all(np.diff(sigmas) < 0) and sigmas[0] <= 1 and sigmas[-1] >= 0):
        raise ValueError(f"sigmas must fall strictly within [0, 1]; they are {np.asarray(sigmas).tolist()}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSDE:
    """Flow-GRPO's SDE: noise rate eta * sqrt(sigma / (1 - sigma)). arXiv 2505.05470."""

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        """No noise, no log-prob."""
        positive(self, noise_level=self.noise_level)

    def rate(self, sigmas: Array, step: int) -> float:
        """The SDE's diffusion rate q at a step; the step's noise has std q * sqrt(-dt).

        The rate is infinite at s = 1: there, and only in the denominator, the next sigma of the schedule's start
        stands in for it (the convention of Flow-GRPO). A schedule that begins within `NEAR_ONE` of 1 is treated alike.
        """
        s = float(sigmas[step])
        return self.noise_level * math.sqrt(s / (1 - below_one(s, float(sigmas[1]))))

    def row(self, sigmas: Array, step: int, to: int) -> Row:
        """As of `Dynamics`."""
        return score_sde_row(self.rate(sigmas, step), float(sigmas[step]), float(sigmas[to]))


@dataclass(frozen=True, slots=True, kw_only=True)
class DanceSDE:
    """DanceGRPO's SDE: constant noise rate eta. arXiv 2505.07818."""

    noise_level: float = 0.3

    def __post_init__(self) -> None:
        """No noise, no log-prob."""
        positive(self, noise_level=self.noise_level)

    def rate(self, sigmas: Array, step: int) -> float:
        """The SDE's diffusion rate, the same at every step."""
        return self.noise_level

    def row(self, sigmas: Array, step: int, to: int) -> Row:
        """As of `Dynamics`."""
        return score_sde_row(self.noise_level, float(sigmas[step]), float(sigmas[to]))


@dataclass(frozen=True, slots=True, kw_only=True)
class WanSDE:
    """Flow-GRPO's SDE for Wan: the rate is q = smin + (smax - smin) sigma, of the schedule's last and second sigma."""

    def rate(self, sigmas: Array, step: int) -> float:
        """The SDE's diffusion rate q; finite everywhere, so no sigma needs a stand-in."""
        low, high = float(sigmas[-1]), float(sigmas[1])
        return low + (high - low) * float(sigmas[step])

    def row(self, sigmas: Array, step: int, to: int) -> Row:
        """As of `Dynamics`."""
        return score_sde_row(self.rate(sigmas, step), float(sigmas[step]), float(sigmas[to]))


@dataclass(frozen=True, slots=True, kw_only=True)
class CPS:
    """Coefficient-preserving sampling: std sigma_next * sin(eta pi / 2). arXiv 2509.05952.

    x0 and noise predictions are recombined so that the total noise is t: the path's coefficients are kept. Its score
    leaves the variance out: log_prob = -mean((next_latents - mean)^2).
    """

    noise_level: float = 0.8

    def __post_init__(self) -> None:
        """The angle stays in the first quadrant."""
        fraction(self, noise_level=self.noise_level)

    def row(self, sigmas: Array, step: int, to: int) -> Row:
        """As of `Dynamics`."""
        s, t = float(sigmas[step]), float(sigmas[to])
        c = t * math.sin(self.noise_level * math.pi / 2)
        q = math.sqrt(max(t * t - c * c, 0.0))
        inv_var = 2.0 if c > 0 else 0.0
        return (s, (1 - t) + q, -s * (1 - t) + (1 - s) * q, c, 0.0, inv_var, 0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Euler:
    """First-order step of the probability-flow ODE."""

    def row(self, sigmas: Array, step: int, to: int) -> Row:
        """As of `Solver`."""
        return euler_row(float(sigmas[step]), float(sigmas[to]))

    def tail(self, sigmas: Array, start: int, shift: float) -> Array:
        """Every step is walked."""
        return sigmas


@dataclass(frozen=True, slots=True, kw_only=True)
class DPMSolver2M:
    """DPM-Solver++ 2M on x0 predictions, for the steps after the window. arXiv 2211.01095.

    In lambda = log((1 - sigma) / sigma), alpha = 1 - sigma. First order (= Euler here) without history, at the last
    step (lambda = inf) and from s = 1 (lambda = -inf).

    `keep` is the share of the *points* of those steps that is kept, both ends counted (MixGRPO-Flash: 0.4), so one step
    fewer is run; at least one, to sigma 0.
    """

    keep: float = 1.0
    variant: Literal["midpoint", "heun"] = "midpoint"

    def __post_init__(self) -> None:
        """Between one step and all of them."""
        fraction(self, keep=self.keep)
        one_of(self, ("midpoint", "heun"), variant=self.variant)

    def row(self, sigmas: Array, step: int, to: int) -> Row:
        """As of `Solver`; `x0_prev` is the x0 prediction of the step before."""
        s, t = float(sigmas[step]), float(sigmas[to])
        previous = float(sigmas[step - 1]) if step else None
        if previous is None or t == 0 or s == 1 or previous == 1:
            return euler_row(s, t)
        h = _log_snr(t) - _log_snr(s)
        ratio = (_log_snr(s) - _log_snr(previous)) / h
        first = -(1 - t) * math.expm1(-h)  # weight of the x0 prediction
        second = 0.5 * first if self.variant == "midpoint" else (1 - t) * (math.expm1(-h) / h + 1)
        difference = second / ratio  # weight of (x0_pred - x0_prev)
        x0_weight = first + difference
        return (s, t / s + x0_weight, -s * x0_weight, 0.0, -difference, 0.0, 0.0, 0.0)

    def tail(self, sigmas: Array, start: int, shift: float) -> Array:
        """`keep` of the points from `start` on, linear in unshifted time: a step fewer, but at least one."""
        if self.keep == 1:
            return sigmas
        num_steps = max(1, int((len(sigmas) - start) * self.keep) - 1)
        return respaced_tail(sigmas, start, num_steps, shift)


def below_one(s: float, following: float) -> float:
    """A sigma that `1 / (1 - sigma)` may be asked of: near 1 it is `following`, the schedule's second, if that is less.

    The one rule for "just under 1": grids that begin at 0.9997 (UniPC's) move as those that begin at 1 do.
    """
    return min(s, following) if s > NEAR_ONE else s


def euler_row(s: float, t: float) -> Row:
    """The row of a first-order step of the ODE."""
    return (s, 1.0, t - s, 0.0, 0.0, 0.0, 0.0, 0.0)


def score_sde_row(q: float, s: float, t: float) -> Row:
    """The row of an SDE with the path's marginals and diffusion rate q, one Euler-Maruyama step."""
    dt = t - s
    std = q * math.sqrt(-dt)
    a = 1 + q * q * dt / (2 * s)
    b = (1 + q * q * (1 - s) / (2 * s)) * dt
    return (s, a, b, std, 0.0, 1 / std**2, -math.log(std) - 0.5 * math.log(2 * math.pi), 0.0)


def _log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)
