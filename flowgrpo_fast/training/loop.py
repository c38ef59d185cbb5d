"""The loop. Nothing else decides the order of a training step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowgrpo_fast.credit.advantages import assign_credit
from flowgrpo_fast.data.draws import draw_eval, draw_step_positions
from flowgrpo_fast.recipe import NFT, ClippedRatio
from flowgrpo_fast.rewards.scoring import collect, require_all
from flowgrpo_fast.sampling.sampler import rollout
from flowgrpo_fast.sampling.schedule import Schedule, ode_schedule, resolve_schedule
from flowgrpo_fast.training.engine import Engine, sync_weights
from flowgrpo_fast.training.explore import explore, scout_metrics
from flowgrpo_fast.training.sample import draw, sample_and_score, start_scoring
from flowgrpo_fast.training.self_test import ratio_self_test
from flowgrpo_fast.training.update import update
from flowgrpo_fast.types import Draws, Scores, TrainBatch, Trajectory

_MAX_IDLE_STEPS = 20  # consecutive steps in which no group teaches anything


@dataclass(slots=True)
class StepReport:
    """What one step measured."""

    step: int  # number of finished steps
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # by phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `seconds[name]`; each phase ends by reading numbers from the device."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def train_step(engine: Engine) -> StepReport:
    """Scouts, rollout, rewards, credit, update: one iteration of the recipe."""
    recipe, report = engine.recipe, StepReport(step=engine.step + 1)
    with report.phase("explore"):
        drawn = draw(recipe, len(engine.prompt_set), engine.step, engine.device)
        explored = explore(engine, drawn)
    with report.phase("rollout"):
        schedule = resolve_schedule(recipe, engine.step, engine.seq_len)
        if explored.finished is not None:
            trajectory, scorings = explored.finished, [start_scoring(engine, explored.finished)]
        else:
            trajectory, scorings = sample_and_score(engine, explored.draws, schedule)
    with report.phase("reward"):
        rewards = require_all(collect(scorings))
        report.metrics |= reward_metrics(rewards, trajectory.draws) | scout_metrics(explored, rewards.total)
    with report.phase("credit"):
        batch = make_batch(engine, trajectory, rewards, schedule)
        report.metrics["idle_groups"] = 1 - sum(batch.live) / len(batch.live)
    if engine.step == 0 and isinstance(recipe.loss, ClippedRatio):
        with report.phase("self_test"):
            report.metrics["ratio_self_test"] = ratio_self_test(engine, batch)
    with report.phase("update"):
        report.metrics |= update(engine, batch)
        sync_weights(engine)
    report.metrics["network_evaluations"] += explored.evaluations
    if schedule.kept:
        report.metrics["window_start"] = float(schedule.kept[0])
    engine.step += 1
    return report


def train(engine: Engine, on_step: Callable[[StepReport], None], stop: Callable[[], bool]) -> None:
    """Steps until the recipe's number is reached or `stop()` holds; `on_step` sees each report.

    Raises:
        ValueError: rewards have no variance within any group, at the first step or for many in a row.
    """
    idle = 0
    while engine.step < engine.recipe.num_steps and not stop():
        report = train_step(engine)
        on_step(report)
        idle = idle + 1 if report.metrics["idle_groups"] == 1 else 0
        if idle and (engine.step == 1 or idle >= _MAX_IDLE_STEPS):
            raise ValueError(
                f"every group's rewards have had zero variance for {idle} step(s); the mean reward is "
                f"{report.metrics['reward']:.6g}: check the reward functions, or raise noise_level"
            )


def make_batch(
    engine: Engine,
    trajectory: Trajectory,
    rewards: Scores,
    schedule: Schedule,
) -> TrainBatch:
    """Joins a trajectory with its credit and with the steps each sample trains on."""
    recipe = engine.recipe
    draws = trajectory.draws
    advantages, weight = assign_credit(
        rewards, draws.group_id, recipe.credit, engine.scorer.owners(rewards), len(draws.prompt_index)
    )
    num_steps, num_trained = len(schedule.kept), schedule.num_trained
    if isinstance(recipe.loss, NFT):
        num_steps = len(trajectory.sigmas) - 1  # the rollout's own
        num_trained = max(1, int(recipe.loss.fraction * num_steps))
    position = draw_step_positions(
        step=engine.step,
        seed=recipe.seed,
        num_rows=recipe.num_prompts * recipe.group_size,
        num_kept=num_steps,
        num_trained=num_trained,
    )
    return TrainBatch(
        trajectory=trajectory,
        conditioning=engine.conditioning.rows(draws.prompt_index[draws.group_id]),
        advantages=advantages,
        weight=weight,
        step_position=position.to(engine.device),
        live=tuple(value > 0 for value in weight.tolist()),
    )


def reward_metrics(rewards: Scores, draws: Draws) -> dict[str, float]:
    """Mean total and per-objective rewards, and the mean spread within a group."""
    groups = rewards.total.view(len(draws.prompt_index), -1)
    values = {"reward": rewards.total.mean(), "reward_group_std": groups.std(1, correction=0).mean()}
    values |= {f"reward/{name}": reward.mean() for name, reward in rewards.objectives.items()}
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def diversity(images: Tensor, prompt_index: Tensor) -> float:
    """Standard deviation over the samples of one prompt, averaged over pixels and prompts.

    `images [N, C, H, W]`, `prompt_index [N]`. Prompts with one sample are left out; 0 if all have one.
    """
    spreads = [
        images[prompt_index == prompt].std(0, correction=0).mean()
        for prompt, count in zip(*prompt_index.unique(return_counts=True), strict=True)
        if count > 1
    ]
    return float(torch.stack(spreads).mean()) if spreads else 0.0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A deterministic look at the model: always the same prompts and start noise."""

    images: Tensor  # [N, C, H, W]
    prompts: list[str]
    correct: Tensor | None  # [N] bool, the judge's reading
    metrics: dict[str, float]


def evaluate(engine: Engine) -> Evaluation:
    """Samples with the Euler ODE and lets the rewards and the judge read the result."""
    recipe = engine.recipe
    draws = draw_eval(len(engine.prompt_set), recipe.task.num_eval_samples, engine.device)
    conditioning = engine.conditioning.rows(draws.prompt_index)
    schedule = ode_schedule(recipe.sigmas, engine.seq_len)
    trajectory = rollout(engine.evaluated, conditioning, draws, schedule, recipe)
    with torch.no_grad():
        images = engine.model.decode(trajectory.x0)
    asked = engine.prompt_set.rows(draws.prompt_index)
    prompts = list(asked.prompts)
    # A group is all samples of one prompt here too, though they are no neighbours.
    rewards = engine.scorer.score(images, asked, draws.prompt_index, len(engine.prompt_set), trajectory.x0)
    metrics = {"eval/reward": float(rewards.total.mean())}
    metrics |= {f"eval/{name}": float(value.mean()) for name, value in rewards.objectives.items()}
    metrics["eval/diversity"] = diversity(images, draws.prompt_index)
    correct = None if engine.judge is None else engine.judge.correct(images, prompts)
    if correct is not None:
        metrics["eval/judge"] = float(correct.float().mean())
    return Evaluation(images=images, prompts=prompts, correct=correct, metrics=metrics)
