"""One training step of a transformer, lever by lever: each row is the one above it with one thing changed.

The first row is the loop that trainers write on Flow-GRPO's recipe; the second does the same work in this engine. Rows
at the end name the recipe that they start from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.lever_report import (
    COMPILED,
    EQUAL,
    FAST,
    FLASH,
    JOINED,
    LOW,
    NO_KL,
    PRUNED,
    SHARED,
    TRAINER,
    TRAINER_FAST,
    WIDE,
    WINDOW,
)
from benchmarks.trainer_loop import Trainer
from flowgrpo_fast.recipe import (
    Cuts,
    FrozenWindow,
    LoRA,
    LowPrecision,
    Network,
    PolicyGradient,
    Recipe,
    RewardTerm,
    SharedStart,
    Task,
)
from flowgrpo_fast.recipes.trajectory import flow_grpo, mix_grpo_flash
from flowgrpo_fast.training.engine import Engine, build_engine
from flowgrpo_fast.training.loop import StepReport, train_step


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
        unconditional_gradient=False,  # the loop detaches that half, as most trainers do
        group_size=group_size,
        num_prompts=num_prompts,
        credit=recipe.credit[:2],  # every group takes part, whatever its rewards
        optimizer=replace(recipe.optimizer, num_updates=1, ema_decay=0.0),
        machine=replace(
            recipe.machine, precision=precision, rows_per_forward=group_size, max_ratio_error=1.0
        ),
        network=Network(train=LoRA(rank=32, alpha=64.0)),
        task=Task(
            model=f"benchmarks.networks:{network}",
            rewards=(RewardTerm(function="benchmarks.networks:brightness"),),
            judge="",
        ),
    )


def without_kl(recipe: Recipe) -> Recipe:
    """The clipped ratio alone."""
    assert isinstance(recipe.objective, PolicyGradient)
    return replace(recipe, objective=replace(recipe.objective, regularizers=()))


def levers(recipe: Recipe, compiles: bool = True) -> list[Lever]:
    """The rows from a recipe of `base`; a lever it has no use for is left out.

    Args:
        compiles: whether blocks stay compiled after the row that compiles them. Where a compiler takes longer than
            all that is measured, on a CPU, that row stands alone.
    """
    rows = [Lever(TRAINER, recipe, trainer=True), Lever(EQUAL, recipe)]
    for name, change in CHANGES.items():
        changed = change(recipe)
        if changed != recipe:
            rows.append(Lever(name, changed))
        if compiles or name != COMPILED:
            recipe = changed
        if name == FAST:
            fast = recipe
    wider = _wider(fast)
    if wider != fast:  # forwards of as many rows, without and with several steps in them
        joined = replace(wider, machine=replace(wider.machine, steps_per_forward=2))
        rows += [Lever(WIDE, wider), Lever(JOINED, joined)]
    return [*rows, Lever(FLASH, _shared(_flash(fast))), Lever(TRAINER_FAST, fast, trainer=True)]


def _compiled(recipe: Recipe) -> Recipe:
    return replace(recipe, network=replace(recipe.network, compile=True))


def _window(recipe: Recipe) -> Recipe:
    """Flow-GRPO-Fast draws the window's start from 0 to 3; here it stays at 1, so that steps can be compared."""
    window = FrozenWindow(start=1, size=2)
    return replace(recipe, topology=SharedStart(at=window, share_prefix=False))


def _without_guidance(recipe: Recipe) -> Recipe:
    return replace(recipe, guidance_scale=1.0)


def _shared(recipe: Recipe) -> Recipe:
    return replace(recipe, topology=SharedStart(at=recipe.topology.at))


def _pruned(recipe: Recipe) -> Recipe:
    """Half of a group survives; a forward still takes as many rows, of more groups."""
    size, rows = recipe.group_size // 2, recipe.machine.rows_per_forward
    topology = Cuts(inner=recipe.topology, steps=(3,), sizes=(recipe.group_size,), score="latents", pool=2)
    machine = replace(recipe.machine, rows_per_forward=size if recipe.num_prompts * size % rows else rows)
    return replace(recipe, topology=topology, group_size=size, machine=machine)


def _low(recipe: Recipe) -> Recipe:
    precision = LowPrecision(format="fp8_rows", mode="branch")
    return replace(recipe, machine=replace(recipe.machine, rollout_precision=precision))


def _flash(recipe: Recipe) -> Recipe:
    """Four stochastic steps in the middle of the window's way, then a second-order solver in 40 % of the steps."""
    topology = SharedStart(at=FrozenWindow(start=3, size=4), share_prefix=False)
    return replace(recipe, topology=topology, solver=mix_grpo_flash().solver)


def _wider(recipe: Recipe) -> Recipe:
    """Twice the rows a forward or more, which two trained steps of a sample can share; in the rollout, too.

    A recipe whose forwards take all samples already has no more.
    """
    samples, rows = recipe.num_prompts * recipe.group_size, recipe.machine.rows_per_forward
    wider = [many for many in range(2 * rows, samples + 1, rows) if samples % many == 0 and many % 2 == 0]
    if not wider:
        return recipe
    return replace(recipe, machine=replace(recipe.machine, rows_per_forward=wider[0], steps_per_forward=1))


CHANGES: dict[str, Callable[[Recipe], Recipe]] = {
    COMPILED: _compiled,
    WINDOW: _window,
    NO_KL: without_kl,
    FAST: _without_guidance,
    SHARED: _shared,
    PRUNED: _pruned,
    LOW: _low,
}
