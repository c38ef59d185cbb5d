"""The training samples of a step, chunk after chunk, each scored while the next is rolled out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from flowgrpo_fast.data.draws import draw as draw_seeds
from flowgrpo_fast.data.prompts import Prompts
from flowgrpo_fast.recipe import Prune, Recipe
from flowgrpo_fast.rewards.scoring import Scoring
from flowgrpo_fast.sampling.sampler import rollout
from flowgrpo_fast.sampling.schedule import Schedule
from flowgrpo_fast.training.engine import Engine
from flowgrpo_fast.types import Draws, Trajectory


def draw(recipe: Recipe, set_size: int, step: int, device: torch.device) -> Draws:
    """Prompts and noise seeds of one training step, those of scouts and of pruned candidates included."""
    return draw_seeds(
        Prompts().draw(step, recipe.seed, recipe.num_prompts, set_size),
        step=step,
        seed=recipe.seed,
        num_drawn=recipe.num_drawn,
        share_start=recipe.share_start_noise,
        device=device,
    )


def start_scoring(engine: Engine, trajectory: Trajectory) -> Scoring:
    """Begins to score finished samples."""
    draws = trajectory.draws
    asked = engine.prompt_set.rows(draws.prompt_index[draws.group_id])
    return engine.scorer.start(trajectory.x0, asked, draws.group_id, len(draws.prompt_index))


def sample_and_score(engine: Engine, draws: Draws, schedule: Schedule) -> tuple[Trajectory, list[Scoring]]:
    """The training samples of a step and their rewards, under way."""
    return in_chunks(engine, draws, lambda chunk: sample(engine, chunk, schedule))


def in_chunks(
    engine: Engine, draws: Draws, walk: Callable[[Draws], Trajectory]
) -> tuple[Trajectory, list[Scoring]]:
    """Rolls out `recipe.prompts_per_chunk` prompts at a time; rewards that run elsewhere start with their chunk.

    Groups stay whole, and forwards have the rows that they would have without chunks; only where groups are one row
    yet, at most a chunk's prompts go together.
    """
    parts, scorings = [], []
    for chunk in chunks(draws, engine.recipe.prompts_per_chunk):
        parts.append(walk(chunk))
        scorings.append(start_scoring(engine, parts[-1]))
    return joined(parts), scorings


def sample(engine: Engine, draws: Draws, schedule: Schedule) -> Trajectory:
    """The rollout of the policy that samples; candidates that the recipe prunes are scored on the way."""
    conditioning = engine.conditioning.rows(draws.prompt_index[draws.group_id])
    prune = engine.recipe.prune
    by_reward = isinstance(prune, Prune) and prune.score == "reward"
    judged = engine.scorer.preview_score(engine.prompt_set.rows(draws.prompt_index)) if by_reward else None
    return rollout(
        engine.sampled,
        conditioning,
        draws,
        schedule,
        engine.recipe,
        engine.outside,
        judged,
        engine.graphs,
    )


def chunks(draws: Draws, num_prompts: int) -> Iterator[Draws]:
    """Draws of `num_prompts` prompts each, 0 = all at once; group ids count from 0 in each."""
    if num_prompts in (0, len(draws.prompt_index)):
        yield draws
        return
    group_size = len(draws.group_id) // len(draws.prompt_index)
    for first in range(0, len(draws.prompt_index), num_prompts):
        rows = draws.rows(slice(first * group_size, (first + num_prompts) * group_size))
        yield replace(
            rows,
            prompt_index=draws.prompt_index[first : first + num_prompts],
            group_id=rows.group_id - first,
        )


def joined(parts: list[Trajectory]) -> Trajectory:
    """Chunks of one schedule as one trajectory."""
    if len(parts) == 1:
        return parts[0]
    first, num_groups = parts[0], len(parts[0].draws.prompt_index)
    all_draws = [part.draws for part in parts]
    draws = replace(
        first.draws,
        prompt_index=torch.cat([d.prompt_index for d in all_draws]),
        group_id=torch.cat([d.group_id + i * num_groups for i, d in enumerate(all_draws)]),
        seed=torch.cat([d.seed for d in all_draws]),
        start_seed=torch.cat([d.start_seed for d in all_draws]),
    )
    fields = ("latents", "next_latents", "log_prob", "x0")
    tensors: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in fields}
    halves = [part.unconditional for part in parts if part.unconditional is not None]
    tensors["unconditional"] = torch.cat(halves) if halves else None
    return replace(first, **tensors, draws=draws, evaluations=sum(part.evaluations for part in parts))
