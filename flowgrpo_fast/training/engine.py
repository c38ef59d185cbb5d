"""The state of a run: the model, its optimiser, its prompts, and what scores it."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flowgrpo_fast.recipe import NFT, Recipe
from flowgrpo_fast.types import Conditioning, FlowModel, RewardFunction


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
    conditioning: Conditioning  # of all prompts, encoded once
    rewards: tuple[RewardFunction, ...]
    judge: Judge | None
    optimizer: torch.optim.Optimizer
    reference: FlowModel | None  # the start weights, where the loss has a KL
    averaged: FlowModel | None  # the moving average, where the recipe has one
    old: FlowModel | None  # the policy that samples, where the loss keeps it apart from the trained one
    device: torch.device
    step: int = 0  # finished training steps
    num_updates: int = 0  # finished optimiser steps

    @property
    def seq_len(self) -> int | None:
        """Image tokens of a sample, where the model says so; a dynamic shift needs them."""
        return getattr(self.model, "image_seq_len", None)

    @property
    def sampled(self) -> FlowModel:
        """The model that training samples come from."""
        return self.old or self.model

    @property
    def evaluated(self) -> FlowModel:
        """The model that evaluation samples from and that the user takes home."""
        return self.averaged or self.model


def build_engine(recipe: Recipe, device: torch.device) -> Engine:
    """Loads model, prompts, rewards and judge as the recipe's task names them.

    Raises:
        ValueError: a name that does not resolve, or an empty prompt file.
    """
    task = recipe.task
    model = load_model(task.model, device)
    prompts = tuple(_read_prompts(task.prompts) if task.prompts else _own_prompts(task.model))
    model.module.eval()  # no dropout: rollout and replay must agree to the bit
    with torch.no_grad():
        conditioning = model.encode(list(prompts))
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
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
        rewards=tuple(resolve(term.function) for term in task.rewards),
        judge=resolve(task.judge)() if task.judge else None,
        optimizer=optimizer,
        reference=_frozen_copy(model) if recipe.loss.kl_beta > 0 else None,
        averaged=_frozen_copy(model) if recipe.optimizer.ema_decay > 0 else None,
        old=_frozen_copy(model) if isinstance(recipe.loss, NFT) else None,
        device=device,
    )


def load_model(name: str, device: torch.device) -> FlowModel:
    """`digits` is `flowgrpo_fast.models.digits:load`; `package.module:function` is taken as it stands."""
    model: FlowModel = _model_part(name, "load")(device)
    return model


def _own_prompts(name: str) -> list[str]:
    prompts: list[str] = _model_part(name, "prompts")()
    return prompts


def _model_part(name: str, part: str) -> Callable[..., Any]:
    if ":" in name:
        module, _, function = name.partition(":")
        return resolve(f"{module}:{function if part == 'load' else part}")
    return resolve(f"flowgrpo_fast.models.{name}:{part}")


def resolve(path: str) -> Any:
    """The object at `package.module:name`.

    Raises:
        ValueError: not such a path, no such module, or no such name in it.
    """
    module_name, separator, name = path.partition(":")
    if not separator:
        raise ValueError(f"{path!r} is not package.module:name")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something it needs is not
        raise ValueError(f"{path!r}: there is no module {error.name!r}") from None
    try:
        return getattr(module, name)
    except AttributeError:
        raise ValueError(f"{path!r}: module {module_name} has no {name!r}") from None


def _read_prompts(path: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ValueError(f"cannot read prompts from {path!r}: {error.strerror}") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"{path!r} holds no prompt; write one a line")
    return prompts


def _frozen_copy(model: FlowModel) -> FlowModel:
    twin = copy.deepcopy(model)
    twin.module.requires_grad_(False)
    return twin
