"""What the tests of this room share: draws, samplers and replays of a recipe, without an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgrpo_fast.data.draws import draw
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.sampling.graphs import Graphs
from flowgrpo_fast.sampling.policy import Policy
from flowgrpo_fast.sampling.walk import Sampler
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.training.learner import Counts, Learner, networks
from flowgrpo_fast.training.update import micro_batches
from flowgrpo_fast.types import Batch, Choices, Conditioning, Credit, Draws, FlowModel, PromptSet, Trajectory

CPU = torch.device("cpu")


def drawn(recipe: Recipe, set_size: int, step: int = 0, device: torch.device = CPU) -> Draws:
    """The draws of a training step, as the loop makes them."""
    return draw(
        recipe.data.draw(step, recipe.seed, recipe.num_prompts, set_size),
        step=step,
        seed=recipe.seed,
        num_drawn=recipe.num_drawn,
        share_start=recipe.topology.shares_start,
        device=device,
    )


def sampler_of(model: FlowModel, recipe: Recipe, outside: FlowModel | None = None) -> Sampler:
    """Who is asked, as the engine sets it up."""
    policy = Policy(model, recipe.guidance_scale, recipe.machine.precision)
    return Sampler(
        policy=policy,
        forwards=recipe.forwards,
        outside=None if outside is None else policy.of(outside),
        graphs=Graphs() if recipe.machine.graphs else None,
        keeps_unconditional=recipe.machine.reuse_unconditional and recipe.requires.log_probs,
    )


def uncut(plan: Plan) -> Plan:
    """The same walk of all candidates to the end: each step takes the rows that the widest has."""
    widest = max(range(len(plan.steps)), key=lambda place: len(plan.steps[place].parent))
    steps, width = [], len(plan.steps[widest].parent)
    for place, step in enumerate(plan.steps):
        if place > widest and len(step.parent) < width:
            step = replace(
                step,
                row=np.repeat(step.row[:, :1], width, 1),
                parent=np.arange(width),
                kept=np.repeat(step.kept[:, :1], width, 1),
            )
        steps.append(replace(step, cut=None))
    return replace(plan, steps=tuple(steps))


def batch_of(trajectory: Trajectory, conditioning: Conditioning, seed: int = 0) -> Batch:
    """A batch whose every sample carries weight; credit is a function of the sample's place."""
    num_samples = len(trajectory.x0)
    advantages = torch.linspace(-1, 1, num_samples, device=trajectory.x0.device)
    return Batch(
        samples=trajectory,
        conditioning=conditioning,
        credit=Credit(advantages, torch.ones_like(advantages)),
        live=np.ones(num_samples, dtype=bool),
        choices=Choices(seed, 0, slice(0, num_samples), num_samples),
        prompts=PromptSet(("",) * num_samples, ({},) * num_samples),
    )


def learner_of(model: FlowModel, recipe: Recipe) -> Learner:
    """What trains the model."""
    return Learner(
        policy=Policy(model, recipe.guidance_scale, recipe.machine.precision),
        objective=recipe.objective,
        optimizer=torch.optim.SGD(model.module.parameters(), lr=1e-3, fused=True),
        max_grad_norm=1.0,
        updates_per_step=recipe.optimizer.num_updates,
        rows=recipe.rollout_rows,
        replay_rows=recipe.machine.replay_rows,
        steps_per_forward=recipe.steps_per_forward,
    )


def measured(learner: Learner, batch: Batch) -> Iterator[tuple[Any, Mapping[str, Tensor]]]:
    """Every micro-batch of the update with its statistics, all under the present weights."""
    for rows in batch.shares(learner.updates_per_step):
        share = batch.of_samples(rows)
        evaluator = networks(learner, share, Counts())
        for _, point in micro_batches(learner, share, learner.objective.points(share)):
            yield point, learner.objective.measure(point, evaluator.at(point))


def stacked(trajectory: Trajectory, name: str) -> Tensor:
    """`latents`, `next_latents` or `log_prob` of all kept steps `[B, K, ...]`, where every sample is a row."""
    found = []
    for kept in trajectory.transitions:
        values = getattr(kept, name)
        if name == "latents" and kept.fan > 1:
            values = values.repeat_interleave(kept.fan, 0)
        found.append(values)
    return torch.stack(found, 1)
