"""What plays the log-probability of a policy gradient, and where it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flowgrpo_fast.objectives.objective import Costs, Evaluator, Points, Requires, Stats
from flowgrpo_fast.ops import Extras, FlowLogProbOutput, flow_log_prob
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.types import Batch, Transitions


class Surrogate(Protocol):
    """A measure of how likely a sample is under the present weights, beside that under those that drew it."""

    @property
    def requires(self) -> Requires:
        """What it needs."""
        ...

    @property
    def couples(self) -> bool:
        """Whether a sample has one ratio, of the mean over its points of `log_prob - old_log_prob`; else each point."""
        ...

    def costs(self, plan: Plan, num_prompts: int) -> Costs:
        """As of `Objective`, without the references."""
        ...

    def points(self, batch: Batch) -> Points:
        """Where it is measured."""
        ...

    def measure(self, point: Any, evaluator: Evaluator, references: Sequence[str]) -> Stats:
        """`log_prob` and `old_log_prob [E]`, and how far each snapshot in `references` is.

        `distance/<name>` is the mean square distance of velocities; of stored transitions `drift/<name>`, that of their
        means, besides, with the `std` and the `interval` of the step.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PathLogProb:
    """The log-probability of the stored transitions, a mean over latent elements. arXiv 2505.05470 eq. 9."""

    requires = Requires(log_probs=True)  # stored transitions
    couples = False  # every transition has its own ratio

    def costs(self, plan: Plan, num_prompts: int) -> Costs:
        """A row for each row before a kept step, or for each step that a sample trains on."""
        rows, num_samples = plan.trained_rows(num_prompts), num_prompts * plan.group_size
        if plan.num_trained >= len(rows) or any(count != num_samples for count in rows):
            return Costs(sum(rows))
        return Costs(plan.num_trained * num_samples)

    def points(self, batch: Batch) -> Points:
        """One a kept step; where a sample trains on some of its steps only, one for each that it trains on."""
        steps, plan = batch.samples.transitions, batch.samples.plan
        if plan.num_trained >= len(steps) or any(t.num_heads != len(batch) for t in steps):
            return Points(len(steps), steps.__getitem__, plan.num_trained)
        choice = batch.choices.taken(len(steps), plan.num_trained)
        return Points(plan.num_trained, lambda turn: steps[0].picked(steps, choice[:, turn]))

    def measure(self, point: Transitions, evaluator: Evaluator, references: Sequence[str]) -> Stats:
        """One velocity a row, one log-probability an edge; distances under guidance take both halves of both models."""
        given = (point.latents, point.sigma)
        velocity, guidance = evaluator.trained(*given, unconditional=point.unconditional)
        transition = (
            point.spread(point.latents),
            point.spread(velocity),
            point.next_latents,
            evaluator.coeffs,
            point.row,
        )
        guidance = point.spread_guidance(guidance)
        stats = {"old_log_prob": point.log_prob}
        if not references:
            stats["log_prob"] = flow_log_prob(*transition, guidance=guidance)
        for name in references:
            other, other_guidance = evaluator.frozen(name, *given)
            negative = None if other_guidance is None else point.spread(other_guidance.negative_velocity)
            extras = Extras(reference_velocity=point.spread(other), reference_negative=negative)
            out = flow_log_prob(*transition, guidance=guidance, extras=extras)
            assert isinstance(out, FlowLogProbOutput)
            assert out.drift is not None
            # The means of one row differ by its coefficient of the velocity times what the velocities do.
            distance = out.drift / evaluator.coeffs[point.row, 2].square()
            stats |= {
                "log_prob": out.log_prob,
                f"drift/{name}": out.drift,
                f"distance/{name}": distance,
            }
        if references:
            # Advanced indexing copies these to the edges without a look at the device.
            stats |= {"std": evaluator.coeffs[point.row, 3], "interval": evaluator.interval[point.row]}
        return stats
