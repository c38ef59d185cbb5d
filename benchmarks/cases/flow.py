"""The transition: a sampling step, its replay with and without extras, the gradients of both, and the noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import (
    Workload,
    contenders,
    make_workload,
    same_noise,
    unfused_density,
    unfused_mean,
)
from benchmarks.cases import SD3, TOY, Case, Run, Size, nbytes
from flowgrpo_fast.ops import Extras, flow_log_prob, philox_normal, reference

Replay = Callable[[Tensor], tuple[Tensor, Tensor]]


def channel_axis(size: Size) -> int:
    """1 for images and video, the last of packed tokens."""
    return 1 if len(size.sample) > 2 else -1


def drift_replays(w: Workload, other: Tensor) -> dict[str, Replay]:
    """log_prob and drift `[B]` of a velocity: ours; two calls of the trainer's step, as for a KL; and compiled."""

    def ours(velocity: Tensor) -> tuple[Tensor, Tensor]:
        extras = Extras(reference_velocity=other)
        out = flow_log_prob(w.latents, velocity, w.next_latents, w.coeffs, w.step_index, extras=extras)
        assert out.drift is not None
        return out.log_prob, out.drift

    def eager(velocity: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = unfused_mean(w, velocity)
        other_mean, _ = unfused_mean(w, other)
        axes = tuple(range(1, mean.ndim))
        density = unfused_density(w.next_latents, mean, spread)
        return density.mean(dim=axes), ((mean - other_mean) ** 2).mean(dim=axes)

    def same(velocity: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, _ = reference.flow_log_prob(w.latents, velocity, w.next_latents, w.coeffs, w.step_index)
        return log_prob, reference.flow_drift(velocity, other, w.coeffs, w.step_index)

    return {"ours": ours, "eager": eager, "compiled": torch.compile(same)}


def map_replays(w: Workload, axis: int) -> dict[str, Replay]:
    """log_prob `[B]` and the log-probability of every position: ours, the trainer's step, and compiled."""

    def ours(velocity: Tensor) -> tuple[Tensor, Tensor]:
        extras = Extras(map_axis=axis)
        out = flow_log_prob(w.latents, velocity, w.next_latents, w.coeffs, w.step_index, extras=extras)
        assert out.log_prob_map is not None
        return out.log_prob, out.log_prob_map

    def eager(velocity: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = unfused_mean(w, velocity)
        density = unfused_density(w.next_latents, mean, spread)
        return density.mean(dim=tuple(range(1, mean.ndim))), density.mean(dim=axis)

    def same(velocity: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, mean = reference.flow_log_prob(w.latents, velocity, w.next_latents, w.coeffs, w.step_index)
        return log_prob, reference.flow_log_prob_map(w.next_latents, mean, w.coeffs, w.step_index, axis)

    return {"ours": ours, "eager": eager, "compiled": torch.compile(same)}


def forward(replay: Replay, velocity: Tensor) -> Run:
    """A replay without a gradient."""
    return lambda: replay(velocity)


def forward_and_backward(replay: Replay, velocity: Tensor) -> Run:
    """A replay and the gradient of the sum of what it returns."""
    leaf = velocity.clone().requires_grad_()

    def run() -> Any:
        first, second = replay(leaf)
        return torch.autograd.grad(first.sum() + second.sum(), leaf)[0]

    return run


def cases(size: Size, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Each reads latents, velocity and next latents; what it reads or writes besides is in its `bytes`."""
    w = make_workload(size.shape, dtype)
    w = Workload(*(value.to(device) for value in vars(w).values()))
    other, axis = w.velocity.flip(0).contiguous(), channel_axis(size)
    whole = nbytes(w.latents)
    small = nbytes(w.coeffs, w.step_index, w.seed) + 4 * size.batch
    moved = {"sampling": 3, "replay": 3, "replay_and_backward": 4}
    for operation, functions in contenders(w).items():
        yield Case(operation, size, dtype, moved[operation] * whole + small, functions)
    positions = 4 * w.latents.select(axis, 0).numel()
    for name, replays, extra in (
        ("drift", drift_replays(w, other), whole + 4 * size.batch),
        ("map", map_replays(w, axis), positions),
    ):
        run = {contender: forward(replay, w.velocity) for contender, replay in replays.items()}
        yield Case(f"replay_with_{name}", size, dtype, 3 * whole + small + extra, run)
        run = {contender: forward_and_backward(replay, w.velocity) for contender, replay in replays.items()}
        yield Case(f"replay_with_{name}_and_backward", size, dtype, 4 * whole + small + extra, run)
    noise: dict[str, Run] = {
        "ours": lambda: philox_normal(w.seed, size.sample, dtype=dtype),
        "eager": lambda: torch.randn(size.shape, dtype=dtype, device=device),
    }
    if size.name in (SD3.name, TOY.name):  # its compilation takes seconds, and says the same for every size
        compiled_noise = torch.compile(same_noise)
        noise["compiled"] = lambda: compiled_noise(w.seed, size.sample, dtype)
    yield Case("noise", size, dtype, whole + nbytes(w.seed), noise)
