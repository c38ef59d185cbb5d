"""Latents -> images -> rewards."""

from __future__ import annotations

import torch
from torch import Tensor

from flowgrpo_fast.training.engine import Engine
from flowgrpo_fast.types import Draws, PreviewScore, RewardOutput, Trajectory


def score(engine: Engine, trajectory: Trajectory) -> RewardOutput:
    """Decodes the samples and runs every reward.

    Raises:
        ValueError: a reward has the wrong shape, or is not finite.
    """
    draws = trajectory.draws
    prompts = [engine.prompts[i] for i in draws.prompt_index[draws.group_id].tolist()]
    return score_latents(engine, trajectory.x0, prompts)


def score_latents(engine: Engine, latents: Tensor, prompts: list[str]) -> RewardOutput:
    """The rewards of what latents decode to."""
    with torch.no_grad():
        images = engine.model.decode(latents)
    return score_images(engine, images, prompts)


def preview_score(engine: Engine, draws: Draws) -> PreviewScore:
    """Scores x0 predictions by the run's own rewards, weighted as in training."""
    prompts = [engine.prompts[i] for i in draws.prompt_index.tolist()]

    def total(x0_pred: Tensor) -> Tensor:
        group_size = len(x0_pred) // len(prompts)
        return score_latents(engine, x0_pred, [p for p in prompts for _ in range(group_size)]).total

    return total


def score_images(engine: Engine, images: Tensor, prompts: list[str]) -> RewardOutput:
    """Every reward of some images, and their weighted sum."""
    objectives: dict[str, Tensor] = {}
    total = torch.zeros(len(prompts), device=engine.device)
    for term, function in zip(engine.recipe.task.rewards, engine.rewards, strict=True):
        values = function(images, prompts)
        if values.shape != total.shape:
            raise ValueError(
                f"reward {term.function!r} returned shape {tuple(values.shape)} for {len(prompts)} images; "
                f"it must return {tuple(total.shape)}"
            )
        if not torch.isfinite(values).all():
            sample = int((~torch.isfinite(values)).nonzero()[0])
            raise ValueError(f"reward {term.function!r} of sample {sample} is {float(values[sample])}")
        values = values.to(engine.device, torch.float32)
        objectives[term.function.rpartition(":")[2]] = values
        total = total + term.weight * values
    return RewardOutput(total=total, objectives=objectives)
