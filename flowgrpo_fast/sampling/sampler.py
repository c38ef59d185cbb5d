"""Walks a model along a schedule, and scores stored transitions again, on the same values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowgrpo_fast.ops import Extras, Guidance, flow_log_prob, flow_step, philox_normal
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.sampling.schedule import Schedule
from flowgrpo_fast.types import Conditioning, Draws, FlowModel, Trajectory

START_NOISE_STREAM = 1  # stream 0 is the noise of the steps


@dataclass(frozen=True, slots=True)
class _Walk:
    """What the steps of one micro-batch leave behind."""

    x0: Tensor  # [R, *S]
    latents: list[Tensor]  # K of [R, *S]
    next_latents: list[Tensor]  # K of [R, *S]
    log_prob: Tensor  # [R, T]; 0 at deterministic steps, not finite where a velocity was not


def row_slices(num_rows: int, rows: int) -> Iterator[slice]:
    """Consecutive micro-batches of `rows`. Rollout and replay use the same ones: same shapes, same bits."""
    for first in range(0, num_rows, rows):
        yield slice(first, min(first + rows, num_rows))


@torch.no_grad()
def rollout(
    model: FlowModel,
    conditioning: Conditioning,
    draws: Draws,
    schedule: Schedule,
    recipe: Recipe,
    outside: FlowModel | None = None,
) -> Trajectory:
    """Samples B trajectories and keeps the stochastic steps.

    Args:
        conditioning: one row per sample, on the model's device.
        draws: the seeds; every sample's noise is a function of (seed, step, element) alone.
        schedule: from `resolve_schedule`.
        recipe: guidance_scale, precision and rows per forward are read.
        outside: what the steps without a log-prob run, say a copy in low precision; None = `model`.

    Raises:
        ValueError: the model gave a NaN or infinite velocity; names step and sample.
    """
    device = draws.seed.device
    coeffs = schedule.coeffs.to(device)
    walks = []
    for rows in row_slices(len(draws.seed), recipe.rollout_rows):
        part = conditioning.rows(torch.arange(rows.start, rows.stop, device=device))
        walks.append(
            _walk(
                (model, outside or model),
                part,
                (draws.start_seed[rows], draws.seed[rows]),
                (schedule, coeffs),
                recipe,
            )
        )
    log_prob = torch.cat([walk.log_prob for walk in walks])
    check_finite(log_prob)
    return Trajectory(
        sigmas=schedule.sigmas,
        coeffs=coeffs,
        step_index=torch.tensor(schedule.kept, dtype=torch.int64),
        latents=_stack([walk.latents for walk in walks]),
        next_latents=_stack([walk.next_latents for walk in walks]),
        log_prob=log_prob[:, list(schedule.kept)],
        draws=draws,
        x0=torch.cat([walk.x0 for walk in walks]),
    )


def _stack(kept: list[list[Tensor]]) -> Tensor:
    """Per micro-batch, per kept step `[R, *S]` -> `[B, K, *S]`; `[0]` where nothing is kept."""
    if not kept[0]:
        return torch.empty(0)
    return torch.cat([torch.stack(steps, dim=1) for steps in kept])


def _walk(
    models: tuple[FlowModel, FlowModel],
    conditioning: Conditioning,
    seeds: tuple[Tensor, Tensor],
    table: tuple[Schedule, Tensor],
    recipe: Recipe,
) -> _Walk:
    """All steps of one micro-batch; nothing here asks the device for a number."""
    model, outside = models
    start_seed, seed = seeds
    schedule, coeffs = table
    latents = philox_normal(start_seed, model.latent_shape, stream=START_NOISE_STREAM)
    x0_pred: Tensor | None = None
    before, after, log_probs = [], [], []
    for step in range(schedule.num_steps):
        stepper = model if step in schedule.kept else outside
        velocity, guidance = predict(stepper, latents, coeffs[step, 0], conditioning, recipe)
        needs_x0 = step + 1 < schedule.num_steps and schedule.history[step + 1]
        out = flow_step(
            latents,
            velocity,
            coeffs,
            step,
            seed,
            guidance=guidance,
            x0_prev=x0_pred if schedule.history[step] else None,
            return_x0_pred=needs_x0,
        )
        if step in schedule.kept:
            before.append(latents)
            after.append(out.next_latents)
        latents, x0_pred = out.next_latents, out.x0_pred
        log_probs.append(out.log_prob)
    return _Walk(x0=latents, latents=before, next_latents=after, log_prob=torch.stack(log_probs, dim=1))


def predict(
    model: FlowModel, latents: Tensor, sigma: Tensor, conditioning: Conditioning, recipe: Recipe
) -> tuple[Tensor, Guidance | None]:
    """Velocity `[B, *S]`, and the unconditional half where the recipe guides; `sigma` is `[]` or `[B]` fp32.

    The unconditional half carries no gradient: published trainers detach it, so its backward is waste. A model
    with a `guided (velocity, negative, scale)` of its own returns one velocity.
    """
    sigma = sigma.expand(latents.shape[0])
    with _precision(recipe, latents.device):
        velocity = model.velocity(latents, sigma, conditioning).contiguous()
        if recipe.guidance_scale == 1.0:
            return velocity, None
        with torch.no_grad():
            negative = model.velocity(latents, sigma, conditioning.negative()).contiguous()
        own_way = getattr(model, "guided", None)  # a family that mixes the halves in another way
        if own_way is not None:
            return own_way(velocity, negative, recipe.guidance_scale), None
    return velocity, Guidance(negative, recipe.guidance_scale)


def _precision(recipe: Recipe, device: torch.device) -> AbstractContextManager[None]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16")


def replay(
    model: FlowModel,
    trajectory: Trajectory,
    conditioning: Conditioning,
    rows: slice,
    position: Tensor,
    recipe: Recipe,
    reference: FlowModel | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scores stored transitions under the model's present weights, with gradient.

    Args:
        conditioning: the rows' conditioning `[R, ...]`.
        rows: which samples of the trajectory.
        position: `[R]` int64, which of its kept steps each of them replays.
        reference: a model to measure the distance from; it gets no gradient.

    Returns:
        log_prob `[R]` fp32, and the drift `[R]` from the reference: the mean square distance between the means of
        the two transitions, under guidance with both halves of both models.
    """
    index = torch.arange(rows.start, rows.stop, device=position.device)
    step_index = trajectory.step_index.to(position.device)[position]
    latents, next_latents = trajectory.latents[index, position], trajectory.next_latents[index, position]
    sigma = trajectory.coeffs[step_index, 0]
    velocity, guidance = predict(model, latents, sigma, conditioning, recipe)
    transition = (latents, velocity, next_latents, trajectory.coeffs, step_index)
    if reference is None:
        return flow_log_prob(*transition, guidance=guidance), None
    with torch.no_grad():
        other, other_guidance = predict(reference, latents, sigma, conditioning, recipe)
    negative = None if other_guidance is None else other_guidance.negative_velocity
    extras = Extras(reference_velocity=other, reference_negative=negative)
    out = flow_log_prob(*transition, guidance=guidance, extras=extras)
    return out.log_prob, out.drift


@torch.no_grad()
def rescored(
    model: FlowModel, trajectory: Trajectory, conditioning: Conditioning, recipe: Recipe
) -> Trajectory:
    """The trajectory with log-probs under `model`: for one that another model, or another precision, sampled.

    Costs a forward a kept step. Micro-batches are those of the rollout, so a replay by `model` has ratio 1.
    """
    num_rows, num_kept = trajectory.log_prob.shape
    device = trajectory.log_prob.device
    log_prob = torch.empty_like(trajectory.log_prob)
    for rows in row_slices(num_rows, recipe.rollout_rows):
        part = conditioning.rows(torch.arange(rows.start, rows.stop, device=device))
        for kept in range(num_kept):
            position = torch.full((rows.stop - rows.start,), kept, device=device)
            log_prob[rows, kept], _ = replay(model, trajectory, part, rows, position, recipe)
    return replace(trajectory, log_prob=log_prob)


def check_finite(log_prob: Tensor) -> None:
    """Refuses a rollout with a NaN or infinite velocity; `log_prob [B, T]` is not finite exactly there.

    Raises:
        ValueError: names the first step and sample.
    """
    bad = ~torch.isfinite(log_prob)
    if not bad.any():
        return
    step, sample = (int(i) for i in bad.t().nonzero()[0])
    raise ValueError(
        f"the velocity is NaN or infinite at step {step}, sample {sample} "
        f"({int(bad.any(1).sum())} of {len(bad)} samples are hit); lower the learning rate or the guidance "
        "scale, or run in a wider precision"
    )
