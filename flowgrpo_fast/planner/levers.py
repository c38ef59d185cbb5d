"""What each lever saves: the recipe, or how it is run, is changed and planned again.

A lever on the recipe is what a user would type, to the letter. If undoing it changes the recipe, it is pulled already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

from flowgrpo_fast.planner.architectures import Counts
from flowgrpo_fast.planner.devices import Gpu
from flowgrpo_fast.planner.forwards import fits_at_all
from flowgrpo_fast.planner.step import Execution, plan_step
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.recipe_io import override, show

CountAgain: TypeAlias = Callable[[Recipe], Counts]
_ALWAYS = "always"  # this engine does it by itself


@dataclass(frozen=True, slots=True)
class Lever:
    """One change, and the GPU-seconds of a step it saves; `in_use`: it is pulled already and saves that."""

    name: str
    saves: float
    share: float  # of the step without the lever
    in_use: bool
    exact: bool  # the same estimator; else the method changes, or its rounding
    setting: str  # assignments that pull it, or let it go where it is in use


class _Case(NamedTuple):
    """A run as planned."""

    recipe: Recipe
    execution: Execution


class _Change(NamedTuple):
    name: str
    setting: str
    exact: bool
    in_use: bool
    without: _Case
    pulled: _Case


def levers(
    counts: Counts,
    recipe: Recipe,
    gpu: Gpu,
    execution: Execution | None = None,
    again: CountAgain | None = None,
    num_gpus: int = 1,
) -> list[Lever]:
    """Every lever that applies, the largest saving first; `again` counts a recipe whose network differs.

    A lever that would no longer fit into the GPU's memory, where the recipe does, is none.
    """

    def counted(case: _Case) -> Counts:
        differs = again is not None and case.recipe.network != recipe.network
        return again(case.recipe) if again is not None and differs else counts

    def floor(case: _Case) -> float:
        return plan_step(counted(case), case.recipe, case.execution).floor(gpu)

    def fits(case: _Case) -> bool:
        return fits_at_all(case.recipe, counted(case), gpu.memory, num_gpus)

    found = []
    now = _Case(recipe, execution or Execution())
    must_fit = counts.activations is not None and fits(now)
    for change in (*_typed(now, gpu), *_others(now)):
        if again is None and change.pulled.recipe.network != change.without.recipe.network:
            continue
        try:
            whole, then = floor(change.without), floor(change.pulled)
            if must_fit and not change.in_use and not fits(change.pulled):
                continue
        except ValueError:
            continue  # the lever does not go with the rest of the recipe
        saves = whole - then
        if change.in_use or saves > 0:
            lever = Lever(change.name, saves, saves / whole, change.in_use, change.exact, change.setting)
            found.append(lever)
    return sorted(found, key=lambda lever: (lever.in_use, -lever.saves))


def _typed(now: _Case, gpu: Gpu) -> Iterator[_Change]:
    """Levers that a user types; each by what pulls it and what lets it go, either may be empty."""
    recipe = now.recipe
    num_steps = recipe.sigmas.num_inference_steps
    window = recipe.topology.at.steps(num_steps, 0, recipe.seed)
    low, shared, keep = "machine.rollout_precision", "topology.share_prefix", "solver.keep=1.0"
    # (name, what pulls it, what lets it go, whether the estimator stays)
    rows: list[tuple[str, str, str, bool]] = [
        ("no guidance", "guidance_scale=1.0", "", False),
        ("no KL to the start weights", "objective.regularizers=[]", "", False),
        ("no KL to the start weights", "objective.kl_beta=0.0", "", False),
        ("second-order solver, shorter tail", "", keep, False),
        ("shared steps up to the first stochastic one", f"{shared}=true", "", True),
        ("low precision outside the window", "", f"{low}=TrainingPrecision", False),
    ]
    if recipe.objective.requires.log_probs and window.num_trained > 3 and num_steps > 4:
        for path in ("topology.at", "topology.inner.at"):
            setting = f"{path}=RandomWindow {path}.size=3 {path}.high={max(3, num_steps // 2)}"
            rows.append(("window of 3 stochastic steps", setting, "", False))
    has_tail = bool(window.stochastic) and window.stochastic[-1] + 1 < num_steps - 1
    if has_tail and _override(recipe, keep) == recipe:
        setting = "solver=DPMSolver2M solver.keep=0.4"
        rows.append(("second-order solver, 40 % of the tail", setting, "", False))
    if recipe.guidance_scale > 1:
        name, reuse = "unconditional half of the first update from the rollout", "machine.reuse_unconditional"
        rows.append((name, f"{reuse}=true", f"{reuse}=false", True))
        constant = "unconditional_gradient"
        rows.append(("unconditional half held constant", f"{constant}=false", f"{constant}=true", False))
    if _override(recipe, f"{low}=TrainingPrecision") == recipe:
        for form, rate in (("fp8_rows", gpu.fp8), ("nvfp4", gpu.fp4)):
            setting = f"{low}=LowPrecision {low}.format={form}" if rate else ""
            rows.append((f"{form} outside the window", setting, "", False))
    if recipe.network.checkpointing == "full":
        rows.append(("selective checkpointing", "network.checkpointing=selective", "", True))
        rows.append(("no checkpointing", "network.checkpointing=none", "", True))
    if recipe.network.train.trains_every_weight:
        rows.append(("LoRA instead of full fine-tuning", "network.train=LoRA", "", False))
    # Candidates with one start noise are equal before the window.
    apart = not (recipe.topology.shares_start or recipe.topology.stages or recipe.experience.walks.num_scouts)
    size = recipe.group_size
    if apart and size >= 4 and num_steps > 3:
        rows.append((f"prune {size} to {size // 2} before step 3", _halved(recipe), "", False))
    for name, pull, let_go, exact in rows:
        undone, done = _override(recipe, let_go), _override(recipe, pull)
        if undone != recipe:
            yield _Change(name, let_go, exact, True, now._replace(recipe=undone), now)
        elif done != recipe:
            yield _Change(name, pull, exact, False, now, now._replace(recipe=done))


def _halved(recipe: Recipe) -> str:
    """Assignments that start with a group and cut it to half before step 3, around the topology as it is."""
    inner = [
        f"{path.replace('topology', 'topology.inner', 1)}={value.replace(' ', '')}"
        for path, value in show(recipe)
        if path.split(".")[0] == "topology"
    ]
    size, machine = recipe.group_size, "machine.rows_per_forward=0 machine.replay_rows=0"
    cuts = f"topology=Cuts topology.sizes=[{size}] topology.score=latents"
    return f"{cuts} group_size={size // 2} optimizer.num_updates=1 {machine} {' '.join(inner)}"


def _override(recipe: Recipe, text: str) -> Recipe:
    """The recipe with these assignments; as it was where they do not fit it."""
    try:
        return override(recipe, text.split())
    except ValueError:
        return recipe


def _others(now: _Case) -> Iterator[_Change]:
    """Levers of how a recipe is run."""
    recipe, execution = now
    alone = _override(recipe, "topology.share_prefix=false")
    if alone != recipe:
        first_apart = now._replace(execution=replace(execution, share_first_step=False))
        setting = "topology.share_prefix=false"
        name = "shared steps before the window"
        yield _Change(name, setting, True, True, now._replace(recipe=alone), first_apart)
        yield _Change("shared first stochastic step", setting, True, True, first_apart, now)
    once, each = (now._replace(execution=replace(execution, text_each_sample=on)) for on in (False, True))
    yield _Change("prompts encoded once", _ALWAYS, True, now == once, each, once)
