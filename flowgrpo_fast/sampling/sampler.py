"""Walks a model along a schedule, and scores stored transitions again, on the same values."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowgrpo_fast.ops import Extras, compact, flow_log_prob, philox_normal
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.sampling.graphs import Graphs
from flowgrpo_fast.sampling.prune import Candidates, survivors
from flowgrpo_fast.sampling.schedule import Schedule
from flowgrpo_fast.sampling.step import (
    StepInput,
    StepResult,
    halves,
    heads,
    keeps_unconditional,
    launches,
    predict,
    row_slices,
    shares_first,
    spread,
    spread_guidance,
    take_step,
)
from flowgrpo_fast.types import Conditioning, Draws, FlowModel, PreviewScore, Trajectory, at_step

START_NOISE_STREAM = 1  # stream 0 is the noise of the steps


@dataclass(frozen=True, slots=True)
class Walk:
    """The samples under way, all before the same step; R of them, fewer after each cut."""

    conditioning: Conditioning  # [R, ...]
    draws: Draws
    latents: Tensor  # [R, *S]
    x0_pred: Tensor | None  # [R, *S] of the step before, where something reads it
    before: Tensor  # [R, K, *S] latents before each kept step, as far as they are known
    after: Tensor  # [R, K, *S]
    unconditional: Tensor | None  # [R, K, *S] of guidance, where the update reads it
    log_prob: Tensor  # [R, T]; 0 at deterministic steps, not finite where a velocity was not

    def heads(self, size: int) -> Walk:
        """One row for each `size` neighbours that start alike."""
        if size == 1:
            return self
        return replace(
            self,
            conditioning=heads(self.conditioning, len(self.latents), size),
            latents=self.latents[::size].contiguous(),
            log_prob=self.log_prob[::size].contiguous(),
            draws=self.draws.rows(slice(None, None, size)),
        )

    def spread_over(self, whole: Walk) -> Walk:
        """The rows of all samples again, from those of groups that were one until here."""
        size = len(whole.latents) // len(self.latents)
        if size == 1:
            return self
        return replace(
            whole,
            latents=spread(self.latents, size),
            x0_pred=None if self.x0_pred is None else spread(self.x0_pred, size),
            log_prob=spread(self.log_prob, size),
        )

    def move(self, step: int, kept: tuple[int, ...], result: StepResult) -> Walk:
        """One step further."""
        out, unconditional = result.out, self.unconditional
        if step in kept:
            self.before[:, kept.index(step)] = self.latents
            self.after[:, kept.index(step)] = out.next_latents
            if result.guidance is not None:
                half = result.guidance.negative_velocity
                if unconditional is None:
                    unconditional = half.new_empty(self.before.shape)
                unconditional[:, kept.index(step)] = half
        self.log_prob[:, step] = out.log_prob
        return replace(self, latents=out.next_latents, x0_pred=out.x0_pred, unconditional=unconditional)

    def log_prob_of(self, kept: tuple[int, ...]) -> Tensor:
        """`[R, K]`, gathered without an index that the device would wait for."""
        columns = [self.log_prob[:, step] for step in kept]
        return torch.stack(columns, 1) if columns else self.log_prob[:, :0]

    def given(self, seed: Tensor) -> StepInput:
        """What a step reads."""
        return StepInput(self.latents, self.conditioning, seed, self.x0_pred)

    def rows(self, index: Tensor) -> Walk:
        """The rows that go on, gathered in one launch."""
        names = ["latents", "log_prob"]
        names += ["x0_pred"] if self.x0_pred is not None else []
        names += ["before", "after"] if self.before.numel() else []
        names += ["unconditional"] if self.unconditional is not None else []
        own = {name: getattr(self, name) for name in names}
        draws = self.draws
        moved = compact(index, *own.values(), draws.group_id, draws.seed, draws.start_seed)
        group_id, seed, start_seed = moved[len(own) :]
        return replace(
            self,
            conditioning=self.conditioning.rows(index),
            draws=replace(draws, group_id=group_id, seed=seed, start_seed=start_seed),
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
    graphs: Graphs | None = None,
) -> Trajectory:
    """Samples B trajectories and keeps the stochastic steps; the schedule's cuts leave fewer of them on the way.

    All rows move together, step by step, through the network in micro-batches of `recipe.rollout_rows`: groups are
    joined, so a micro-batch stays full when they shrink. How many rows survive is known beforehand, which ones only on
    the device: the latents wait for nothing there (a reward that runs on the host waits for its images). A group that
    shares its start is one row until its first stochastic step, as `launches` says.

    Args:
        conditioning: one row per sample, on the model's device.
        draws: the seeds; every sample's noise is a function of (seed, step, element) alone.
        schedule: from `resolve_schedule`.
        recipe: guidance_scale, precision, rows per forward, sharing and pruning are read.
        outside: what the steps without a log-prob run, say a copy in low precision; None = `model`.
        score: what `Prune.score = "reward"` asks.
        graphs: captured steps, replayed where they fit; None launches each kernel.

    Raises:
        ValueError: the model gave a NaN or infinite velocity; names step and sample.
    """
    coeffs = schedule.coeffs.to(draws.seed.device, non_blocking=True)
    whole = _start(model, conditioning, draws, schedule)
    shapes = launches(schedule, draws, recipe)
    walk = whole.heads(len(whole.latents) // shapes[0].num_rows)
    steppers = [
        at_step(model if shape.step in schedule.kept else outside or model, schedule.sigmas, shape.step)
        for shape in shapes
    ]
    if graphs is not None:
        graphs.begin(steppers, shapes, walk.given(draws.seed), coeffs, recipe)
    evaluations, log_probs = 0, []
    for stepper, shape in zip(steppers, shapes, strict=True):
        step = shape.step
        if len(walk.latents) < shape.num_rows:
            walk = walk.spread_over(whole)
        evaluations += shape.num_rows * halves(recipe)
        given = walk.given(walk.draws.seed if shape.size == 1 else whole.draws.seed)
        if graphs is not None:
            result = graphs.take_step(stepper, given, shape)
        else:
            result = take_step(stepper, given, coeffs, step, shape, recipe)
        if shape.size > 1:
            walk = walk.spread_over(whole)
        latents, walk = walk.latents, walk.move(step, schedule.kept, result)
        if step + 1 in schedule.cuts:
            log_probs.append(walk.log_prob)
            assert result.velocity is not None
            seen = Candidates(
                latents=latents,
                velocity=result.velocity,
                guidance=result.guidance,
                coeffs=coeffs,
                step=step,
                x0_pred=walk.x0_pred,
                num_groups=len(draws.prompt_index),
                grid=model.latent_grid,
            )
            # Both names: the others' memory is free.
            whole = walk = walk.rows(survivors(seen, schedule.cuts[step + 1], recipe.prune, score))
    check_finite(*log_probs, walk.log_prob)
    return Trajectory(
        sigmas=schedule.sigmas,
        coeffs=coeffs,
        step_index=torch.tensor(schedule.kept, dtype=torch.int64),
        latents=walk.before,
        next_latents=walk.after,
        log_prob=walk.log_prob_of(schedule.kept),
        draws=walk.draws,
        x0=walk.latents,
        evaluations=evaluations,
        unconditional=walk.unconditional if keeps_unconditional(schedule, recipe) else None,
        shares_first=shares_first(schedule, draws, recipe),
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
        unconditional=None,
        log_prob=latents.new_zeros(len(latents), schedule.num_steps, dtype=torch.float32),
    )


def replay(
    model: FlowModel,
    trajectory: Trajectory,
    conditioning: Conditioning,
    rows: slice,
    position: Tensor,
    recipe: Recipe,
    reference: FlowModel | None = None,
    size: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Scores stored transitions under the model's present weights, with gradient.

    Args:
        trajectory: what it stores of the unconditional half is taken for the present weights' own.
        conditioning: the rows' conditioning `[R, ...]`.
        rows: which samples of the trajectory.
        position: `[R]` int64, which of its kept steps each of them replays.
        reference: a model to measure the distance from; it gets no gradient.
        size: so many neighbours replay the same step from the same latents: one velocity serves them all.

    Returns:
        log_prob `[R]` fp32, and the drift `[R]` from the reference: the mean square distance between the means of
        the two transitions, under guidance with both halves of both models.
    """
    index = torch.arange(rows.start, rows.stop, device=position.device)
    step_index = trajectory.step_index.to(position.device, non_blocking=True)[position]
    latents, next_latents = trajectory.latents[index, position], trajectory.next_latents[index, position]
    given = (latents[::size].contiguous(), trajectory.coeffs[step_index[::size], 0])
    common, kept = heads(conditioning, len(latents), size), trajectory.unconditional
    unconditional = None if kept is None else kept[index[::size], position[::size]]
    velocity, guidance = predict(model, *given, common, recipe, unconditional)
    transition = (latents, spread(velocity, size), next_latents, trajectory.coeffs, step_index)
    guidance = spread_guidance(guidance, size)
    if reference is None:
        return flow_log_prob(*transition, guidance=guidance), None
    with torch.no_grad():
        other, other_guidance = predict(reference, *given, common, recipe)
    negative = None if other_guidance is None else spread(other_guidance.negative_velocity, size)
    extras = Extras(reference_velocity=spread(other, size), reference_negative=negative)
    out = flow_log_prob(*transition, guidance=guidance, extras=extras)
    return out.log_prob, out.drift


@torch.no_grad()
def rescored(
    model: FlowModel, trajectory: Trajectory, conditioning: Conditioning, recipe: Recipe
) -> Trajectory:
    """The trajectory with log-probs under `model`: for one that another model, or another precision, sampled.

    Costs a forward a kept step. Micro-batches are those of the rollout, so a replay by `model` has ratio 1.
    """
    trajectory = replace(trajectory, unconditional=None)  # it was another model's
    num_rows, num_kept = trajectory.log_prob.shape
    device = trajectory.log_prob.device
    log_prob = torch.empty_like(trajectory.log_prob)
    for kept in range(num_kept):
        expert = at_step(model, trajectory.sigmas, trajectory.step_index[kept])
        size, num = 1, recipe.rollout_rows
        if kept == 0 and trajectory.shares_first:
            size, num = recipe.group_size, recipe.prompts_per_forward(num) * recipe.group_size
        for rows in row_slices(num_rows, num):
            part = conditioning.rows(torch.arange(rows.start, rows.stop, device=device))
            position = torch.full((rows.stop - rows.start,), kept, device=device)
            log_prob[rows, kept], _ = replay(expert, trajectory, part, rows, position, recipe, size=size)
    return replace(trajectory, log_prob=log_prob)


def check_finite(*log_probs: Tensor) -> None:
    """Refuses a rollout with a NaN or infinite velocity; `[R, T]` each, not finite exactly there. Waits once.

    Raises:
        ValueError: names the first step and sample.
    """
    if bool(torch.stack([torch.isfinite(log_prob).all() for log_prob in log_probs]).all()):
        return
    bad = next(bad for bad in (~torch.isfinite(log_prob) for log_prob in log_probs) if bad.any())
    step, sample = (int(i) for i in bad.t().nonzero()[0])
    raise ValueError(
        f"the velocity is NaN or infinite at step {step}, sample {sample} "
        f"({int(bad.any(1).sum())} of {len(bad)} samples are hit); lower the learning rate or the guidance "
        "scale, or run in a wider precision"
    )
