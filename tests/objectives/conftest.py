from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from flowgrpo_fast.ops import Guidance
from flowgrpo_fast.types import Noised, Predicted, Transitions


class FakeEvaluator:
    """Velocities that were made beforehand, whatever the latents; notes what it was asked."""

    def __init__(
        self,
        trained: Tensor,
        frozen: Mapping[str, Tensor] | None = None,
        coeffs: Tensor | None = None,
        interval: Tensor | None = None,
        guidance: Mapping[str, Guidance] | None = None,
    ) -> None:
        self._trained, self._frozen, self._guidance = trained, frozen or {}, guidance or {}
        self.coeffs, self.interval = coeffs, interval
        self.asked: list[tuple[str, Tensor, Tensor]] = []

    def trained(self, latents: Tensor, sigma: Tensor, unconditional: Tensor | None = None) -> Predicted:
        self.asked.append(("trained", latents, sigma))
        return Predicted(self._trained, self._guidance.get("trained"))

    def frozen(self, name: str, latents: Tensor, sigma: Tensor) -> Predicted:
        self.asked.append((name, latents, sigma))
        return Predicted(self._frozen[name], self._guidance.get(name))


@pytest.fixture
def evaluator() -> type[FakeEvaluator]:
    return FakeEvaluator


@pytest.fixture
def transitions() -> Callable[..., Transitions]:
    """Stored transitions `[H, *S]` -> `[E, *S]`; every edge is one sample's."""

    def make(row: Tensor, latents: Tensor, next_latents: Tensor, log_prob: Tensor) -> Transitions:
        num_edges, num_heads = len(next_latents), len(latents)
        samples = np.arange(num_edges)[:, None]
        return Transitions(
            row=row,
            latents=latents,
            next_latents=next_latents,
            log_prob=log_prob,
            samples=torch.from_numpy(samples),
            samples_host=samples,
            sigma=torch.ones(num_heads),
            offsets=np.array([0, num_heads]),
            fan=num_edges // num_heads,
        )

    return make


@pytest.fixture
def noised() -> Callable[..., Noised]:
    """Finished samples to be noised again."""

    def make(x0: Tensor, sigma: Tensor, seed: Tensor, step: Tensor) -> Noised:
        samples = np.arange(len(x0))[:, None]
        return Noised(
            sigma=sigma, step=step, x0=x0, seed=seed, samples=torch.from_numpy(samples), samples_host=samples
        )

    return make
