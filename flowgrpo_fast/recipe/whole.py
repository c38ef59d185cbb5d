"""The recipe itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from flowgrpo_fast.checks import positive, require
from flowgrpo_fast.recipe.learning import NFT, ClippedRatio, Credit, Loss, Optimizer
from flowgrpo_fast.recipe.network import Network
from flowgrpo_fast.recipe.rollout import (
    Exploring,
    KeepAll,
    NoScouts,
    Prune,
    Pruning,
    RolloutPrecision,
    Scouts,
    TrainingPrecision,
)
from flowgrpo_fast.recipe.schedule import (
    AllSteps,
    Deterministic,
    Dynamics,
    Euler,
    FlowSDE,
    Sigmas,
    Solver,
    Window,
)
from flowgrpo_fast.recipe.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything a run depends on, besides its code."""

    name: str
    sigmas: Sigmas = field(default_factory=Sigmas)
    dynamics: Dynamics = field(default_factory=FlowSDE)
    window: Window = field(default_factory=AllSteps)
    solver: Solver = field(default_factory=Euler)  # steps after the window; before it Euler
    share_start_noise: bool = False  # one start noise for a group
    share_prefix: bool = True  # what such a group has in common is computed once, in rollout and update
    guidance_scale: float = 1.0
    # The rollout's unconditional half serves the update until its first optimiser step: same weights.
    reuse_unconditional: bool = True
    group_size: int = 24  # samples a prompt that are trained on; pruning and scouts start from more
    num_prompts: int = 48  # per training step
    credit: Credit = field(default_factory=Credit)
    loss: Loss = field(default_factory=ClippedRatio)
    optimizer: Optimizer = field(default_factory=Optimizer)
    network: Network = field(default_factory=Network)
    explore: Exploring = field(default_factory=NoScouts)
    prune: Pruning = field(default_factory=KeepAll)
    precision: Literal["fp32", "bf16"] = "fp32"  # of the network's matrix products
    # Of steps without a log-prob.
    rollout_precision: RolloutPrecision = field(default_factory=TrainingPrecision)
    rows_per_forward: int = 0  # samples per forward in rollout and replay; 0 = as many as one update takes
    prompts_per_chunk: int = 0  # that are rolled out, then scored meanwhile (RewardTerm.where); 0 = all
    graphs: bool = False  # rollout steps as captured CUDA graphs
    replay_rows: int = 0  # samples per forward of the replay; 0 = as in the rollout: first ratio exactly 1
    max_ratio_error: float = 0.0  # of the self-test before the first update; 0 = the loss's clip_range
    num_steps: int = 300
    seed: int = 0
    task: Task = field(default_factory=Task)

    def __post_init__(self) -> None:
        """Whatever the fields alone can break; the rest is checked where the schedule is resolved."""
        require(
            self.group_size >= 2,
            f"Recipe.group_size is {self.group_size}; an advantage needs at least 2 samples per prompt",
        )
        positive(self, num_prompts=self.num_prompts, num_steps=self.num_steps)
        require(self.seed >= 0, f"Recipe.seed is {self.seed}; it must be at least 0")
        require(
            self.num_prompts * self.group_size % self.optimizer.num_updates == 0,
            f"Optimizer.num_updates is {self.optimizer.num_updates}; it must divide "
            f"num_prompts * group_size = {self.num_prompts * self.group_size}",
        )
        require(
            self.precision in ("fp32", "bf16"),
            f"Recipe.precision is {self.precision!r}; it must be 'fp32' or 'bf16'",
        )
        if isinstance(self.prune, Prune):
            require(
                self.prune.sizes[-1] > self.group_size,
                f"Prune.sizes ends at {self.prune.sizes[-1]}; it must be above group_size = {self.group_size}, "
                "which the last cut leaves",
            )
        if isinstance(self.explore, Scouts):
            self._check_scouts(self.explore)
        self._check_loss()
        for name in ("rows_per_forward", "replay_rows"):
            rows = getattr(self, name)
            require(
                rows >= 0 and self.rows_per_update % (rows or 1) == 0,
                f"Recipe.{name} is {rows}; it must divide {self.rows_per_update}, the samples of one update",
            )
        for size in self._stages:
            require(
                self.num_prompts * size % self.rollout_rows == 0,
                f"Recipe.rows_per_forward is {self.rows_per_forward}; it must divide {self.num_prompts * size}, the "
                f"candidates of {size} a prompt, so that rollout and replay run the same forwards",
            )
        self._check_chunks()

    def _check_chunks(self) -> None:
        chunk = self.prompts_per_chunk
        require(
            chunk >= 0 and self.num_prompts % (chunk or 1) == 0,
            f"Recipe.prompts_per_chunk is {chunk}; it must divide num_prompts = {self.num_prompts}",
        )
        for size in (*self._stages, self.group_size):
            require(
                chunk * size % self.rollout_rows == 0,
                f"Recipe.prompts_per_chunk is {chunk}: {chunk * size} samples, which must be whole forwards "
                f"of {self.rollout_rows}; set rows_per_forward to {math.gcd(self.group_size, *self._stages)}, say",
            )

    def _check_scouts(self, scouts: Scouts) -> None:
        num_steps = self.sigmas.num_inference_steps
        require(
            scouts.num_scouts > self.group_size,
            f"Scouts.num_scouts is {scouts.num_scouts}; it must be above group_size = {self.group_size}",
        )
        require(
            scouts.num_inference_steps <= num_steps,
            f"Scouts.num_inference_steps is {scouts.num_inference_steps}; scouts take at most the "
            f"{num_steps} steps of a full sample",
        )
        require(
            isinstance(self.prune, KeepAll),
            "Recipe.explore and Recipe.prune both choose who is trained; use one",
        )
        require(
            not self.share_start_noise,
            "Recipe.share_start_noise is true; scouts differ in nothing but their start noise",
        )

    def _check_loss(self) -> None:
        deterministic = isinstance(self.window, Deterministic)
        require(
            not (deterministic and self.share_start_noise),
            "Recipe.share_start_noise is true and no step is stochastic; a group's samples would all be equal",
        )
        if isinstance(self.loss, NFT):
            require(
                self.guidance_scale == 1,
                f"Recipe.guidance_scale is {self.guidance_scale}; NFT samples and trains without guidance, at 1",
            )
            return
        require(
            not deterministic, "ClippedRatio needs log-probs; the window Deterministic has no stochastic step"
        )
        require(
            not isinstance(self.explore, Scouts) or self.explore.regenerate,
            "ClippedRatio needs log-probs, which scouts have not; set Scouts.regenerate to true",
        )

    @property
    def num_candidates(self) -> int:
        """Samples a prompt that the rollout starts with."""
        return self.prune.sizes[0] if isinstance(self.prune, Prune) else self.group_size

    @property
    def num_drawn(self) -> int:
        """Seeds a prompt that a step begins with, scouts included."""
        return self.explore.num_scouts if isinstance(self.explore, Scouts) else self.num_candidates

    @property
    def rows_per_update(self) -> int:
        """Samples behind one optimiser step."""
        return self.num_prompts * self.group_size // self.optimizer.num_updates

    @property
    def rollout_rows(self) -> int:
        """Samples per forward of the rollout; where candidates are pruned, what divides them before and after."""
        stages = (self.num_prompts * size for size in self._stages)
        return self.rows_per_forward or math.gcd(self.rows_per_update, *stages)

    @property
    def _stages(self) -> tuple[int, ...]:
        """Candidates a prompt, before each cut."""
        return self.prune.sizes if isinstance(self.prune, Prune) else ()

    def prompts_per_forward(self, rows: int) -> int:
        """Prompts per forward where a group's samples are one row yet, at most `rows`.

        Optimiser steps and chunks are whole numbers of them: rollout and replay then run the same rows.
        """
        prompts = math.gcd(
            self.rows_per_update // self.group_size, self.prompts_per_chunk or self.num_prompts
        )
        return next(n for n in range(max(1, min(rows, prompts)), 0, -1) if prompts % n == 0)
