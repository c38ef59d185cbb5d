"""Exploring: many cheap scouts a prompt, and the seeds among them that are worth a full sample."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowgrpo_fast.recipe import NoScouts, Scouts
from flowgrpo_fast.rewards.scoring import collect, require_all
from flowgrpo_fast.sampling.explore import spearman, top_overlap
from flowgrpo_fast.sampling.prune import choose
from flowgrpo_fast.sampling.sampler import rollout
from flowgrpo_fast.sampling.schedule import ode_schedule
from flowgrpo_fast.training.engine import Engine
from flowgrpo_fast.training.sample import in_chunks
from flowgrpo_fast.types import Draws, Trajectory


@dataclass(frozen=True, slots=True)
class Exploration:
    """Which seeds are sampled in full, and what finding them took."""

    draws: Draws
    finished: Trajectory | None = None  # the scouts themselves, where they are trained on
    scout_rewards: Tensor | None = None  # [B], of the chosen seeds
    mean_reward: Tensor | None = None  # [], of all scouts
    evaluations: int = 0


def explore(engine: Engine, draws: Draws) -> Exploration:
    """Scores a scout for every seed drawn and keeps `group_size` a prompt; without scouts, all.

    A scout walks the ODE in few steps from the start noise that its seed names; the full sample of the same seed
    starts from the same noise to the bit.
    """
    recipe = engine.recipe
    match recipe.explore:
        case NoScouts():
            return Exploration(draws)
        case Scouts() as part:
            schedule = ode_schedule(
                replace(recipe.sigmas, num_inference_steps=part.num_inference_steps),
                engine.seq_len,
                recipe.solver,
            )

    def walk(chunk: Draws) -> Trajectory:
        conditioning = engine.conditioning.rows(chunk.prompt_index[chunk.group_id])
        return rollout(engine.scout, conditioning, chunk, schedule, recipe, graphs=engine.graphs)

    scouts, scorings = in_chunks(engine, draws, walk)
    rewards = require_all(collect(scorings)).total
    rows = choose(rewards.view(len(draws.prompt_index), -1), recipe.group_size, part.select)
    chosen = draws.rows(rows)
    finished = None if part.regenerate else replace(_rows(scouts, rows), draws=chosen, evaluations=0)
    return Exploration(chosen, finished, rewards[rows], rewards.mean(), scouts.evaluations)


def _rows(trajectory: Trajectory, rows: Tensor) -> Trajectory:
    """Some rows of a trajectory without kept steps."""
    fields = ("latents", "next_latents", "log_prob", "x0")
    return replace(trajectory, **{name: getattr(trajectory, name)[rows] for name in fields})


def scout_metrics(explored: Exploration, rewards: Tensor) -> dict[str, float]:
    """The scouts' mean reward; and, against the full samples of the same seeds, ranks and overlap of the better halves.

    The chosen are extremes: their own mean reward says little of the policy, and they are told apart more easily than
    all scouts would be. `Scouts.select = "random"` measures without that.
    """
    if explored.scout_rewards is None or explored.mean_reward is None:
        return {}
    if explored.finished is not None:
        return {"scout_reward": float(explored.mean_reward)}
    num_groups = len(explored.draws.prompt_index)
    scouts, full = explored.scout_rewards.view(num_groups, -1), rewards.view(num_groups, -1)
    values = {
        "scout_reward": explored.mean_reward.double(),
        "scout_spearman": spearman(scouts, full).mean(),
        "scout_top_overlap": top_overlap(scouts, full, scouts.shape[1] // 2).mean().double(),
    }
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
