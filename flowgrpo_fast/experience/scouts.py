"""Sol-RL's two stages: many cheap scouts a prompt, and the seeds among them that are worth a full sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from flowgrpo_fast.checks import one_of, require
from flowgrpo_fast.experience.experience import Experience, Gathered, Stage, Walks, in_chunks
from flowgrpo_fast.experience.rollout import Rollout
from flowgrpo_fast.objectives.objective import Requires
from flowgrpo_fast.ops import top_bottom
from flowgrpo_fast.precision.parts import RolloutPrecision, TrainingPrecision
from flowgrpo_fast.rewards.scoring import collect, require_all
from flowgrpo_fast.sampling.prune import choose
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.types import Draws, Scored, Scores

_MOST = 1024  # candidates of a prompt that `ops.best_variance_subset` and `ops.top_bottom` take


@dataclass(frozen=True, slots=True, kw_only=True)
class Scouts:
    """Many cheap samples a prompt; the chosen seeds are regenerated in full. arXiv 2604.06916.

    The group of the recipe is what is regenerated: `group_size` of `num_scouts`, half the best, half the worst.
    Scouts walk the ODE from the start noise that their seed names, with the recipe's solver; the full sample of the
    same seed starts from the same noise to the bit. Controls: all scouts at full steps and precision,
    `regenerate=False` (naive scaling); the same in low precision (naive quantisation).
    """

    num_scouts: int = 96
    num_inference_steps: int = 6
    select: Literal["top_bottom", "variance", "random"] = "top_bottom"  # random: the control
    regenerate: bool = True  # False: train on the scouts themselves (the naive control)
    precision: RolloutPrecision = field(default_factory=TrainingPrecision)
    inner: Experience = field(default_factory=Rollout)  # what walks the chosen seeds

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

    @property
    def requires(self) -> Requires:
        """As what it wraps."""
        return self.inner.requires

    @property
    def gives_transitions(self) -> bool:
        """Scouts walk the ODE: only regenerated samples have transitions."""
        return self.regenerate and self.inner.gives_transitions

    @property
    def scout_precision(self) -> RolloutPrecision | None:
        """Its own."""
        return self.precision

    @property
    def walks(self) -> Walks:
        """The scouts, and what it wraps where they are regenerated."""
        full = self.regenerate and self.inner.walks.full
        return Walks(full, self.num_scouts, self.num_inference_steps)

    def check(self, num_steps: int, group_size: int, stages: tuple[int, ...], shares_start: bool) -> None:
        """As of `Experience`."""
        require(
            self.num_scouts > group_size,
            f"Scouts.num_scouts is {self.num_scouts}; it must be above group_size = {group_size}",
        )
        require(
            self.num_inference_steps <= num_steps,
            f"Scouts.num_inference_steps is {self.num_inference_steps}; scouts take at most the "
            f"{num_steps} steps of a full sample",
        )
        require(not stages, "Scouts and Cuts both choose who is trained; use one")
        require(
            not shares_start,
            "the topology shares start noise; scouts differ in nothing but theirs: use Independent",
        )
        self.inner.check(num_steps, group_size, stages, shares_start)

    def check_plan(self, plan: Plan) -> None:
        """As what it wraps."""
        self.inner.check_plan(plan)

    def num_drawn(self, num_candidates: int) -> int:
        """One seed a scout."""
        return self.num_scouts

    def collect(self, stage: Stage, draws: Draws, step: int) -> Gathered:
        """As of `Experience`."""
        plan = stage.ode(self.num_inference_steps, self.num_scouts)
        scouts, scorings = in_chunks(stage, stage.scout, plan, draws)
        scores = require_all(collect(scorings))
        rows = choose(scores.total.view(len(draws.prompt_index), -1), stage.group_size, self.select)
        chosen, mean, of_chosen = draws.rows(rows), scores.total.mean(), scores.total[rows]
        if self.regenerate:
            gathered = self.inner.collect(stage, chosen, step)
            samples = replace(gathered.samples, evaluations=gathered.samples.evaluations + scouts.evaluations)
            measures = _agreement(of_chosen, mean, len(draws.prompt_index))
            return replace(gathered, samples=samples, measures=measures)
        # A trajectory of finished samples alone: its plan says so, too.
        finished = replace(scouts, draws=chosen, x0=scouts.x0[rows])
        return Gathered(
            finished,
            [stage.score(finished)],
            stage.scorer,
            measures=lambda full: {"scout_reward": float(mean)},
        )

    def settle(self, stage: Stage, scored: Scored, step: int) -> None:
        """As what it wraps."""
        self.inner.settle(stage, scored, step)


def _agreement(scouts: Tensor, mean: Tensor, num_groups: int) -> Callable[[Scores], dict[str, float]]:
    """How well scouts foretold the full samples of the same seeds: mean reward, ranks, overlap of the better halves.

    The chosen are extremes: their own mean reward says little of the policy, and they are told apart more easily than
    all scouts would be. `Scouts.select = "random"` measures without that.
    """

    def measures(full: Scores) -> dict[str, float]:
        cheap, rewards = scouts.view(num_groups, -1), full.total.view(num_groups, -1)
        values = {
            "scout_reward": mean.double(),
            "scout_spearman": spearman(cheap, rewards).mean(),
            "scout_top_overlap": top_overlap(cheap, rewards, cheap.shape[1] // 2).mean().double(),
        }
        return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))

    return measures


def ranks(values: Tensor) -> Tensor:
    """Ranks 1..G of each row of `[P, G]`, fp64; equal values share their mean rank."""
    above = (values[:, :, None] > values[:, None, :]).sum(2)
    equal = (values[:, :, None] == values[:, None, :]).sum(2)
    return above.double() + (equal.double() + 1) / 2


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of the rows of two `[P, G]`, `[P]` fp64; 0 where all of a row are equal."""
    x, y = (r - r.mean(1, keepdim=True) for r in (ranks(a), ranks(b)))
    size = (x.square().sum(1) * y.square().sum(1)).sqrt()
    return torch.where(size > 0, (x * y).sum(1) / size.clamp_min(1e-300), 0.0)


def top_overlap(a: Tensor, b: Tensor, k: int) -> Tensor:
    """The share of the `k` highest of each row of `a [P, G]` that are among the `k` highest of `b`, `[P]`."""
    inside = [torch.zeros_like(x, dtype=torch.bool).scatter_(1, top_bottom(x, k, 0), True) for x in (a, b)]
    return (inside[0] & inside[1]).sum(1) / k
