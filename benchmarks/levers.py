"""One training step of a transformer, lever by lever: each row is the one above it with one thing changed.

The first row is the loop that trainers write on Flow-GRPO's recipe; the second does the same work in this engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from benchmarks.lever_report import (
    COMPILED,
    EQUAL,
    FAST,
    FLASH,
    LOW,
    NO_KL,
    PRUNED,
    SHARED,
    TRAINER,
    TRAINER_FAST,
    WINDOW,
)
from benchmarks.trainer_loop import Trainer
from flowgrpo_fast.recipe import (
    ClippedRatio,
    FrozenWindow,
    LoRA,
    LowPrecision,
    Network,
    Prune,
    Recipe,
    RewardTerm,
    Task,
)
from flowgrpo_fast.recipes import flow_grpo, mix_grpo_flash
from flowgrpo_fast.training.engine import Engine, build_engine
from flowgrpo_fast.training.loop import StepReport, train_step

# What a group has in common is computed once: the recipe's switch, where the engine has one.
SHARING = next((f.name for f in fields(Recipe) if f.name == "share_prefix"), "")


@dataclass(frozen=True)
class Lever:
    """One row."""

    name: str
    recipe: Recipe
    trainer: bool = False  # the loop trainers write

    @property
    def images(self) -> int:
        """Samples a step starts from."""
        return self.recipe.num_prompts * self.recipe.num_candidates

    def engine(self, device: torch.device) -> Engine:
        """A model, an optimiser and prompts of its own."""
        return build_engine(self.recipe, device)

    def step(self, engine: Engine) -> Callable[[], StepReport]:
        """One training step."""
        return Trainer(engine).step if self.trainer else lambda: train_step(engine)


def base(network: str, group_size: int, num_prompts: int, precision: str = "bf16") -> Recipe:
    """Flow-GRPO's recipe on a network of `benchmarks.networks`: ten steps, nine of them trained, guidance 4.5, KL.

    A forward takes a group, in both loops; one optimiser step, no moving average. The self-test's bound is open: what
    it finds is a column.
    """
    recipe = flow_grpo()
    return replace(
        recipe,
        **({SHARING: False} if SHARING else {}),  # a row of its own
        group_size=group_size,
        num_prompts=num_prompts,
        rows_per_forward=group_size,
        credit=replace(recipe.credit, drop_zero_variance=False),
        optimizer=replace(recipe.optimizer, num_updates=1, ema_decay=0.0),
        precision=precision,
        max_ratio_error=1.0,
        network=Network(train=LoRA(rank=32, alpha=64.0)),
        task=Task(
            model=f"benchmarks.networks:{network}",
            rewards=(RewardTerm(function="benchmarks.networks:brightness"),),
            judge="",
        ),
    )


def levers(recipe: Recipe) -> list[Lever]:
    """The rows from a recipe of `base`; a lever it has no use for is left out."""
    rows = [Lever(TRAINER, recipe, trainer=True), Lever(EQUAL, recipe)]
    for name, change in CHANGES.items():
        changed = change(recipe)
        if changed != recipe:
            recipe = changed
            rows.append(Lever(name, recipe))
        if name == FAST:
            fast = recipe
    return [*rows, Lever(FLASH, _shared(_flash(fast))), Lever(TRAINER_FAST, fast, trainer=True)]


def _compiled(recipe: Recipe) -> Recipe:
    return replace(recipe, network=replace(recipe.network, compile=True))


def _window(recipe: Recipe) -> Recipe:
    """Flow-GRPO-Fast draws the window's start from 0 to 3; here it stays at 1, so that steps can be compared."""
    return replace(recipe, window=FrozenWindow(start=1, size=2), share_start_noise=True)


def _without_kl(recipe: Recipe) -> Recipe:
    assert isinstance(recipe.loss, ClippedRatio)
    return replace(recipe, loss=replace(recipe.loss, kl_beta=0.0))


def _without_guidance(recipe: Recipe) -> Recipe:
    return replace(recipe, guidance_scale=1.0)


def _shared(recipe: Recipe) -> Recipe:
    return replace(recipe, **{SHARING: True}) if SHARING else recipe


def _pruned(recipe: Recipe) -> Recipe:
    """Half of a group survives; a forward still takes as many rows, of more groups."""
    size = recipe.group_size // 2
    prune = Prune(at=(3,), sizes=(recipe.group_size,), score="latents", pool=2)
    whole = recipe.num_prompts * size % recipe.rows_per_forward
    rows = size if whole else recipe.rows_per_forward
    return replace(recipe, prune=prune, group_size=size, rows_per_forward=rows)


def _low(recipe: Recipe) -> Recipe:
    return replace(recipe, rollout_precision=LowPrecision(format="fp8_rows", mode="branch"))


def _flash(recipe: Recipe) -> Recipe:
    """Four stochastic steps in the middle of the window's way, then a second-order solver in 40 % of the steps."""
    return replace(recipe, window=FrozenWindow(start=3, size=4), solver=mix_grpo_flash().solver)


CHANGES: dict[str, Callable[[Recipe], Recipe]] = {
    COMPILED: _compiled,
    WINDOW: _window,
    NO_KL: _without_kl,
    FAST: _without_guidance,
    SHARED: _shared,
    PRUNED: _pruned,
    LOW: _low,
}
