"""One step of a walk: velocities in micro-batches, then the transition of all rows. Nothing here asks the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from flowgrpo_fast.ops import FlowStepOutput, Guidance, flow_step
from flowgrpo_fast.recipe import ClippedRatio, Recipe
from flowgrpo_fast.sampling.schedule import Schedule
from flowgrpo_fast.types import Conditioning, Draws, FlowModel


@dataclass(frozen=True, slots=True)
class Launch:
    """The shape of a step, known on the host before the walk begins."""

    step: int
    num_rows: int  # of the walk: samples, or groups that are one row yet
    rows: int  # of them per forward
    size: int = 1  # samples that a row becomes at this step
    reads_x0: bool = False  # the x0 prediction of the step before
    gives_x0: bool = False
    gives_velocity: bool = False
    gives_unconditional: bool = False


@dataclass(frozen=True, slots=True)
class StepInput:
    """N rows before a step, and the seeds of the `N * size` samples after it."""

    latents: Tensor  # [N, *S]
    conditioning: Conditioning  # [N, ...]
    seed: Tensor  # [N * size] int64
    x0_pred: Tensor | None = None  # [N, *S] fp32


@dataclass(frozen=True, slots=True)
class StepResult:
    """`N * size` samples after a step."""

    out: FlowStepOutput
    velocity: Tensor | None = None  # where the launch asks for it
    guidance: Guidance | None = None


def launches(schedule: Schedule, draws: Draws, recipe: Recipe) -> list[Launch]:
    """The shapes of all steps of a rollout.

    A group that shares its start is one row until its first stochastic step, whose velocity is computed once for all
    of it where the update trains the whole window: the replay then runs the same rows.
    """
    num_groups, num_rows = len(draws.prompt_index), len(draws.group_id)
    unconditional = keeps_unconditional(schedule, recipe)
    first = schedule.kept[0] if schedule.kept and recipe.share_prefix and draws.shares_start else -1
    found = []
    for step in range(schedule.num_steps):
        if step in schedule.cuts:
            num_rows = num_groups * schedule.cuts[step]
        shape = num_rows, recipe.rollout_rows, 1
        if step < first:
            shape = num_groups, recipe.rollout_rows, 1
        elif step == first and shares_first(schedule, draws, recipe):
            shape = num_groups, recipe.prompts_per_forward(recipe.rollout_rows), num_rows // num_groups
        found.append(
            Launch(
                step=step,
                num_rows=shape[0],
                rows=shape[1],
                size=shape[2],
                reads_x0=schedule.history[step],
                gives_x0=schedule.x0_is_read(step),
                gives_velocity=step + 1 in schedule.cuts,
                gives_unconditional=unconditional,  # at every step: captured steps of one shape stay one graph
            )
        )
    return found


def shares_first(schedule: Schedule, draws: Draws, recipe: Recipe) -> bool:
    """Whether one velocity serves a group at its first stochastic step, in rollout and update.

    Not where samples train on steps of their own, nor where an optimiser step takes a part of a group.
    """
    whole = recipe.rows_per_update % recipe.group_size == 0
    trains_all = 0 < len(schedule.kept) == schedule.num_trained
    return recipe.share_prefix and draws.shares_start and trains_all and whole


def keeps_unconditional(schedule: Schedule, recipe: Recipe) -> bool:
    """Whether the update will read the unconditional velocities of the kept steps."""
    replays = isinstance(recipe.loss, ClippedRatio) and bool(schedule.kept)
    return recipe.reuse_unconditional and halves(recipe) == 2 and replays


def row_slices(num_rows: int, rows: int) -> Iterator[slice]:
    """Consecutive micro-batches of `rows`. Rollout and replay use the same ones: same shapes, same bits."""
    for first in range(0, num_rows, rows):
        yield slice(first, min(first + rows, num_rows))


def spread(values: Tensor, size: int) -> Tensor:
    """Each row `size` times, neighbours: what a group has in common `[P, ...]` for its samples `[P * size, ...]`.

    The gradient of a row is the sum over its group.
    """
    if size == 1:
        return values
    return values.unsqueeze(1).expand(-1, size, *values.shape[1:]).flatten(0, 1).contiguous()


def spread_guidance(guidance: Guidance | None, size: int) -> Guidance | None:
    """The same for the unconditional half."""
    return None if guidance is None else Guidance(spread(guidance.negative_velocity, size), guidance.scale)


def heads(conditioning: Conditioning, num_rows: int, size: int) -> Conditioning:
    """The first of each `size` neighbours among `num_rows` rows."""
    if size == 1:
        return conditioning
    return conditioning.rows(torch.arange(0, num_rows, size, device=conditioning.prompt_embeds.device))


def take_step(
    model: FlowModel,
    given: StepInput,
    coeffs: Tensor,
    step: int | Tensor,
    launch: Launch,
    recipe: Recipe,
) -> StepResult:
    """One step of all rows.

    Args:
        coeffs: `[T, 8]` on the device.
        step: its row; a 0-d int64 tensor on the device where the step is captured in a graph.
        launch: the shapes; `launch.step` is not read.
    """
    row = coeffs.index_select(0, step.view(1))[0] if isinstance(step, Tensor) else coeffs[step]
    velocity, guidance = predict_rows(model, given, row[0], launch.rows, recipe)
    size, x0_prev = launch.size, given.x0_pred if launch.reads_x0 else None
    velocity, guidance = spread(velocity, size), spread_guidance(guidance, size)
    out = flow_step(
        spread(given.latents, size),
        velocity,
        coeffs,
        step,
        given.seed,
        guidance=guidance,
        x0_prev=None if x0_prev is None else spread(x0_prev, size),
        return_x0_pred=launch.gives_x0,
    )
    return StepResult(
        out,
        velocity if launch.gives_velocity else None,
        guidance if launch.gives_velocity or launch.gives_unconditional else None,
    )


def predict_rows(
    model: FlowModel, given: StepInput, sigma: Tensor, rows: int, recipe: Recipe
) -> tuple[Tensor, Guidance | None]:
    """`predict` for all rows, one micro-batch after another."""
    parts = [
        predict(model, given.latents[part], sigma, given.conditioning.rows(part), recipe)
        for part in row_slices(len(given.latents), rows)
    ]
    if len(parts) == 1:
        return parts[0]
    velocity = torch.cat([velocity for velocity, _ in parts])
    negative = [guidance.negative_velocity for _, guidance in parts if guidance is not None]
    return velocity, Guidance(torch.cat(negative), recipe.guidance_scale) if negative else None


def predict(
    model: FlowModel,
    latents: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    recipe: Recipe,
    unconditional: Tensor | None = None,
) -> tuple[Tensor, Guidance | None]:
    """Velocity `[B, *S]`, and the unconditional half where the recipe guides; `sigma` is `[]` or `[B]` fp32.

    `unconditional [B, *S]`: that half, where it has been computed before.
    The unconditional half carries no gradient: published trainers detach it, so its backward is waste. A model
    that mixes the halves in a way of its own (`mixes_guidance`) gives one velocity.
    """
    sigma = sigma.expand(latents.shape[0])
    with _precision(recipe, latents.device):
        velocity = model.velocity(latents, sigma, conditioning).contiguous()
        if halves(recipe) == 1:
            return velocity, None
        with torch.no_grad():
            if unconditional is None:
                negative = model.velocity(latents, sigma, conditioning.negative()).contiguous()
            else:
                negative = unconditional.contiguous()
        if model.mixes_guidance:
            return model.guided(velocity, negative, recipe.guidance_scale), None
    return velocity, Guidance(negative, recipe.guidance_scale)


def halves(recipe: Recipe) -> int:
    """Forwards a velocity takes: guidance has an unconditional half."""
    return 1 if recipe.guidance_scale == 1.0 else 2


def _precision(recipe: Recipe, device: torch.device) -> AbstractContextManager[None]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16")
