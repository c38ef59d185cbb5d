"""Latents -> images -> rewards, of which some may run elsewhere meanwhile."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from flowgrpo_fast.recipe import RewardTerm
from flowgrpo_fast.rewards.workers import require_tensor
from flowgrpo_fast.training.engine import Engine
from flowgrpo_fast.types import Draws, PreviewScore, RewardOutput, Trajectory


@dataclass(slots=True)
class Scoring:
    """The rewards of some samples, those that run elsewhere under way."""

    engine: Engine
    prompts: list[str]
    latents: Tensor | None  # until they are decoded
    images: Tensor | None
    elsewhere: dict[str, Future[Tensor]]

    def result(self) -> RewardOutput:
        """Every reward and their weighted sum; waits for what is under way.

        Raises:
            ValueError: a reward is no tensor, has the wrong shape, or is not finite.
        """
        engine, prompts = self.engine, self.prompts
        objectives: dict[str, Tensor] = {}
        total = torch.zeros(len(prompts), device=engine.device)
        for term, function in zip(engine.recipe.task.rewards, engine.rewards, strict=True):
            running = self.elsewhere.get(term.function)
            with torch.no_grad():  # as in a thread or a process: nothing of a reward network is kept
                values = function(self._decoded(), prompts) if running is None else running.result()
            _check(term, values, len(prompts))
            values = values.to(engine.device, torch.float32)
            objectives[term.function.rpartition(":")[2]] = values
            total = total + term.weight * values
        self.images = None  # of one chunk at a time
        return RewardOutput(total=total, objectives=objectives)

    def start(self) -> Scoring:
        """Decodes, and submits what runs elsewhere; the host waits for nothing."""
        workers, engine = self.engine.workers, self.engine
        if workers is None:
            return self
        for term, function in zip(engine.recipe.task.rewards, engine.rewards, strict=True):
            if term.where != "here":
                self.elsewhere[term.function] = workers.submit(term, function, self._decoded(), self.prompts)
        return self

    def _decoded(self) -> Tensor:
        if self.images is None:
            assert self.latents is not None
            with torch.no_grad():
                self.images = self.engine.model.decode(self.latents)
            self.latents = None
        return self.images


def _check(term: RewardTerm, values: Tensor, num_samples: int) -> None:
    require_tensor(term.function, values, num_samples)
    if values.shape != (num_samples,):
        raise ValueError(
            f"reward {term.function!r} returned shape {tuple(values.shape)} for {num_samples} images; "
            f"it must return {(num_samples,)}"
        )
    if not torch.isfinite(values).all():
        sample = int((~torch.isfinite(values)).nonzero()[0])
        raise ValueError(f"reward {term.function!r} of sample {sample} is {float(values[sample])}")


def start_scoring(engine: Engine, trajectory: Trajectory) -> Scoring:
    """Begins to score finished samples."""
    draws = trajectory.draws
    prompts = [engine.prompts[i] for i in draws.prompt_index[draws.group_id].tolist()]
    return Scoring(engine, prompts, trajectory.x0, None, {}).start()


def collect(scorings: list[Scoring]) -> RewardOutput:
    """The rewards of all chunks, in their order.

    Raises:
        ValueError: as `Scoring.result`; a sample counts from the start of its chunk.
    """
    parts = [scoring.result() for scoring in scorings]
    if len(parts) == 1:
        return parts[0]
    return RewardOutput(
        total=torch.cat([part.total for part in parts]),
        objectives={name: torch.cat([p.objectives[name] for p in parts]) for name in parts[0].objectives},
    )


def score(engine: Engine, trajectory: Trajectory) -> RewardOutput:
    """Decodes the samples and runs every reward.

    Raises:
        ValueError: a reward is no tensor, has the wrong shape, or is not finite.
    """
    return start_scoring(engine, trajectory).result()


def preview_score(engine: Engine, draws: Draws) -> PreviewScore:
    """Scores x0 predictions by the run's own rewards, weighted as in training."""
    prompts = [engine.prompts[i] for i in draws.prompt_index.tolist()]

    def total(x0_pred: Tensor) -> Tensor:
        group_size = len(x0_pred) // len(prompts)
        names = [p for p in prompts for _ in range(group_size)]
        return Scoring(engine, names, x0_pred, None, {}).start().result().total

    return total


def score_images(engine: Engine, images: Tensor, prompts: list[str]) -> RewardOutput:
    """Every reward of some images, and their weighted sum."""
    return Scoring(engine, prompts, None, images, {}).start().result()
