"""What each lever saves: the recipe, or how it is run, is changed and planned again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from flowgrpo_fast.planner.architectures import Counts
from flowgrpo_fast.planner.devices import Gpu
from flowgrpo_fast.planner.step import Execution, plan_step
from flowgrpo_fast.recipe import (
    ClippedRatio,
    DPMSolver2M,
    KeepAll,
    LoRA,
    LowPrecision,
    NoScouts,
    Prune,
    RandomWindow,
    Recipe,
    TrainingPrecision,
)
from flowgrpo_fast.sampling.windows import window_steps

CountAgain = Callable[[Recipe], Counts]


@dataclass(frozen=True, slots=True)
class Lever:
    """One change, and the GPU-seconds of a step it saves; `in_use`: it is pulled already and saves that."""

    name: str
    saves: float
    share: float  # of the step without the lever
    in_use: bool
    exact: bool  # the same estimator; else the method changes, or its rounding
    setting: str


@dataclass(frozen=True, slots=True)
class _Change:
    name: str
    setting: str
    exact: bool
    in_use: bool
    recipe: Recipe  # with the lever pulled; without it where it is in use
    execution: Execution


def levers(
    counts: Counts,
    recipe: Recipe,
    gpu: Gpu,
    execution: Execution | None = None,
    again: CountAgain | None = None,
) -> list[Lever]:
    """Every lever that applies, the largest saving first; `again` counts a recipe whose network differs."""
    execution = execution or Execution()
    now = plan_step(counts, recipe, execution).floor(gpu)
    found = []
    for change in _changes(recipe, execution, gpu):
        same = change.recipe.network == recipe.network
        if not same and again is None:
            continue
        try:
            other = counts if same or again is None else again(change.recipe)
            then = plan_step(other, change.recipe, change.execution).floor(gpu)
        except ValueError:
            continue  # the lever does not go with the rest of the recipe
        saves, whole = (then - now, then) if change.in_use else (now - then, now)
        found.append(Lever(change.name, saves, saves / whole, change.in_use, change.exact, change.setting))
    found = [lever for lever in found if lever.in_use or lever.saves > 0]
    return sorted(found, key=lambda lever: (lever.in_use, -lever.saves))


def _changes(recipe: Recipe, execution: Execution, gpu: Gpu) -> Iterator[_Change]:
    yield from _method(recipe, execution)
    yield from _sharing(recipe, execution)
    yield from _network(recipe, execution, gpu)


def _method(recipe: Recipe, execution: Execution) -> Iterator[_Change]:
    """Levers that change the method."""
    num_steps = recipe.sigmas.num_inference_steps
    window = window_steps(recipe.window, num_steps, 0, recipe.seed)
    if isinstance(recipe.loss, ClippedRatio) and window.num_trained > 3 and num_steps > 4:
        high = max(3, num_steps // 2)
        short = replace(recipe, window=RandomWindow(size=3, low=0, high=high))
        setting = f"window=RandomWindow window.size=3 window.high={high}"
        yield _Change("window of 3 stochastic steps", setting, False, False, short, execution)
    if recipe.guidance_scale != 1.0:
        plain = replace(recipe, guidance_scale=1.0)
        yield _Change("no guidance", "guidance_scale=1.0", False, False, plain, execution)
    if isinstance(recipe.loss, ClippedRatio) and recipe.loss.kl_beta > 0:
        free = replace(recipe, loss=replace(recipe.loss, kl_beta=0.0))
        yield _Change("no KL to the start weights", "loss.kl_beta=0.0", False, False, free, execution)
    if not (isinstance(recipe.solver, DPMSolver2M) and recipe.solver.keep < 1):
        if window.stochastic and window.stochastic[-1] + 1 < num_steps - 1:
            solver = replace(recipe, solver=DPMSolver2M(keep=0.4))
            setting = "solver=DPMSolver2M solver.keep=0.4"
            yield _Change(
                "second-order solver, 40 % of the tail",
                setting,
                False,
                False,
                solver,
                execution,
            )
    else:
        euler = replace(recipe, solver=replace(recipe.solver, keep=1.0))
        yield _Change("second-order solver, shorter tail", "solver.keep", False, True, euler, execution)
    half = recipe.group_size // 2
    apart = not recipe.share_start_noise  # else candidates are equal before the window
    unpruned = isinstance(recipe.prune, KeepAll) and isinstance(recipe.explore, NoScouts)
    if unpruned and apart and half >= 2 and num_steps > 3:
        pruned = replace(
            recipe,
            prune=Prune(at=(3,), sizes=(recipe.group_size,), score="latents"),
            group_size=half,
            optimizer=replace(recipe.optimizer, num_updates=1),
            rows_per_forward=0,
            replay_rows=0,
        )
        setting = f"prune=Prune prune.sizes=[{recipe.group_size}] group_size={half}"
        yield _Change(
            f"prune {recipe.group_size} to {half} before step 3", setting, False, False, pruned, execution
        )


def _sharing(recipe: Recipe, execution: Execution) -> Iterator[_Change]:
    """Levers of execution, which keep the estimator."""
    if recipe.share_start_noise and recipe.share_prefix:
        prefix = replace(execution, share_prefix=not execution.share_prefix)
        yield _Change(
            "shared steps before the window",
            "share_prefix=true",
            True,
            execution.share_prefix,
            recipe,
            prefix,
        )
        pulled = execution.share_first_step
        first = replace(execution, share_first_step=not pulled, share_first_forward=not pulled)
        yield _Change("shared first stochastic step", "share_prefix=true", True, pulled, recipe, first)
    elif recipe.share_start_noise:
        sharing = replace(recipe, share_prefix=True)
        name = "shared steps up to the first stochastic one"
        yield _Change(name, "share_prefix=true", True, False, sharing, execution)
    if recipe.guidance_scale != 1.0:
        uncond = replace(execution, uncond_gradient=not execution.uncond_gradient)
        pulled = not execution.uncond_gradient
        yield _Change("unconditional half under no_grad", "always", True, pulled, recipe, uncond)
        pulled = recipe.reuse_unconditional and not execution.recompute_unconditional
        again = replace(recipe, reuse_unconditional=not pulled)
        name = "unconditional half of the first update from the rollout"
        yield _Change(name, "reuse_unconditional=true", True, pulled, again, execution)
    text = replace(execution, text_each_sample=not execution.text_each_sample)
    pulled = not execution.text_each_sample
    yield _Change("prompts encoded once", "network.text_cache", True, pulled, recipe, text)


def _network(recipe: Recipe, execution: Execution, gpu: Gpu) -> Iterator[_Change]:
    """Levers of precision, checkpointing and what is trained."""
    plain = replace(recipe, rollout_precision=TrainingPrecision())
    if recipe != plain:
        yield _Change("low precision outside the window", "rollout_precision", False, True, plain, execution)
    else:
        formats = (("fp8_rows", gpu.fp8), ("nvfp4", gpu.fp4))
        for name in (form for form, rate in formats if rate):
            low = replace(recipe, rollout_precision=LowPrecision(format=name))  # type: ignore[arg-type]
            setting = f"rollout_precision=LowPrecision rollout_precision.format={name}"
            yield _Change(f"{name} outside the window", setting, False, False, low, execution)
    if recipe.network.checkpointing == "full":
        for kind in ("selective", "none"):
            network = replace(recipe.network, checkpointing=kind)
            light = replace(recipe, network=network)
            name = f"{kind} checkpointing" if kind != "none" else "no checkpointing"
            yield _Change(name, f"network.checkpointing={kind}", True, False, light, execution)
    if recipe.network.train.trains_every_weight:
        lora = replace(recipe, network=replace(recipe.network, train=LoRA()))
        yield _Change("LoRA instead of full fine-tuning", "network.train=LoRA", False, False, lora, execution)
