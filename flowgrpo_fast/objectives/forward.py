"""The forward process: finished samples noised again, `x = (1 - sigma) * x0 + sigma * noise`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrpo_fast.objectives.objective import Points
from flowgrpo_fast.ops import philox_normal
from flowgrpo_fast.types import Batch, Noised

FORWARD_NOISE_STREAM = 2  # 0 is the noise of the steps, 1 that of the start


def forward_process(x0: Tensor, seed: Tensor, sigma: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Finished samples `[R, *S]` noised to `sigma [R]`, and the velocity `noise - x0` a perfect model would give.

    The noise is a function of (seed, step) in a stream of its own; `step [R]` int64 sets apart a sample's several
    noises.
    """
    noise = philox_normal(seed, x0.shape[1:], step=step, stream=FORWARD_NOISE_STREAM)
    wide = sigma.view(-1, *[1] * (x0.ndim - 1))
    return (1 - wide) * x0 + wide * noise, noise - x0


def at_schedule_steps(batch: Batch, num_taken: int) -> Points:
    """Each sample at `num_taken` of its schedule's sigmas, drawn without repetition."""
    steps = batch.choices.taken(len(batch.samples.plan.sigmas) - 1, num_taken)
    sigmas = batch.samples.plan.sigmas[torch.from_numpy(steps)]
    return noised_points(batch, num_taken, lambda turn: (sigmas[:, turn], steps[:, turn]))


def noised_points(
    batch: Batch, count: int, choose: Callable[[int], tuple[Tensor, NDArray[np.int64]]]
) -> Points:
    """`count` points of all samples; `choose(k)` gives the sigma and the number of the noise of each, on the host."""
    device, num_samples = batch.samples.x0.device, len(batch)
    behind = np.arange(num_samples)[:, None]
    samples = torch.arange(num_samples, device=device)[:, None]

    def make(place: int) -> Noised:
        sigma, step = choose(place)
        return Noised(
            sigma=sigma.float().contiguous().to(device, non_blocking=True),
            step=torch.from_numpy(np.ascontiguousarray(step)).to(device, non_blocking=True),
            x0=batch.samples.x0,
            seed=batch.samples.draws.seed,
            samples=samples,
            samples_host=behind,
        )

    return Points(count, make)
