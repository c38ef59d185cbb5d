"""DiffusionNFT: a policy improved on the forward process, without likelihoods. arXiv 2509.16117.

A finished sample x0 is noised again, `x = (1 - sigma) * x0 + sigma * noise`. Two implicit policies lie on either side
of the old one, `v+ = (1 - beta) * old + beta * v` and `v- = (1 + beta) * old - beta * v`; the first is to predict x0
where the sample is good, the second where it is bad:

    loss = clip / beta * (r * L(v+) + (1 - r) * L(v-)) + kl_beta * mean((v - ref)^2)
    r    = (clamp(A / clip, -1, 1) + 1) / 2            the optimality probability, from advantages clipped at `clip`
    L(u) = mean((x - sigma * u - x0)^2) / max(mean(|x - sigma * u - x0|), 1e-5)       the divisor carries no gradient
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowgrpo_fast.ops import implicit_matching, philox_normal
from flowgrpo_fast.recipe import NFT

FORWARD_NOISE_STREAM = 2  # 0 is the noise of the steps, 1 that of the start
_FLOOR = 1e-5


@dataclass(frozen=True, slots=True)
class NFTTerms:
    """Per-sample terms `[R]`; the caller weighs and averages."""

    loss: Tensor  # with gradient
    positive: Tensor  # L(v+)
    negative: Tensor  # L(v-)
    kl: Tensor  # the mean square distance from the reference


def optimality(advantages: Tensor, clip: float) -> Tensor:
    """r in [0, 1]: 1 = certainly good, 1/2 = average."""
    return (advantages / clip).clamp(-1, 1) / 2 + 0.5


def forward_process(x0: Tensor, seed: Tensor, sigma: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Finished samples `[R, *S]` noised to `sigma [R]`, and the velocity `noise - x0` a perfect model would give.

    The noise is a function of (seed, step) in a stream of its own; `step [R]` int64 sets apart a sample's several
    noises.
    """
    noise = philox_normal(seed, x0.shape[1:], step=step, stream=FORWARD_NOISE_STREAM)
    wide = sigma.view(-1, *[1] * (x0.ndim - 1))
    return (1 - wide) * x0 + wide * noise, noise - x0


def nft(
    velocity: Tensor,
    old_velocity: Tensor,
    target: Tensor,
    sigma: Tensor,
    good: Tensor,
    part: NFT,
    clip: float,
    reference_velocity: Tensor | None = None,
) -> NFTTerms:
    """The loss of R noised samples; gradient flows through `velocity` alone.

    Args:
        velocity, old_velocity, target, reference_velocity: `[R, *S]`.
        sigma: `[R]` fp32. good: `[R]`, from `optimality`. clip: of the advantages.

    Raises:
        ValueError: a KL is asked for and there is no reference.
    """
    if part.kl_beta > 0 and reference_velocity is None:
        raise ValueError(f"NFT.kl_beta is {part.kl_beta}, but there is no reference to measure from")
    means = implicit_matching(
        velocity,
        target,
        old_velocity,
        part.beta,
        reference_velocity=reference_velocity if part.kl_beta else None,
    )
    positive = _x0_error(means.positive, means.positive_abs, sigma)
    negative = _x0_error(means.negative, means.negative_abs, sigma)
    loss = clip / part.beta * (good * positive + (1 - good) * negative)
    kl = torch.zeros_like(loss).detach()
    if means.reference_drift is not None:
        kl = means.reference_drift
        loss = loss + part.kl_beta * kl
    return NFTTerms(
        loss=loss,
        positive=positive.detach(),
        negative=negative.detach(),
        kl=kl.detach(),
    )


def _x0_error(square: Tensor, absolute: Tensor, sigma: Tensor) -> Tensor:
    """L of the module's text: an x0 prediction's error is -sigma times that of its velocity."""
    return sigma.square() * square / (sigma * absolute).clamp_min(_FLOOR)


def old_decay(part: NFT, step: int) -> float:
    """How much of the old policy stays after training step `step`, counted from 1."""
    return min(part.old_decay_max, part.old_decay_rate * max(0, step - part.old_decay_start))
