"""The stages of a training step one by one, for tests that look between them."""

from __future__ import annotations

import torch
from torch import Tensor

from flowgrpo_fast.data.draws import draw
from flowgrpo_fast.experience.experience import in_chunks
from flowgrpo_fast.objectives.objective import Stats
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.training import update
from flowgrpo_fast.training.engine import Engine
from flowgrpo_fast.training.learner import Counts, networks
from flowgrpo_fast.training.loop import make_batch
from flowgrpo_fast.types import Batch, Draws, Trajectory

CPU = torch.device("cpu")


def drawn(recipe: Recipe, step: int = 0, set_size: int = 2) -> Draws:
    """What a training step begins with, as the loop draws it."""
    return draw(
        recipe.data.draw(step, recipe.seed, recipe.num_prompts, set_size),
        step=step,
        seed=recipe.seed,
        num_drawn=recipe.num_drawn,
        share_start=recipe.topology.shares_start,
        device=CPU,
    )


def sampled(
    engine: Engine, draws: Draws | None = None, step: int = 0, plan: Plan | None = None
) -> Trajectory:
    """The walks of some draws, without experience and rewards."""
    draws = drawn(engine.recipe, step, len(engine.prompts)) if draws is None else draws
    plan = engine.recipe.plan(step, engine.seq_len) if plan is None else plan
    return in_chunks(engine.stage, engine.stage.sampler, plan, draws)[0]


def gathered(engine: Engine) -> Batch:
    """What the next update would learn from."""
    draws = drawn(engine.recipe, engine.step, len(engine.prompts))
    scored = engine.recipe.experience.collect(engine.stage, draws, engine.step).scored()
    engine.recipe.experience.settle(engine.stage, scored, engine.step)
    return make_batch(engine, scored)


def measured(engine: Engine, batch: Batch) -> list[Stats]:
    """What the objective measures at every micro-batch of the whole batch, without gradient."""
    learner = engine.learner
    evaluator = networks(learner, batch, Counts())
    with torch.no_grad():
        return [
            update.measured(learner, point, evaluator)
            for _, point in update.micro_batches(learner, batch, learner.objective.points(batch))
        ]


def weights(model_or_engine: object) -> Tensor:
    """All parameters of a model, an engine's or a view's as one vector, copied."""
    model = (
        getattr(model_or_engine, "model", model_or_engine)
        if isinstance(model_or_engine, Engine)
        else model_or_engine
    )
    return torch.cat([p.detach().flatten().clone() for p in model.module.parameters()])  # type: ignore[attr-defined]


def snapshot_weights(engine: Engine, name: str) -> Tensor:
    """The trained values that a snapshot holds, as one vector, copied."""
    return torch.cat([value.flatten().clone() for value in engine.learner.snapshots[name].values])  # type: ignore[attr-defined]
