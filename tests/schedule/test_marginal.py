"""Every dynamics keeps the marginal: on a Gaussian target the exact velocity is affine, so mean and variance of the
sampler's distribution follow in closed form from its rows, with no Monte Carlo.

x_sigma = (1 - sigma) x0 + sigma e with x0 ~ N(m, s0^2): mean (1 - sigma) m, variance (1 - sigma)^2 s0^2 + sigma^2,
velocity E[e - x0 | x] = slope * (x - mean) - m.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowgrpo_fast.ops import flow_step, philox_normal
from flowgrpo_fast.schedule.dynamics import CPS, DanceSDE, DPMSolver2M, Euler, FlowSDE, coefficients
from flowgrpo_fast.schedule.sigmas import Sigmas

MEAN, STD = 0.8, 0.6


def target(sigma: float) -> tuple[float, float]:
    return (1 - sigma) * MEAN, (1 - sigma) ** 2 * STD**2 + sigma**2


def slope(sigma: float) -> float:
    return (sigma - (1 - sigma) * STD**2) / target(sigma)[1]


def worst_error(rule, num_steps: int) -> float:
    """Largest deviation of mean or std from the path's, over all sigmas."""
    sigmas = Sigmas(num_inference_steps=num_steps, shift=2.0).grid()
    mean, deviation = (
        0.0,
        np.array([1.0, 0.0]),
    )  # x = mean + deviation . (two unit Gaussians); x0_prev shares them
    x0_prev = (0.0, np.zeros(2))
    worst = 0.0
    for step in range(num_steps):
        s = sigmas[step]
        _, a, b, c, d, *_ = rule.row(sigmas, step, step + 1)
        centre = target(s)[0]
        k = slope(s)
        v = (k * (mean - centre) - MEAN, k * deviation)
        x0 = (mean - s * v[0], deviation - s * v[1])
        mean = a * mean + b * v[0] + d * x0_prev[0]
        deviation = a * deviation + b * v[1] + d * x0_prev[1]
        if c:
            deviation = np.array([np.hypot(np.hypot(*deviation), c), 0.0])
        x0_prev = x0
        wanted_mean, wanted_variance = target(sigmas[step + 1])
        worst = max(worst, abs(mean - wanted_mean), abs(np.hypot(*deviation) - np.sqrt(wanted_variance)))
    return worst


# CPS adds its noise per step, not per time: on a finer grid the same diffusion needs a smaller angle.
RULES = {
    "flow_sde": lambda n: FlowSDE(noise_level=0.3),
    "dance_sde": lambda n: DanceSDE(noise_level=0.3),
    "cps": lambda n: CPS(noise_level=0.8 / np.sqrt(n)),
    "euler": lambda n: Euler(),
    "dpmpp_2m": lambda n: DPMSolver2M(),
}


@pytest.mark.parametrize("name", RULES)
def test_the_marginal_is_kept_at_every_sigma(name: str) -> None:
    rough, fine = (worst_error(RULES[name](n), n) for n in (100, 1600))
    assert fine < 0.01
    assert fine < 0.3 * rough  # what is left is discretisation, and shrinks with the step


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde", "cps"])
def test_the_kernel_samples_that_distribution(name: str) -> None:
    num_steps, shape = 100, (20_000,)
    sigmas = Sigmas(num_inference_steps=num_steps, shift=2.0).grid()
    coeffs = coefficients(sigmas, [RULES[name](num_steps)] * (num_steps - 1) + [Euler()])
    seed = torch.arange(4)
    x = philox_normal(seed, shape, stream=1)
    for step in range(num_steps):
        velocity = slope(sigmas[step]) * (x - target(sigmas[step])[0]) - MEAN
        x = flow_step(x, velocity.float(), coeffs, step, seed).next_latents
        if step % 20 == 19:
            mean, variance = target(sigmas[step + 1])
            # 80 000 draws: standard error of the mean 0.003, plus the discretisation measured above
            assert float(x.mean()) == pytest.approx(mean, abs=0.02)
            assert float(x.std()) == pytest.approx(np.sqrt(variance), abs=0.03)
