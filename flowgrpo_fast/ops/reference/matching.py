"""Residuals of velocity predictions against the forward process's target, and between predictions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_Mean = Callable[[Tensor], Tensor]


def _means(weight: Tensor | None, dtype: torch.dtype) -> tuple[_Mean, _Mean]:
    """The weighted means of squares and, detached, of absolute values of a sample's elements."""

    def weighted(values: Tensor) -> Tensor:
        return (values if weight is None else weight.to(dtype) * values).flatten(1).mean(1)

    return lambda values: weighted(values.square()), lambda values: weighted(values.detach().abs())


def matching(
    velocity: Tensor,
    target: Tensor,
    old_velocity: Tensor | None = None,
    reference_velocity: Tensor | None = None,
    weight: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The means ``[B]`` under the names of the op's fields."""
    square, absolute = _means(weight, dtype)
    velocity, target = velocity.to(dtype), target.to(dtype)
    means = {"error": square(velocity - target), "error_abs": absolute(velocity - target)}
    if old_velocity is not None:
        old = old_velocity.to(dtype)
        means["old_error"], means["old_error_abs"] = square(old - target), absolute(old - target)
        means["old_drift"] = square(velocity - old)
    if reference_velocity is not None:
        reference = reference_velocity.to(dtype)
        means["reference_drift"] = square(velocity - reference)
        means["reference_error"] = square(reference - target)
    return means


def implicit_matching(
    velocity: Tensor,
    target: Tensor,
    old_velocity: Tensor,
    beta: float,
    reference_velocity: Tensor | None = None,
    weight: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The means ``[B]`` under the names of the op's fields."""
    square, absolute = _means(weight, dtype)
    velocity, target, old = velocity.to(dtype), target.to(dtype), old_velocity.to(dtype)
    positive = (1 - beta) * old + beta * velocity - target
    negative = (1 + beta) * old - beta * velocity - target
    means = {
        "positive": square(positive),
        "positive_abs": absolute(positive),
        "negative": square(negative),
        "negative_abs": absolute(negative),
    }
    if reference_velocity is not None:
        means["reference_drift"] = square(velocity - reference_velocity.to(dtype))
    return means
