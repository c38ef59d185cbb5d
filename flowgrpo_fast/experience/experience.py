"""What experience is made with, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch

from flowgrpo_fast.objectives.objective import Requires
from flowgrpo_fast.precision.parts import RolloutPrecision
from flowgrpo_fast.rewards.scoring import Scorer, Scoring, collect
from flowgrpo_fast.sampling.walk import Sampler, walk
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.types import (
    Draws,
    Imposed,
    PromptRows,
    PromptSet,
    Scored,
    Scores,
    Trajectory,
    Transitions,
)


@dataclass(slots=True)
class Stage:
    """Policies, prompts and rewards, as the engine has set them up."""

    sampler: Sampler
    scout: Sampler  # the same policy where it only ranks seeds
    prompts: PromptSet
    conditioning: PromptRows  # of all prompts
    scorer: Scorer
    group_size: int  # finished samples a prompt
    num_steps: int  # of the schedule
    plan: Callable[[int], Plan]  # of a training step
    # An ODE walk of so many steps, for so many samples a prompt: (num_inference_steps, group_size).
    ode: Callable[[int, int], Plan]
    prompts_per_chunk: int = 0  # 0 = all at once
    # What a part keeps from step to step, by its own name.
    memory: dict[str, Any] = field(default_factory=dict)

    def score(self, samples: Trajectory) -> Scoring:
        """Begins to score finished samples; the host waits for no reward."""
        draws = samples.draws
        asked = self.prompts.rows(draws.prompt_index[draws.group_id])
        return self.scorer.start(samples.x0, asked, draws.group_id, samples.num_prompts)


@dataclass(slots=True)
class Gathered:
    """Samples of a training step, their rewards under way."""

    samples: Trajectory
    scorings: list[Scoring]
    scorer: Scorer
    # What is known once the rewards are: metrics of the part that gathered.
    measures: Callable[[Scores], dict[str, float]] = lambda scores: {}

    def scored(self) -> Scored:
        """Waits for the rewards."""
        scores = collect(self.scorings)
        owners = self.scorer.owners(scores)
        weights = {name: owner.weight for name, owner in zip(scores.objectives, owners, strict=True)}
        return Scored(self.samples, scores, weights)


class Walks(NamedTuple):
    """What an experience walks in a training step."""

    full: bool = True  # along the recipe's plan
    num_scouts: int = 0  # samples a prompt that only rank seeds, along the ODE
    scout_steps: int = 0


class Experience(Protocol):
    """A source of samples."""

    @property
    def requires(self) -> Requires:
        """What it needs."""
        ...

    @property
    def gives_transitions(self) -> bool:
        """Whether its samples come with stored transitions, where the plan keeps any."""
        ...

    @property
    def scout_precision(self) -> RolloutPrecision | None:
        """The precision of a copy of its own that only ranks; None where it has none."""
        ...

    @property
    def walks(self) -> Walks:
        """What it walks, for whoever counts before it does."""
        ...

    def check(self, num_steps: int, group_size: int, stages: tuple[int, ...], shares_start: bool) -> None:
        """Raises ValueError for what it cannot do with such walks."""
        ...

    def check_plan(self, plan: Plan) -> None:
        """Raises ValueError for a plan that it cannot collect samples by."""
        ...

    def num_drawn(self, num_candidates: int) -> int:
        """Seeds a prompt that a step begins with, for walks that begin with `num_candidates`."""
        ...

    def collect(self, stage: Stage, draws: Draws, step: int) -> Gathered:
        """Samples of training step `step` (from 0), rewards started."""
        ...

    def settle(self, stage: Stage, scored: Scored, step: int) -> None:
        """Sees what the samples were worth, after all have been scored."""
        ...


def in_chunks(
    stage: Stage, sampler: Sampler, plan: Plan, draws: Draws, imposed: Imposed | None = None
) -> tuple[Trajectory, list[Scoring]]:
    """Walks `stage.prompts_per_chunk` prompts at a time; rewards that run elsewhere start with their chunk.

    Groups stay whole, and forwards have the rows that they would have without chunks.
    """
    parts, scorings = [], []
    reads_rewards = any(cut.score == "reward" for _, cut in plan.cuts)
    for first, chunk in chunks(draws, stage.prompts_per_chunk):
        conditioning = stage.conditioning.rows(chunk.prompt_index[chunk.group_id])
        asked = stage.prompts.rows(chunk.prompt_index) if reads_rewards else None
        score = None if asked is None else stage.scorer.preview_score(asked)
        own = plan.of_prompts(first, len(chunk.prompt_index))
        group_size = len(chunk.group_id) // len(chunk.prompt_index)
        theirs = None if imposed is None else imposed.of_samples(first * group_size, len(chunk.group_id))
        parts.append(walk(sampler, own, conditioning, chunk, score, theirs))
        scorings.append(stage.score(parts[-1]))
    return joined(parts, plan), scorings


def chunks(draws: Draws, num_prompts: int) -> Iterator[tuple[int, Draws]]:
    """The first prompt of each chunk of `num_prompts`, 0 = all at once, and its draws, whose groups count from 0."""
    total = len(draws.prompt_index)
    if num_prompts in (0, total):
        yield 0, draws
        return
    for first in range(0, total, num_prompts):
        yield first, draws.of_prompts(first, num_prompts)


def joined(parts: list[Trajectory], plan: Plan) -> Trajectory:
    """Chunks of one plan as one trajectory."""
    if len(parts) == 1:
        return replace(parts[0], plan=plan)
    num_prompts, num_samples = parts[0].num_prompts, len(parts[0].x0)
    all_draws = [part.draws for part in parts]
    draws = Draws(
        prompt_index=torch.cat([d.prompt_index for d in all_draws]),
        group_id=torch.cat([d.group_id + i * num_prompts for i, d in enumerate(all_draws)]),
        seed=torch.cat([d.seed for d in all_draws]),
        start_seed=torch.cat([d.start_seed for d in all_draws]),
    )
    by_place = [{t.place: t for t in part.transitions} for part in parts]
    places = sorted({place for found in by_place for place in found})
    return replace(
        parts[0],
        plan=plan,
        draws=draws,
        x0=torch.cat([part.x0 for part in parts]),
        transitions=tuple(
            Transitions.joined([found.get(place) for found in by_place], num_prompts, num_samples)
            for place in places
        ),
        evaluations=sum(part.evaluations for part in parts),
    )
