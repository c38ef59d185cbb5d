"""How a step moves: every dynamics of the field is one row of scalars.

    mean         = a * latents + b * velocity + d * x0_prev
    next_latents = mean + c * noise
    log_prob     = -1/2 * inv_var * mean((next_latents - mean)^2) + log_norm

A row is `(sigma, a, b, c, d, inv_var, log_norm, 0)`, computed in fp64 on the host, once per schedule.
`s` is the step's sigma, `t` the next one, `dt = t - s < 0`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowgrpo_fast.recipe import CPS, DanceSDE, DPMSolver2M, Dynamics, Euler, FlowSDE, Solver
from flowgrpo_fast.sampling.sigmas import Array

Row = tuple[float, float, float, float, float, float, float, float]


def coefficients(sigmas: Array, rules: Sequence[Dynamics | Solver]) -> Tensor:
    """The table `[T, 8]` fp32 (host) of a schedule `[T+1]` with one rule per step.

    Raises:
        ValueError: the schedule does not fall strictly from at most 1 to at least 0, or a length differs.
    """
    if len(rules) != len(sigmas) - 1:
        raise ValueError(f"{len(rules)} rules for {len(sigmas) - 1} steps; give one per step")
    if not (np.all(np.diff(sigmas) < 0) and sigmas[0] <= 1 and sigmas[-1] >= 0):
        raise ValueError(f"sigmas must fall strictly within [0, 1]; they are {np.asarray(sigmas).tolist()}")
    rows = [coefficient_row(rule, sigmas, step) for step, rule in enumerate(rules)]
    return torch.tensor(rows, dtype=torch.float64).to(torch.float32)


def coefficient_row(rule: Dynamics | Solver, sigmas: Array, step: int) -> Row:
    """One row, fp64. `x0_prev` of a 2M row is the x0 prediction of the step before."""
    s, t = float(sigmas[step]), float(sigmas[step + 1])
    match rule:
        case FlowSDE() | DanceSDE():
            return _score_sde_row(noise_rate(rule, sigmas, step), s, t)
        case CPS():
            return _renoise_row(t * math.sin(rule.noise_level * math.pi / 2), s, t)
        case DPMSolver2M():
            return _second_order_row(rule, float(sigmas[step - 1]) if step else None, s, t)
        case Euler():
            return (s, 1.0, t - s, 0.0, 0.0, 0.0, 0.0, 0.0)


def noise_rate(rule: FlowSDE | DanceSDE, sigmas: Array, step: int) -> float:
    """The SDE's diffusion rate q at a step; the step's noise has std q * sqrt(-dt).

    Flow-SDE's rate eta * sqrt(s / (1 - s)) is infinite at s = 1: there, and only in the denominator, the next
    sigma of the schedule's start stands in for it (the convention of Flow-GRPO).
    """
    if isinstance(rule, DanceSDE):
        return rule.noise_level
    s = float(sigmas[step])
    return rule.noise_level * math.sqrt(s / (1 - (s if s < 1 else float(sigmas[1]))))


def _score_sde_row(q: float, s: float, t: float) -> Row:
    dt = t - s
    a = 1 + q * q * dt / (2 * s)
    b = (1 + q * q * (1 - s) / (2 * s)) * dt
    return (s, a, b, *_gaussian(q * math.sqrt(-dt)), 0.0)


def _gaussian(std: float) -> tuple[float, float, float, float]:
    """(c, d, inv_var, log_norm) of a Gaussian step."""
    return std, 0.0, 1 / std**2, -math.log(std) - 0.5 * math.log(2 * math.pi)


def _renoise_row(c: float, s: float, t: float) -> Row:
    """x0 and noise predictions recombined so that the total noise is t: the path's coefficients are kept."""
    q = math.sqrt(max(t * t - c * c, 0.0))
    inv_var = 2.0 if c > 0 else 0.0  # its score drops the variance: -mean(residual^2)
    return (s, (1 - t) + q, -s * (1 - t) + (1 - s) * q, c, 0.0, inv_var, 0.0, 0.0)


def _second_order_row(rule: DPMSolver2M, previous: float | None, s: float, t: float) -> Row:
    """DPM-Solver++ 2M in lambda = log((1 - sigma) / sigma), alpha = 1 - sigma.

    First order (= Euler here) without history, at the last step (lambda = inf), from s = 1 (lambda = -inf).
    """
    if previous is None or t == 0 or s == 1 or previous == 1:
        return (s, 1.0, t - s, 0.0, 0.0, 0.0, 0.0, 0.0)
    h = _log_snr(t) - _log_snr(s)
    ratio = (_log_snr(s) - _log_snr(previous)) / h
    first = -(1 - t) * math.expm1(-h)  # weight of the x0 prediction
    second = 0.5 * first if rule.variant == "midpoint" else (1 - t) * (math.expm1(-h) / h + 1)
    difference = second / ratio  # weight of (x0_pred - x0_prev)
    x0_weight = first + difference
    return (s, t / s + x0_weight, -s * x0_weight, 0.0, -difference, 0.0, 0.0, 0.0)


def _log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)
