"""Parts of a recipe: in which precision steps run, who is tried first, and who survives."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, TypeAlias

from flowgrpo_fast.checks import one_of, positive, require

_MOST = 1024  # candidates of a prompt that `ops.best_variance_subset` and `ops.top_bottom` take


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPrecision:
    """As in the update: `Recipe.precision` and nothing less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowPrecision:
    """Linear layers in FP8 or FP4. Only steps without a log-prob may use it.

    `mode` trades speed for a faithful update (docs/precision.md): "merged": a copy with the adapter merged in,
    refreshed in place after every update; "bare_layers": only layers without an adapter; "branch": frozen base in
    low precision, the adapter beside it in the precision of the update; "shared_base": one low-precision base in
    rollout and update.
    """

    format: Literal["fp8_rows", "fp8_tensor", "fp8_blocks", "nvfp4"] = "fp8_rows"
    mode: Literal["merged", "bare_layers", "branch", "shared_base"] = "branch"
    skip: tuple[str, ...] = ()  # regular expressions: layers left alone, besides the family's own
    emulate: bool = True  # where the device lacks the format: dequantise and multiply, slowly; else refuse

    def __post_init__(self) -> None:
        """Known names."""
        one_of(self, ("fp8_rows", "fp8_tensor", "fp8_blocks", "nvfp4"), format=self.format)
        one_of(self, ("merged", "bare_layers", "branch", "shared_base"), mode=self.mode)


RolloutPrecision: TypeAlias = TrainingPrecision | LowPrecision


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepAll:
    """No pruning: every sample is finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prune:
    """Pro-GRPO's funnel: a prompt starts with `sizes[0]` candidates, and the batch shrinks on the way.

    Before step `at[i]` a group of `sizes[i]` is cut to `sizes[i + 1]`; the last cut leaves `Recipe.group_size`.
    A cut reads the x0 prediction of the step before it and costs no network evaluation; one at the schedule's end
    reads finished samples. Survivors keep the transitions they have behind them, inside the window or not.

    `score` "reward": the rewards of decoded x0 predictions; "latents": the spread of pooled ones, no decode.
    `select` "variance": the subset whose scores vary most; "top_bottom": half the best, half the worst.
    """

    at: tuple[int, ...] = (3,)
    sizes: tuple[int, ...] = (48,)
    select: Literal["variance", "top_bottom"] = "variance"
    score: Literal["reward", "latents"] = "reward"
    pool: int = 8  # side of a cell of pooled latents

    def __post_init__(self) -> None:
        """As many cuts as sizes; steps rise, groups shrink."""
        require(
            len(self.at) == len(self.sizes) > 0,
            f"Prune.at names {len(self.at)} steps and Prune.sizes {len(self.sizes)} sizes; give one size per cut",
        )
        require(
            all(a < b for a, b in pairwise((0, *self.at))),
            f"Prune.at is {self.at}; its steps must rise, from 1",
        )
        require(
            all(a > b for a, b in pairwise((*self.sizes, 0))),
            f"Prune.sizes is {self.sizes}; its sizes must fall",
        )
        require(
            self.sizes[0] <= _MOST,
            f"Prune.sizes is {self.sizes}; a selection takes at most {_MOST} of a prompt",
        )
        one_of(self, ("variance", "top_bottom"), select=self.select)
        one_of(self, ("reward", "latents"), score=self.score)
        positive(self, pool=self.pool)
        require(
            self.score == "reward" or self.select == "variance",
            "Prune.select is 'top_bottom', which needs score='reward'; latents have no best and no worst",
        )


Pruning: TypeAlias = KeepAll | Prune


@dataclass(frozen=True, slots=True, kw_only=True)
class NoScouts:
    """Every seed drawn is trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scouts:
    """Sol-RL's two stages: many cheap samples a prompt; the chosen seeds are regenerated in full.

    The group of the recipe is what is regenerated: `group_size` of `num_scouts`, half the best, half the worst.
    Scouts walk the ODE from the start noise that their seed names, with the recipe's solver. Controls: all scouts at
    full steps and precision, `regenerate=False` (naive scaling); the same in low precision (naive quantisation).
    """

    num_scouts: int = 96
    num_inference_steps: int = 6
    select: Literal["top_bottom", "variance", "random"] = "top_bottom"  # random: the control
    regenerate: bool = True  # False: train on the scouts themselves (the naive control)
    precision: RolloutPrecision = field(default_factory=TrainingPrecision)

    def __post_init__(self) -> None:
        """At least two of each."""
        require(
            2 <= self.num_scouts <= _MOST,
            f"Scouts.num_scouts is {self.num_scouts}; it must be in [2, {_MOST}]",
        )
        require(
            self.num_inference_steps >= 2,
            f"Scouts.num_inference_steps is {self.num_inference_steps}; it must be at least 2",
        )
        one_of(self, ("top_bottom", "variance", "random"), select=self.select)


Exploring: TypeAlias = NoScouts | Scouts
