"""The loop. Nothing else decides the order of a training step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from flowgrpo_fast.credit.chain import assign
from flowgrpo_fast.data.draws import draw
from flowgrpo_fast.objectives.snapshots import Moment
from flowgrpo_fast.training.engine import Engine
from flowgrpo_fast.training.self_test import ratio_self_test
from flowgrpo_fast.training.update import update
from flowgrpo_fast.types import Batch, Choices, Scored

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
    """Rollout, rewards, credit, update: one iteration of the recipe."""
    recipe, stage, report = engine.recipe, engine.stage, StepReport(step=engine.step + 1)
    with report.phase("rollout"):
        draws = draw(
            recipe.data.draw(engine.step, recipe.seed, recipe.num_prompts, len(engine.prompts)),
            step=engine.step,
            seed=recipe.seed,
            num_drawn=recipe.num_drawn,
            share_start=recipe.topology.shares_start,
            device=engine.device,
        )
        gathered = recipe.experience.collect(stage, draws, engine.step)
    with report.phase("reward"):
        scored = gathered.scored()
        report.metrics |= reward_metrics(scored) | gathered.measures(scored.scores)
    with report.phase("credit"):
        batch = make_batch(engine, scored)
        report.metrics["idle_groups"] = batch.idle_share
    if engine.step == 0 and recipe.objective.requires.log_probs:
        with report.phase("self_test"):
            report.metrics["ratio_self_test"] = ratio_self_test(
                engine.learner, batch, recipe.machine.max_ratio_error
            )
    with report.phase("update"):
        for learner in engine.learners:
            report.metrics |= update(learner, batch)
            # From here to the step's end its state is between two steps, also where all groups were idle and no
            # weight has moved: a snapshot that follows steps may have.
            engine.updates_then = -1
            moment = Moment(engine.step + 1, learner.num_updates, True, report.metrics)
            learner.follow(moment)
        # What the experience keeps changes after the weights do: until then a failed step leaves the last one's state.
        recipe.experience.settle(stage, scored, engine.step)
        engine.refresh()  # copies in low precision, in place: captured graphs stay valid
    if batch.samples.plan.kept:
        report.metrics["window_start"] = float(batch.samples.plan.steps[batch.samples.plan.kept[0]].step)
    engine.step, engine.updates_then = engine.step + 1, engine.learner.num_updates
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


def make_batch(engine: Engine, scored: Scored) -> Batch:
    """Joins samples with their credit; which of them carry weight is read here, once, for the host to know."""
    draws, credit = scored.samples.draws, assign(engine.recipe.credit, scored)
    weight = credit.weight if credit.weight.ndim == 1 else credit.weight.amax(1)
    none = credit.advantages == 0
    none = none.flatten(1).all(1) if none.ndim > 1 else none
    idle = torch.zeros_like(none) if credit.idle is None else credit.idle
    counted, zero, idle = torch.stack([weight > 0, none, idle]).cpu().numpy()
    silent = engine.recipe.objective.requires.silent_at_zero
    num_samples = len(draws.group_id)
    return Batch(
        samples=scored.samples,
        conditioning=engine.stage.conditioning.rows(draws.prompt_index[draws.group_id]),
        credit=credit,
        live=counted & ~zero if silent else counted,
        choices=Choices(engine.recipe.seed, engine.step, slice(0, num_samples), num_samples),
        prompts=engine.prompts.rows(draws.prompt_index[draws.group_id]),
        counted=counted,
        idle=idle,
        refills=credit.refills,
    )


def reward_metrics(scored: Scored) -> dict[str, float]:
    """Mean total and per-objective rewards, and the mean spread within a group, of the samples that have a score."""
    scores, num_groups = scored.scores, scored.samples.num_prompts
    groups = scores.total.view(num_groups, -1)
    if scores.valid is None:
        spread = groups.std(1, correction=0)
    else:
        here = scores.valid.view(num_groups, -1)
        num = here.sum(1, keepdim=True).clamp(min=1)
        centred = (groups - groups.where(here, 0.0).sum(1, keepdim=True) / num).where(here, 0.0)
        spread = (centred.square().sum(1) / num[:, 0]).sqrt()
    values = {"reward": scores.mean(scores.total), "reward_group_std": spread.mean()}
    values |= {f"reward/{name}": scores.mean(reward) for name, reward in scores.objectives.items()}
    if scores.valid is not None:
        values["unscored"] = 1 - scores.valid.float().mean()
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
