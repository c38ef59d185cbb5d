"""A deterministic look at the model: always the same prompts and start noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowgrpo_fast.data.draws import draw_eval
from flowgrpo_fast.sampling.step import Forwards
from flowgrpo_fast.sampling.walk import Sampler, walk
from flowgrpo_fast.schedule.topology import ode_plan
from flowgrpo_fast.training.engine import Engine


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a look showed."""

    images: Tensor  # [N, C, H, W]
    prompts: list[str]
    correct: Tensor | None  # [N] bool, the judge's reading
    metrics: dict[str, float]


def evaluate(engine: Engine) -> Evaluation:
    """Samples with the Euler ODE and lets the rewards and the judge read the result."""
    recipe, scorer = engine.recipe, engine.stage.scorer
    draws = draw_eval(len(engine.prompts.prompts), recipe.task.num_eval_samples, engine.device)
    sampler = Sampler(policy=engine.evaluated, forwards=Forwards(rows=recipe.rollout_rows))
    trajectory = walk(
        sampler,
        ode_plan(recipe.sigmas.grid(engine.seq_len)),
        engine.stage.conditioning.rows(draws.prompt_index),
        draws,
    )
    images = engine.model.decode(trajectory.x0)
    # All samples of a prompt are one group, whichever place they have in the batch.
    asked = engine.prompts.rows(draws.prompt_index)
    scores = scorer.score(images, asked, draws.prompt_index, len(engine.prompts), trajectory.x0)
    prompts = list(asked.prompts)
    metrics = {"eval/reward": float(scores.mean(scores.total))}
    metrics |= {f"eval/{name}": float(scores.mean(value)) for name, value in scores.objectives.items()}
    metrics["eval/diversity"] = diversity(images, draws.prompt_index)
    correct = None if engine.judge is None else engine.judge.correct(images, prompts)
    if correct is not None:
        metrics["eval/judge"] = float(correct.float().mean())
    return Evaluation(images=images, prompts=prompts, correct=correct, metrics=metrics)


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
