"""A deterministic look at the model: always the same prompts and start noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowgrpo_fast.data.draws import draw_eval
from flowgrpo_fast.sampling.step import Forwards
from flowgrpo_fast.sampling.walk import Sampler, walk
from flowgrpo_fast.training.engine import Engine
from flowgrpo_fast.types import Draws, PromptSet


@dataclass(frozen=True, slots=True)
class Look:
    """What a look showed."""

    images: Tensor  # [N, C, H, W], or videos [N, F, C, H, W], fp32 in [0, 1]
    prompts: list[str]
    rewards: Tensor  # [N] the weighted sum
    correct: Tensor | None  # [N] bool, the judge's reading
    metrics: dict[str, float]


def evaluate(engine: Engine) -> Look:
    """Samples with the Euler ODE and lets the rewards and the judge read the result."""
    exam = engine.exam
    draws = draw_eval(len(exam.prompts), engine.recipe.task.num_eval_samples, engine.device)
    x0 = _walked(engine, draws)
    images = exam.model.decode(x0)
    # All samples of a prompt are one group, whichever place they have in the batch.
    asked = exam.prompts.rows(draws.prompt_index)
    scores = exam.scorer.score(images, asked, draws.prompt_index, len(exam.prompts), x0)
    prompts = list(asked.prompts)
    metrics = {"eval/reward": float(scores.mean(scores.total))}
    metrics |= {f"eval/{name}": float(scores.mean(value)) for name, value in scores.objectives.items()}
    metrics["eval/diversity"] = diversity(images, draws.prompt_index)
    correct = None if engine.judge is None else engine.judge.correct(images, prompts)
    if correct is not None:
        metrics["eval/judge"] = float(correct.float().mean())
    return Look(images, prompts, scores.total, correct, metrics)


def sampled(
    engine: Engine, prompts: PromptSet | None, num_samples: int, seed: int | None = None
) -> tuple[Tensor, list[str]]:
    """Images `[N, C, H, W]` or videos, as an evaluation makes them, and their prompts; asks no reward and no judge.

    Args:
        prompts: in place of the evaluation's.
        num_samples: in all; prompts take turns.
        seed: of the start noise; None = the evaluation's.
    """
    exam = engine.exam
    if prompts is not None:
        with torch.no_grad():
            rows = exam.model.prompt_rows(list(prompts.prompts), list(prompts.images))
        engine = replace(engine, exam=replace(exam, prompts=prompts, conditioning=rows))
    asked = engine.exam.prompts
    draws = draw_eval(len(asked), num_samples, engine.device, seed)
    images = exam.model.decode(_walked(engine, draws))
    return images, list(asked.rows(draws.prompt_index).prompts)


def _walked(engine: Engine, draws: Draws) -> Tensor:
    """Finished latents `[N, *S]`."""
    exam = engine.exam
    sampler = Sampler(policy=engine.evaluated, forwards=Forwards(rows=engine.recipe.rollout_rows))
    return walk(sampler, exam.plan, exam.conditioning.rows(draws.prompt_index), draws).x0


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
