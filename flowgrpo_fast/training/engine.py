"""The state of a run: the model, its optimiser, its prompts, and what scores it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from flowgrpo_fast.data.prompts import Prompts
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
from flowgrpo_fast.rewards.scoring import Scorer
from flowgrpo_fast.sampling.graphs import Graphs
from flowgrpo_fast.sampling.prune import check_pool
from flowgrpo_fast.training.snapshots import Snapshot, Through, WithoutAdapter, trained_parameters
from flowgrpo_fast.types import Conditioning, FlowModel, PromptSet

if TYPE_CHECKING:  # the file of judges imports scikit-learn, for a judge of its own that few runs ask
    from flowgrpo_fast.rewards.judges import Judge


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
    prompt_set: PromptSet
    conditioning: PromptRows  # of all prompts, encoded once
    scorer: Scorer
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
        self.scorer.close()

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
    source = Prompts(path=task.prompts, images=task.images)
    prompt_set = source.load(() if task.prompts else _own_prompts(task.model))
    for term in task.rewards:  # before the model, which takes longer
        term.resolve()
    judge = _judge(task.judge) if task.judge else None
    model = load_model(recipe, device)
    check_pool(recipe.prune, model)
    check_masters(model.module)
    model.module.eval()  # no dropout: rollout and replay must agree to the bit
    with torch.no_grad():
        conditioning = _encode(model, prompt_set)
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
        prompt_set=prompt_set,
        conditioning=conditioning,
        scorer=Scorer(task.rewards, model.decode, device, task.reward_processes),
        judge=judge() if judge else None,
        optimizer=optimizer,
        reference=_start_of(model, recipe) if recipe.loss.kl_beta > 0 else None,
        averaged=Snapshot(model) if recipe.optimizer.ema_decay > 0 else None,
        old=Snapshot(model) if isinstance(recipe.loss, NFT) else None,
        device=device,
        low_precision=low_precision,
        scouts=scouts,
        graphs=Graphs() if recipe.graphs else None,
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


def _encode(model: FlowModel, prompt_set: PromptSet) -> PromptRows:
    """All prompts' conditioning: in memory, or on disk where the model keeps it there."""
    if prompt_set.images and "images" not in inspect.signature(model.encode).parameters:
        raise ValueError(
            f"the prompts come with source images, such as {str(prompt_set.images[0])!r}; "
            "this model takes prompts alone"
        )
    arguments: dict[str, Any] = {"images": list(prompt_set.images)} if prompt_set.images else {}
    on_disk: Callable[..., PromptRows | None] | None = getattr(model, "on_disk", None)
    stored = on_disk(list(prompt_set.prompts), **arguments) if on_disk else None
    return stored or model.encode(list(prompt_set.prompts), **arguments)


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


def _judge(path: str) -> Callable[[], Judge]:
    found: Callable[[], Judge] = resolve(path)
    if not callable(found):
        raise ValueError(f"judge {path!r} is a {type(found).__name__}, which cannot be called")
    return found
