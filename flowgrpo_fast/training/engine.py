"""The state of a run: the model, its optimiser, its prompts, and what scores it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flowgrpo_fast.models.adapters import has_adapter
from flowgrpo_fast.names import resolve
from flowgrpo_fast.precision import (
    LowPrecisionModel,
    build_low_precision,
    check_masters,
    check_recipe,
    check_training_precision,
)
from flowgrpo_fast.recipe import NFT, LoRA, LowPrecision, Recipe, Scouts
from flowgrpo_fast.rewards.workers import RewardWorkers
from flowgrpo_fast.sampling.graphs import Graphs
from flowgrpo_fast.sampling.prune import check_pool
from flowgrpo_fast.training.snapshots import Snapshot, Through, WithoutAdapter, trained_parameters
from flowgrpo_fast.types import Conditioning, FlowModel, RewardFunction


class Judge(Protocol):
    """An independent reader of the samples that training never sees."""

    def correct(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Which images `[B, C, H, W]` show what their prompt asks for, `[B]` bool."""
        ...


class PromptRows(Protocol):
    """Conditioning of a set of prompts: a `Conditioning`, or what reads one from disk."""

    def rows(self, index: Tensor) -> Conditioning:
        """Rows `index [B]` (int64), on the index's device."""
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
    _views: dict[int, FlowModel] = field(default_factory=dict)  # one each: captured steps know a model by it

    @property
    def seq_len(self) -> int | None:
        """Image tokens of a sample, where the model says so; a dynamic shift needs them."""
        return getattr(self.model, "image_seq_len", None)

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
        return self._views.setdefault(id(copy), Through(self.old, copy.model))

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
    check_recipe(recipe)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # also for what asks for the current one: torch, rewards
    check_training_precision(recipe, device)
    task, part = recipe.task, recipe.rollout_precision
    prompts = tuple(_read_lines(task.prompts, "prompt") if task.prompts else _own_prompts(task.model))
    rewards = tuple(_function(term.function, "reward") for term in task.rewards)
    judge = _function(task.judge, "judge") if task.judge else None
    model = load_model(recipe, device)
    check_pool(recipe.prune, model)
    check_masters(model.module)
    model.module.eval()  # no dropout: rollout and replay must agree to the bit
    with torch.no_grad():
        conditioning = _encode(model, prompts, task.images)
    low_precision = build_low_precision(model, part) if isinstance(part, LowPrecision) else None
    scouts, tried = None, recipe.explore.precision if isinstance(recipe.explore, Scouts) else None
    if isinstance(tried, LowPrecision):
        scouts = low_precision if tried == part else build_low_precision(model, tried)
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
        reference=_start_of(model, recipe) if recipe.loss.kl_beta > 0 else None,
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


def load_model(recipe: Recipe, device: torch.device) -> FlowModel:
    """The model of `recipe.task.model`.

    `sd3` is `flowgrpo_fast.models.sd3:load`; `package.module:function` is taken as it stands. A loader takes the
    device, and the recipe where it reads one.
    """
    loader = _model_part(recipe.task.model, "load")
    model: FlowModel = loader(*(device, recipe)[: len(inspect.signature(loader).parameters)])
    return model


def _start_of(model: FlowModel, recipe: Recipe) -> FlowModel:
    """The start weights: a fresh adapter's are the base alone."""
    train = recipe.network.train
    fresh = has_adapter(model.module) and isinstance(train, LoRA) and not train.path
    return WithoutAdapter(model) if fresh else Snapshot(model)


def _encode(model: FlowModel, prompts: tuple[str, ...], images: str) -> PromptRows:
    """All prompts' conditioning: in memory, or on disk where the model keeps it there."""
    arguments: dict[str, Any] = {"images": _source_images(model, prompts, images)} if images else {}
    on_disk: Callable[..., PromptRows | None] | None = getattr(model, "on_disk", None)
    stored = on_disk(list(prompts), **arguments) if on_disk else None
    return stored or model.encode(list(prompts), **arguments)


def _source_images(model: FlowModel, prompts: tuple[str, ...], images: str) -> list[Path]:
    if "images" not in inspect.signature(model.encode).parameters:
        raise ValueError(f"task.images is {images!r}; this model takes prompts alone")
    paths = [Path(images).parent / line for line in _read_lines(images, "image")]
    if len(paths) != len(prompts):
        raise ValueError(
            f"{images!r} names {len(paths)} images for {len(prompts)} prompts; give one for each"
        )
    return paths


def _own_prompts(name: str) -> list[str]:
    try:
        own = _model_part(name, "prompts")
    except ValueError as error:
        if "has no 'prompts'" not in str(error):
            raise
        raise ValueError(
            f"{name} brings no prompts of its own; set task.prompts to a text file, one prompt a line"
        ) from None
    prompts: list[str] = own()
    return prompts


def _model_part(name: str, part: str) -> Callable[..., Any]:
    if ":" in name:
        module, _, function = name.partition(":")
        return resolve(f"{module}:{function if part == 'load' else part}")
    return resolve(f"flowgrpo_fast.models.{name}:{part}")


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
