"""The plain case: every seed drawn is walked and trained on."""

from __future__ import annotations

from dataclasses import dataclass

from flowgrpo_fast.experience.experience import Gathered, Stage, Walks, in_chunks
from flowgrpo_fast.objectives.objective import Requires
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.types import Draws, Scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Fresh samples of the policy that samples, by the recipe's topology."""

    requires = Requires()  # nothing
    gives_transitions = True  # all that the plan keeps
    scout_precision = None  # it ranks nothing
    walks = Walks()  # the recipe's plan

    def check(self, num_steps: int, group_size: int, stages: tuple[int, ...], shares_start: bool) -> None:
        """Any walk will do."""

    def check_plan(self, plan: Plan) -> None:
        """Any plan will do."""

    def num_drawn(self, num_candidates: int) -> int:
        """One seed a candidate."""
        return num_candidates

    def collect(self, stage: Stage, draws: Draws, step: int) -> Gathered:
        """As of `Experience`."""
        samples, scorings = in_chunks(stage, stage.sampler, stage.plan(step), draws)
        return Gathered(samples, scorings, stage.scorer)

    def settle(self, stage: Stage, scored: Scored, step: int) -> None:
        """Nothing is kept."""
