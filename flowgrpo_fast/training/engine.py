"""The state of a run: the model, its optimiser, its prompts, and what scores it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flowgrpo_fast.models.adapters import has_adapter
from flowgrpo_fast.models.loading import load_model
from flowgrpo_fast.names import resolve
from flowgrpo_fast.precision import LowPrecisionModel, check_masters, check_training_precision
from flowgrpo_fast.recipe import NFT, Recipe, Scouts, Train
from flowgrpo_fast.rewards.workers import RewardWorkers
from flowgrpo_fast.sampling.graphs import Graphs
from flowgrpo_fast.sampling.prune import check_pool
from flowgrpo_fast.training.snapshots import Snapshot, Through, WithoutAdapter, trained_parameters
from flowgrpo_fast.types import FlowModel, PromptRows, RewardFunction


class Judge(Protocol):
    """An independent reader of the samples that training never sees."""

    def correct(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Which images `[B, C, H, W]` show what their prompt asks for, `[B]` bool."""
        ...


@dataclass(slots=True)
class Engine:
    """Everything a step reads or changes."""

    recipe: Recipe
    model: FlowModel
    prompts: tuple[str, ...]
    conditioning: PromptRows  # of all prompts, encoded once
    rewards: tuple[RewardFunction, ...]
    judge: Judge | None
    optimizer: torch.optim.Optimizer
    reference: FlowModel | None  # the start weights, where the loss has a KL
    averaged: Snapshot | None  # the moving average, where the recipe has one
    old: Snapshot | None  # the policy that samples, where the loss keeps it apart from the trained one
    device: torch.device
    step: int = 0  # finished training steps
    num_updates: int = 0  # finished optimiser steps
    low_precision: LowPrecisionModel | None = None  # what steps without a log-prob run
    scouts: LowPrecisionModel | None = None  # what scouts run; the same copy where the recipe says the same
    graphs: Graphs | None = None  # captured rollout steps
    workers: RewardWorkers | None = None  # where a reward runs elsewhere
    # The policy that samples, seen through each copy in low precision: one object each, as captured steps know it.
    _views: dict[FlowModel, FlowModel] = field(default_factory=dict)

    @property
    def seq_len(self) -> int | None:
        """Image tokens of a sample, where the model says so; a dynamic shift needs them."""
        return self.model.image_seq_len

    @property
    def sampled(self) -> FlowModel:
        """The policy that training samples come from."""
        return self.old or self.model

    @property
    def outside(self) -> FlowModel:
        """That policy at the steps without a log-prob."""
        return self._in_low_precision(self.low_precision)

    @property
    def scout(self) -> FlowModel:
        """That policy where it only ranks seeds."""
        return self._in_low_precision(self.scouts)

    def _in_low_precision(self, copy: LowPrecisionModel | None) -> FlowModel:
        if copy is None:
            return self.sampled
        if self.old is None:
            return copy.model
        return self._views.setdefault(copy.model, Through(self.old, copy.model))

    def close(self) -> None:
        """Ends what runs beside the run."""
        if self.workers is not None:
            self.workers.close()

    @property
    def evaluated(self) -> FlowModel:
        """The model that evaluation samples from and that the user takes home."""
        return self.averaged or self.model


def build_engine(recipe: Recipe, device: torch.device) -> Engine:
    """Loads model, prompts, rewards and judge as the recipe's task names them.

    Raises:
        ValueError: a name that does not resolve, an empty prompt file, or what the model cannot be.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # also for what asks for the current one: torch, rewards
    check_training_precision(recipe.precision, device)
    task = recipe.task
    lines = (
        _read_lines(task.prompts, "prompt") if task.prompts else []
    )  # before the weights, which take longer
    rewards = tuple(_function(term.function, "reward") for term in task.rewards)
    judge = _function(task.judge, "judge") if task.judge else None
    model = load_model(task.model, device, recipe.setup)
    prompts = tuple(lines or _own_prompts(model, task.model))
    check_pool(recipe.prune, model)
    check_masters(model.module)
    model.module.eval()  # no dropout: rollout and replay must agree to the bit
    with torch.no_grad():
        conditioning = model.prompt_rows(prompts, _source_images(task.images, prompts) if task.images else ())
    low_precision = recipe.rollout_precision.build(model)
    scouts, tried = None, recipe.explore.precision if isinstance(recipe.explore, Scouts) else None
    if tried is not None:
        scouts = low_precision if tried == recipe.rollout_precision else tried.build(model)
    optimizer = torch.optim.AdamW(
        trained_parameters(model.module),
        lr=recipe.optimizer.lr,
        betas=recipe.optimizer.betas,
        weight_decay=recipe.optimizer.weight_decay,
        fused=True,
    )
    return Engine(
        recipe=recipe,
        model=model,
        prompts=prompts,
        conditioning=conditioning,
        rewards=rewards,
        judge=judge() if judge else None,
        optimizer=optimizer,
        reference=_start_of(model, recipe.network.train) if recipe.loss.kl_beta > 0 else None,
        averaged=Snapshot(model) if recipe.optimizer.ema_decay > 0 else None,
        old=Snapshot(model) if isinstance(recipe.loss, NFT) else None,
        device=device,
        low_precision=low_precision,
        scouts=scouts,
        graphs=Graphs() if recipe.graphs else None,
        workers=RewardWorkers(task.reward_processes)
        if any(t.where != "here" for t in task.rewards)
        else None,
    )


def sync_weights(engine: Engine) -> None:
    """Brings copies in low precision up to the policy that samples, in place; all else shares its weights."""
    copies = [engine.low_precision, engine.scouts if engine.scouts is not engine.low_precision else None]
    with engine.old.swapped_in() if engine.old else nullcontext():
        for copy in copies:
            if copy is not None:
                copy.refresh()


def _start_of(model: FlowModel, train: Train) -> FlowModel:
    """The start weights: a fresh adapter's are the base alone."""
    # A model of the user's own may read no setup and train what it likes.
    fresh = has_adapter(model.module) and train.starts_from_base
    return WithoutAdapter(model) if fresh else Snapshot(model)


def _source_images(file: str, prompts: Sequence[str]) -> list[Path]:
    paths = [Path(file).parent / line for line in _read_lines(file, "image")]
    if len(paths) != len(prompts):
        raise ValueError(f"{file!r} names {len(paths)} images for {len(prompts)} prompts; give one for each")
    return paths


def _own_prompts(model: FlowModel, name: str) -> list[str]:
    own = model.own_prompts()
    if not own:
        raise ValueError(
            f"{name} brings no prompts of its own; set task.prompts to a text file, one prompt a line"
        )
    return own


def _function(path: str, what: str) -> Callable[..., Any]:
    found: Callable[..., Any] = resolve(path)
    if not callable(found):
        raise ValueError(f"{what} {path!r} is a {type(found).__name__}, which cannot be called")
    return found


def _read_lines(path: str, what: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ValueError(f"cannot read {what}s from {path!r}: {error.strerror}") from None
    kept = [line for line in lines if line]
    if not kept:
        raise ValueError(f"{path!r} holds no {what}; write one a line")
    return kept
