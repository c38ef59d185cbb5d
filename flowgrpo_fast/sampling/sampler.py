"""Walks a model along a schedule, and scores stored transitions again, on the same values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowgrpo_fast.ops import (
    Extras,
    FlowStepOutput,
    Guidance,
    compact,
    flow_log_prob,
    flow_step,
    philox_normal,
)
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.sampling.prune import Candidates, survivors
from flowgrpo_fast.sampling.schedule import Schedule
from flowgrpo_fast.types import Conditioning, Draws, FlowModel, PreviewScore, Trajectory

START_NOISE_STREAM = 1  # stream 0 is the noise of the steps


def row_slices(num_rows: int, rows: int) -> Iterator[slice]:
    """Consecutive micro-batches of `rows`. Rollout and replay use the same ones: same shapes, same bits."""
    for first in range(0, num_rows, rows):
        yield slice(first, min(first + rows, num_rows))


@dataclass(frozen=True, slots=True)
class Walk:
    """The samples under way, all before the same step; R of them, fewer after each cut."""

    conditioning: Conditioning  # [R, ...]
    draws: Draws
    latents: Tensor  # [R, *S]
    x0_pred: Tensor | None  # [R, *S] of the step before, where something reads it
    before: Tensor  # [R, K, *S] latents before each kept step, as far as they are known
    after: Tensor  # [R, K, *S]
    log_prob: Tensor  # [R, T]; 0 at deterministic steps, not finite where a velocity was not

    def move(self, step: int, kept: tuple[int, ...], out: FlowStepOutput) -> Walk:
        """One step further."""
        if step in kept:
            self.before[:, kept.index(step)] = self.latents
            self.after[:, kept.index(step)] = out.next_latents
        self.log_prob[:, step] = out.log_prob
        return replace(self, latents=out.next_latents, x0_pred=out.x0_pred)

    def rows(self, index: Tensor) -> Walk:
        """The rows that go on, gathered in one launch."""
        names = ["latents", "log_prob"]
        names += ["x0_pred"] if self.x0_pred is not None else []
        names += ["before", "after"] if self.before.numel() else []
        own = {name: getattr(self, name) for name in names}
        ids = {name: getattr(self.draws, name) for name in ("group_id", "seed", "start_seed")}
        moved = compact(index, *own.values(), *ids.values())
        return replace(
            self,
            conditioning=self.conditioning.rows(index),
            draws=replace(self.draws, **dict(zip(ids, moved[len(own) :], strict=True))),
            **{"before": self.before[: len(index)], "after": self.after[: len(index)]}  # where none is kept
            | dict(zip(own, moved[: len(own)], strict=True)),
        )


@torch.no_grad()
def rollout(
    model: FlowModel,
    conditioning: Conditioning,
    draws: Draws,
    schedule: Schedule,
    recipe: Recipe,
    outside: FlowModel | None = None,
    score: PreviewScore | None = None,
) -> Trajectory:
    """Samples B trajectories and keeps the stochastic steps; the schedule's cuts leave fewer of them on the way.

    All rows move together, step by step, through the network in micro-batches of `recipe.rollout_rows`: groups are
    joined, so a micro-batch stays full when they shrink. How many rows survive is known beforehand, which ones only on
    the device: the latents wait for nothing there (a reward that runs on the host waits for its images).

    Args:
        conditioning: one row per sample, on the model's device.
        draws: the seeds; every sample's noise is a function of (seed, step, element) alone.
        schedule: from `resolve_schedule`.
        recipe: guidance_scale, precision, rows per forward and pruning are read.
        outside: what the steps without a log-prob run, say a copy in low precision; None = `model`.
        score: what `Prune.score = "reward"` asks.

    Raises:
        ValueError: the model gave a NaN or infinite velocity; names step and sample.
    """
    coeffs = schedule.coeffs.to(draws.seed.device)
    walk = _start(model, conditioning, draws, schedule)
    evaluations, log_probs = 0, []
    for step in range(schedule.num_steps):
        stepper = model if step in schedule.kept else outside or model
        velocity, guidance = _predict_rows(stepper, walk, coeffs[step, 0], recipe)
        evaluations += len(velocity) * halves(recipe)
        out = flow_step(
            walk.latents,
            velocity,
            coeffs,
            step,
            walk.draws.seed,
            guidance=guidance,
            x0_prev=walk.x0_pred if schedule.history[step] else None,
            return_x0_pred=schedule.x0_is_read(step),
        )
        last, walk = walk, walk.move(step, schedule.kept, out)
        if step + 1 in schedule.cuts:
            log_probs.append(walk.log_prob)
            seen = Candidates(
                latents=last.latents,
                velocity=velocity,
                guidance=guidance,
                coeffs=coeffs,
                step=step,
                x0_pred=walk.x0_pred,
                num_groups=len(draws.prompt_index),
                grid=getattr(model, "latent_grid", None),
            )
            walk = walk.rows(survivors(seen, schedule.cuts[step + 1], recipe.prune, score))
    for log_prob in (*log_probs, walk.log_prob):
        check_finite(log_prob)
    return Trajectory(
        sigmas=schedule.sigmas,
        coeffs=coeffs,
        step_index=torch.tensor(schedule.kept, dtype=torch.int64),
        latents=walk.before,
        next_latents=walk.after,
        log_prob=walk.log_prob[:, list(schedule.kept)],
        draws=walk.draws,
        x0=walk.latents,
        evaluations=evaluations,
    )


def _start(model: FlowModel, conditioning: Conditioning, draws: Draws, schedule: Schedule) -> Walk:
    latents = philox_normal(draws.start_seed, model.latent_shape, stream=START_NOISE_STREAM)
    stored = (len(latents), len(schedule.kept), *model.latent_shape)
    return Walk(
        conditioning=conditioning,
        draws=draws,
        latents=latents,
        x0_pred=None,
        before=latents.new_empty(stored),
        after=latents.new_empty(stored),
        log_prob=latents.new_zeros(len(latents), schedule.num_steps, dtype=torch.float32),
    )


def _predict_rows(
    model: FlowModel, walk: Walk, sigma: Tensor, recipe: Recipe
) -> tuple[Tensor, Guidance | None]:
    """`predict` for all rows, one micro-batch after another."""
    parts = [
        predict(model, walk.latents[rows], sigma, walk.conditioning.rows(rows), recipe)
        for rows in row_slices(len(walk.latents), recipe.rollout_rows)
    ]
    if len(parts) == 1:
        return parts[0]
    velocity = torch.cat([velocity for velocity, _ in parts])
    negative = [guidance.negative_velocity for _, guidance in parts if guidance is not None]
    return velocity, Guidance(torch.cat(negative), recipe.guidance_scale) if negative else None


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
        if halves(recipe) == 1:
            return velocity, None
        with torch.no_grad():
            negative = model.velocity(latents, sigma, conditioning.negative()).contiguous()
        own_way = getattr(model, "guided", None)  # a family that mixes the halves in another way
        if own_way is not None:
            return own_way(velocity, negative, recipe.guidance_scale), None
    return velocity, Guidance(negative, recipe.guidance_scale)


def halves(recipe: Recipe) -> int:
    """Forwards a velocity takes: guidance has an unconditional half."""
    return 1 if recipe.guidance_scale == 1.0 else 2


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
