"""Losses of the forward process, each from its published formula on whole latents and from the means of the ops.

The published side is float64 PyTorch on elements, differentiated by autograd. The composed side is what a trainer
would write on ``[B]`` numbers. Value and gradient must agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from flowgrpo_fast.ops import implicit_matching, matching

BATCH, GROUP = 6, 3
FLOOR = 1e-5  # under the adaptive weights
AMAX = 5.0


@dataclass
class Data:
    """A batch of two groups; velocities near each other, as after few updates."""

    velocity: Tensor
    old: Tensor
    reference: Tensor
    target: Tensor  # noise - clean
    clean: Tensor
    noise: Tensor
    sigma: Tensor  # [B]
    advantage: Tensor  # [B]

    def double(self):
        """The same numbers in float64, where the noise follows from the stored target."""
        doubled = Data(*(value.double() for value in vars(self).values()))
        doubled.noise = doubled.target + doubled.clean
        return doubled

    @property
    def s(self) -> Tensor:
        """Sigma, to broadcast over latents."""
        return self.sigma.view(-1, *[1] * (self.clean.ndim - 1))

    @property
    def noisy(self) -> Tensor:
        return (1 - self.s) * self.clean + self.s * self.noise

    def x0(self, velocity: Tensor) -> Tensor:
        """The prediction of the clean sample."""
        return self.noisy - self.s * velocity


def make(dtype: torch.dtype, shape=(BATCH, 4, 6, 7), spread=0.3, paired=False) -> Data:
    generator = torch.Generator().manual_seed(7)
    real = torch.float64 if dtype is torch.float64 else torch.float32

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    clean, noise = normal(), normal()
    if paired:
        noise[BATCH // 2 :] = noise[: BATCH // 2]
    target = noise - clean
    base = target + 0.5 * normal()
    old, reference = base + spread * normal(), base + spread * normal()
    sigma = torch.linspace(0.15, 0.95, BATCH, dtype=torch.float64)
    if paired:
        sigma[BATCH // 2 :] = sigma[: BATCH // 2]
    advantage = torch.tensor([1.2, -0.7, -0.5, 7.0, 0.4, -1.9], dtype=torch.float64)
    latents = [value.to(dtype) for value in (base, old, reference, target)]
    return Data(*latents, clean.to(dtype), noise.to(dtype), sigma.to(real), advantage.to(real))


def mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


def mse(values: Tensor) -> Tensor:
    return mean(values**2)


def adaptive(residual: Tensor) -> Tensor:
    return mean(residual.abs()).clamp_min(FLOOR).detach()


TOLERANCE = {torch.float64: (1e-10, 1e-10), torch.float32: (2e-4, 2e-4), torch.bfloat16: (2e-4, 6e-3)}


def compare(published, composed, dtype, **options):
    """`published(data, velocity)` in float64 against `composed(data, velocity)` on stored tensors."""
    data = make(dtype, **options)
    exact = data.double()
    velocity = exact.velocity.clone().requires_grad_()
    wanted = published(exact, velocity)
    (wanted_gradient,) = torch.autograd.grad(wanted, velocity)
    leaf = data.velocity.clone().requires_grad_()
    value = composed(data, leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    rtol, gradient_tolerance = TOLERANCE[dtype]
    scale = float(wanted_gradient.abs().max())
    assert scale > 0
    torch.testing.assert_close(value.double(), wanted, rtol=rtol, atol=rtol * float(wanted.detach().abs()))
    torch.testing.assert_close(
        gradient.double(), wanted_gradient, rtol=gradient_tolerance, atol=gradient_tolerance * 0.05 * scale
    )


dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def optimality(advantage: Tensor) -> Tensor:
    """``r`` of DiffusionNFT, ``rhat`` of CRD."""
    return (advantage / AMAX).clamp(-1, 1) / 2 + 0.5


# DiffusionNFT, on the clean sample and on the velocity.


def published_nft(target_space, beta, kl):
    def loss(d: Data, v: Tensor) -> Tensor:
        positive = beta * v + (1 - beta) * d.old
        negative = (1 + beta) * d.old - beta * v
        if target_space == "x0":
            residuals = d.x0(positive) - d.clean, d.x0(negative) - d.clean
        else:
            residuals = positive - d.target, negative - d.target
        good, bad = (mean(residual**2 / adaptive(residual).view(-1, 1, 1, 1)) for residual in residuals)
        r = optimality(d.advantage)
        policy = (r * good / beta + (1 - r) * bad / beta).mean() * AMAX
        return policy + kl * ((v - d.reference) ** 2).mean()

    return loss


def composed_nft(target_space, beta, kl):
    def loss(d: Data, v: Tensor) -> Tensor:
        m = implicit_matching(v, d.target, d.old, beta, reference_velocity=d.reference)
        scale = d.sigma if target_space == "x0" else torch.ones_like(d.sigma)
        good = scale**2 * m.positive / (scale * m.positive_abs).clamp_min(FLOOR)
        bad = scale**2 * m.negative / (scale * m.negative_abs).clamp_min(FLOOR)
        r = optimality(d.advantage)
        return (r * good + (1 - r) * bad).mean() * AMAX / beta + kl * m.reference_drift.mean()

    return loss


@dtypes
@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("target_space", ["x0", "v"])
def test_diffusion_nft(target_space, beta, dtype):
    compare(published_nft(target_space, beta, 0.1), composed_nft(target_space, beta, 0.1), dtype)


# ParetoSlider: NFT per objective, mixed by a preference.


@dtypes
def test_pareto_slider_is_nft_with_mixed_optimality(dtype):
    preference = torch.tensor([0.7, 0.3], dtype=torch.float64)
    beta = 0.1

    def objectives(advantage):
        return torch.stack([optimality(advantage), optimality(advantage.flip(0))])

    def published(d, v):
        positive, negative = beta * v + (1 - beta) * d.old, (1 + beta) * d.old - beta * v
        residuals = d.x0(positive) - d.clean, d.x0(negative) - d.clean
        good, bad = (mse(residual) / adaptive(residual) for residual in residuals)
        losses = [(r * good + (1 - r) * bad) / beta for r in objectives(d.advantage)]
        return AMAX * sum(w * loss.mean() for w, loss in zip(preference, losses, strict=True))

    def composed(d, v):
        m = implicit_matching(v, d.target, d.old, beta)
        r = (preference.to(d.sigma)[:, None] * objectives(d.advantage)).sum(0)
        good, bad = d.sigma * m.positive / m.positive_abs, d.sigma * m.negative / m.negative_abs
        return AMAX / beta * (r * good + (1 - r) * bad).mean()

    compare(published, composed, dtype)


# AWM: a PPO ratio of weighted errors.

WEIGHTINGS = {
    "uniform": lambda error, t: error,
    "t": lambda error, t: t * error,
    "t2": lambda error, t: t**2 * error,
    "huber": lambda error, t: t * ((error + 1e-10).sqrt() - 1e-5),
    "ghuber": lambda error, t: t / 0.25 * ((error + 1e-10) ** 0.25 - 1e-10**0.25),
}


@dtypes
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_awm(weighting, dtype):
    weigh, clip, kl, ema_kl = WEIGHTINGS[weighting], 1e-4, 0.01, 0.3

    def surrogate(error, old_error, d):
        ratio = (weigh(old_error, d.sigma) - weigh(error, d.sigma)).exp()
        return torch.maximum(-d.advantage * ratio, -d.advantage * ratio.clamp(1 - clip, 1 + clip)).mean()

    def published(d, v):
        policy = surrogate(mse(v - d.target), mse(d.old - d.target), d)
        return policy + kl * ((v - d.reference) ** 2).mean() + ema_kl * ((v - d.old) ** 2).mean()

    def composed(d, v):
        m = matching(v, d.target, old_velocity=d.old, reference_velocity=d.reference)
        policy = surrogate(m.error, m.old_error, d)
        return policy + kl * m.reference_drift.mean() + ema_kl * m.old_drift.mean()

    compare(published, composed, dtype)


# Diffusion-DPO: winners in the first half of the batch, their losers in the second, noise and time shared.


@dtypes
@pytest.mark.parametrize("beta", [100.0, 2000.0])
def test_diffusion_dpo(beta, dtype):
    half = BATCH // 2

    def published(d, v):
        error, reference_error = mse(d.noise - d.clean - v), mse(d.noise - d.clean - d.reference)
        won = error[:half] - reference_error[:half]
        lost = error[half:] - reference_error[half:]
        return -torch.sigmoid(-beta / 2 * (won - lost)).log().mean()

    def composed(d, v):
        m = matching(v, d.target, reference_velocity=d.reference)
        gap = m.error - m.reference_error
        return -logsigmoid(-beta / 2 * (gap[:half] - gap[half:])).mean()

    compare(published, composed, dtype, spread=0.01, paired=True)


# DGPO: a sigmoid weight of each group, and a clip that detaches.


@dtypes
def test_dgpo(dtype):
    beta, clip, kl = 100.0, 1e-2, 0.05

    def objective(error, old_error, reference_error, divergence, d):
        gaps = (d.advantage * (error - reference_error)).view(-1, GROUP).sum(1)
        weight = torch.sigmoid(beta / GROUP * gaps).detach().repeat_interleave(GROUP)
        ratio = (old_error - error).exp()
        up = d.advantage > 0
        outside = torch.where(up, ratio > 1 + clip, ratio < 1 - clip)
        error = torch.where(outside, error.detach(), error)
        return (weight * d.advantage * error).mean() + kl * divergence

    def published(d, v):
        errors = (mse(other - d.target) for other in (v, d.old, d.reference))
        return objective(*errors, ((v - d.reference) ** 2).mean(), d)

    def composed(d, v):
        m = matching(v, d.target, old_velocity=d.old, reference_velocity=d.reference)
        return objective(m.error, m.old_error, m.reference_error, m.reference_drift.mean(), d)

    compare(published, composed, dtype, spread=0.02)


# CRD: centred implicit rewards matched with centred external ones.


def crd(implicit, divergence, advantage, kind, temperature, beta, kl):
    """From the implicit reward and the divergence from the guided reference, both ``[B]``."""
    reward = optimality(advantage)
    if temperature < 0:
        directions = [torch.full_like(reward, 1 / len(reward))]
    else:
        directions = [torch.softmax(sign * reward / temperature, 0) for sign in (1, -1)]
    total = 0
    for weights in directions:
        external = reward - (weights * reward).sum()
        centred = implicit - (weights * implicit).sum().detach()
        if kind == "mse":
            total = total + ((beta * centred - external) ** 2).mean()
        else:
            total = total + binary_cross_entropy_with_logits(beta * centred, torch.sigmoid(external))
    smallest = 1e-4 / kl
    scaled = (smallest + reward * (1 - smallest)) * divergence
    return total / len(directions) * AMAX / beta + kl * scaled.mean()


@dtypes
@pytest.mark.parametrize("temperature", [-1.0, 0.5], ids=["uniform", "softmax"])
@pytest.mark.parametrize("kind", ["mse", "bce"])
@pytest.mark.parametrize("normalised", [True, False], ids=["adaptive", "plain"])
def test_crd(normalised, kind, temperature, dtype):
    options = (kind, temperature, 1.0, 0.1)

    def published(d, v):
        residual, old_residual = v - d.target, d.old - d.target
        squares, old_squares = residual**2, old_residual**2
        if normalised:
            squares = squares / adaptive(residual).view(-1, 1, 1, 1)
            old_squares = old_squares / adaptive(old_residual).view(-1, 1, 1, 1)
        return crd(-mean(squares - old_squares), mse(v - d.reference), d.advantage, *options)

    def composed(d, v):
        m = matching(v, d.target, old_velocity=d.old, reference_velocity=d.reference)
        error, old_error = m.error, m.old_error
        if normalised:
            error = error / m.error_abs.clamp_min(FLOOR)
            old_error = old_error / m.old_error_abs.clamp_min(FLOOR)
        return crd(old_error - error, m.reference_drift, d.advantage, *options)

    compare(published, composed, dtype)


# V-GRPO: the ratio of self-normalised errors of the clean sample, the simple KL, and a soft clip of advantages.


@dtypes
def test_v_grpo(dtype):
    eta, clip, kl = 3.0, 0.2, 0.1

    def surrogate(loss, old_loss, divergence, d):
        ratio = (old_loss - loss).exp()
        advantage = eta * torch.tanh(d.advantage / eta)
        policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
        return (policy + kl * divergence).mean()

    def published(d, v):
        residual, old_residual = d.x0(v) - d.clean, d.x0(d.old) - d.clean
        loss, old_loss = (mse(r) / mean(r.abs()).detach() for r in (residual, old_residual))
        return surrogate(loss, old_loss, mse(d.x0(v) - d.x0(d.old)), d)

    def composed(d, v):
        m = matching(v, d.target, old_velocity=d.old)
        loss, old_loss = d.sigma * m.error / m.error_abs, d.sigma * m.old_error / m.old_error_abs
        return surrogate(loss, old_loss, d.sigma**2 * m.old_drift, d)

    compare(published, composed, dtype)


# Losses on a part of each sample: weighted averages over positions, by a mask or by a map.


@dtypes
@pytest.mark.parametrize("mask", [True, False], ids=["mask", "map"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "channels first"])
def test_weighted_nft(packed, mask, dtype):
    shape, axis = ((BATCH, 42, 4), -1) if packed else ((BATCH, 4, 6, 7), 1)
    generator = torch.Generator().manual_seed(3)
    weight = torch.rand(shape, generator=generator, dtype=torch.float64).mean(axis, keepdim=True) + 0.5
    if mask:
        weight = (weight > 1).double()
    beta = 0.1

    def published(d, v):
        """Per position the mean over channels, then ``sum w l / sum w``."""
        positive, negative = beta * v + (1 - beta) * d.old, (1 + beta) * d.old - beta * v
        r = optimality(d.advantage).view(-1, *[1] * (v.ndim - 1))
        per_position = (r * (positive - d.target) ** 2 + (1 - r) * (negative - d.target) ** 2).mean(
            axis, keepdim=True
        )
        return ((weight * per_position).flatten(1).sum(1) / weight.flatten(1).sum(1)).mean()

    def composed(d, v):
        w = weight.to(d.sigma.dtype)
        m = implicit_matching(v, d.target, d.old, beta, weight=w)
        r = optimality(d.advantage)
        return ((r * m.positive + (1 - r) * m.negative) / mean(w)).mean()

    compare(published, composed, dtype, shape=shape)


@dtypes
def test_velocity_divergence(dtype):
    def composed(d, v):
        return matching(v, d.target, reference_velocity=d.reference).reference_drift.mean()

    compare(lambda d, v: ((v - d.reference) ** 2).mean(), composed, dtype)


def test_clean_sample_means_are_scaled_velocity_means():
    d = make(torch.float64)
    m = matching(d.velocity, d.target, old_velocity=d.old)
    pairs = [(d.velocity, m.error, m.error_abs), (d.old, m.old_error, m.old_error_abs)]
    for beta in (1.0, 0.1):
        i = implicit_matching(d.velocity, d.target, d.old, beta)
        pairs.append((beta * d.velocity + (1 - beta) * d.old, i.positive, i.positive_abs))
        pairs.append(((1 + beta) * d.old - beta * d.velocity, i.negative, i.negative_abs))
    for velocity, square, absolute in pairs:
        residual = d.x0(velocity) - d.clean
        torch.testing.assert_close(mse(residual), d.sigma**2 * square)
        torch.testing.assert_close(mean(residual.abs()), d.sigma * absolute)
