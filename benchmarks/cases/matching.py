"""Residuals of the forward process: the error of a prediction alone, and the means of a DiffusionNFT loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Run, Size, nbytes
from flowgrpo_fast.ops import implicit_matching, matching, reference

BETA = 0.1
Means = tuple[Tensor, ...]


@dataclass
class Predictions:
    """Three velocities at the same noisy samples, and their target."""

    velocity: Tensor
    target: Tensor
    old_velocity: Tensor
    reference_velocity: Tensor


def make_predictions(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Predictions:
    generator = torch.Generator().manual_seed(0)
    return Predictions(*(torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(4)))


def mean_of(values: Tensor) -> Tensor:
    """The mean over a sample's elements."""
    return values.mean(dim=tuple(range(1, values.ndim)))


def errors(p: Predictions) -> dict[str, Callable[[], Means]]:
    """The error of the velocity and its adaptive weight ``[B]``."""

    def eager() -> Means:
        residual = p.velocity.float() - p.target.float()
        return mean_of(residual**2), mean_of(residual.double().abs()).float()

    def same() -> Means:
        return tuple(reference.matching(p.velocity, p.target).values())

    return {
        "ours": lambda: matching(p.velocity, p.target)[:2],
        "eager": eager,
        "compiled": torch.compile(same),
    }


def nft_means(p: Predictions) -> dict[str, Callable[[Tensor], Means]]:
    """Of a velocity: errors of the implicit positive and negative, the KL to the reference, and both weights."""
    names = ("positive", "negative", "reference_drift", "positive_abs", "negative_abs")

    def ours(velocity: Tensor) -> Means:
        means = implicit_matching(
            velocity, p.target, p.old_velocity, BETA, reference_velocity=p.reference_velocity
        )
        return tuple(getattr(means, name) for name in names)

    def eager(velocity: Tensor) -> Means:
        velocity, old, target = velocity.float(), p.old_velocity.float(), p.target.float()
        positive = BETA * velocity + (1 - BETA) * old
        negative = (1 + BETA) * old - BETA * velocity
        with torch.no_grad():
            weights = [mean_of((v.double() - target.double()).abs()).float() for v in (positive, negative)]
        divergence = mean_of((velocity - p.reference_velocity.float()) ** 2)
        return mean_of((positive - target) ** 2), mean_of((negative - target) ** 2), divergence, *weights

    def same(velocity: Tensor) -> Means:
        means = reference.implicit_matching(velocity, p.target, p.old_velocity, BETA, p.reference_velocity)
        return tuple(means[name] for name in names)

    return {"ours": ours, "eager": eager, "compiled": torch.compile(same)}


def forward(means: Callable[[Tensor], Means], velocity: Tensor) -> Run:
    """The means without a gradient."""
    return lambda: means(velocity)


def forward_and_backward(means: Callable[[Tensor], Means], velocity: Tensor) -> Run:
    """The means and the gradient of a loss whose derivatives by the first three are given."""
    leaf = velocity.clone().requires_grad_()
    incoming = [torch.linspace(-1, 1, len(velocity), device=velocity.device) + place for place in range(3)]

    def run() -> Any:
        return torch.autograd.grad(means(leaf)[:3], leaf, incoming)[0]

    return run


def cases(size: Size, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Two velocities are read for the error, four for a loss; the backward writes one more."""
    p = make_predictions(size.shape, dtype, device)
    whole, small = nbytes(p.velocity), 4 * size.batch
    yield Case("matching", size, dtype, 2 * whole + 2 * small, dict(errors(p)))
    functions = nft_means(p)
    run = {name: forward(means, p.velocity) for name, means in functions.items()}
    yield Case("nft", size, dtype, 4 * whole + 5 * small, run)
    run = {name: forward_and_backward(means, p.velocity) for name, means in functions.items()}
    yield Case("nft_and_backward", size, dtype, 5 * whole + 3 * small, run)
