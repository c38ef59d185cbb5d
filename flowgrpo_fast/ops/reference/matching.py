"""Residuals of velocity predictions against the forward process's target, and between predictions."""

from __future__ import annotations

import torch
from torch import Tensor


def matching(
    velocity: Tensor,
    target: Tensor,
    old_velocity: Tensor | None = None,
    reference_velocity: Tensor | None = None,
    weight: Tensor | None = None,
    beta: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The means ``[B]`` under the names of the op's fields, those of absolute values detached."""
    velocity, target = velocity.to(dtype), target.to(dtype)
    weights = torch.ones((), dtype=dtype, device=velocity.device) if weight is None else weight.to(dtype)

    def square(difference: Tensor) -> Tensor:
        return (weights * difference.square()).flatten(1).mean(1)

    def absolute(difference: Tensor) -> Tensor:
        return (weights * difference.detach().abs()).flatten(1).mean(1)

    means = {"error": square(velocity - target), "error_abs": absolute(velocity - target)}
    if old_velocity is not None:
        old = old_velocity.to(dtype)
        positive = (1 - beta) * old + beta * velocity
        negative = (1 + beta) * old - beta * velocity
        means |= {
            "old_error": square(old - target),
            "old_error_abs": absolute(old - target),
            "old_drift": square(velocity - old),
            "positive": square(positive - target),
            "positive_abs": absolute(positive - target),
            "negative": square(negative - target),
            "negative_abs": absolute(negative - target),
        }
    if reference_velocity is not None:
        reference = reference_velocity.to(dtype)
        means |= {
            "reference_error": square(reference - target),
            "reference_drift": square(velocity - reference),
        }
    return means
