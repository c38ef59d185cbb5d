"""Flow-OPD: a student distilled on its own samples by teachers, each prompt by the one for its data set.

arXiv 2605.08063. With mu the mean of a transition and q the SDE's rate without sqrt(-dt), as released:

    kl = mean((mu - mu_teacher)^2) / (2 q^2)

    "gkd"      loss = kl, differentiated
    "kl_only"  a policy gradient whose advantage at each step is clip(scale * kl, +-bound), without gradient
    "mixed"    the same with the task's advantage: clip(A + scale * kl, +-bound)

`normalise` takes kl's z-score over the samples of an optimiser step, at each step of the walk (sample std + 1e-4).

A kl depends on the state before a step alone, not on the noise that the step drew. So the expected gradient of
"kl_only" is 0 before the first update: `E[A * grad log_prob] = A * E[grad log_prob] = 0`. The released loop does not
detach A, whose own gradient is that of "gkd"; with A a number, "gkd" is what teaches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from flowgrpo_fast.checks import one_of, positive
from flowgrpo_fast.objectives.objective import Costs, Evaluator, Points, Requires, Stats, Terms
from flowgrpo_fast.objectives.regularizers import Regularizer
from flowgrpo_fast.objectives.snapshots import SnapshotRule
from flowgrpo_fast.objectives.trust import Clip, Trust
from flowgrpo_fast.ops import Extras, FlowLogProbOutput, flow_log_prob
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.types import Batch, Transitions

_FLOOR = 1e-4  # beside a standard deviation


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """See the module's text. `teachers` maps values of the metadata field `by` to weights."""

    teachers: dict[str, SnapshotRule] = field(default_factory=dict)
    by: str = "dataset"
    mode: Literal["gkd", "kl_only", "mixed"] = "gkd"
    scale: float = -1.0
    bound: float = 5.0
    normalise: bool = False  # of "kl_only" and "mixed"
    trust: Trust = field(default_factory=Clip)
    regularizers: tuple[Regularizer, ...] = ()

    def __post_init__(self) -> None:
        """Somebody teaches."""
        one_of(self, ("gkd", "kl_only", "mixed"), mode=self.mode)
        positive(self, bound=self.bound)

    @property
    def requires(self) -> Requires:
        """Stored transitions, and every teacher's weights."""
        nobody = (
            "Distillation.teachers is empty; name a teacher for each value of the prompts' metadata, such as "
            'objective.teachers={"ocr": {"is": "Loaded", "path": "runs/ocr/checkpoints/step_000300"}}'
        )
        needs = Requires(
            log_probs=True,
            snapshots={f"teacher/{name}": rule for name, rule in self.teachers.items()},
            metadata={self.by: tuple(self.teachers)} if self.teachers else {},
            incomplete="" if self.teachers else nobody,
        )
        for part in self.penalties:
            needs = needs.joined(part.requires)
        return needs

    @property
    def penalties(self) -> tuple[Regularizer, ...]:
        """Those that weigh anything."""
        return tuple(part for part in self.regularizers if part.beta > 0)

    @property
    def couples(self) -> bool:
        """Every edge by itself, unless a z-score joins the samples."""
        return self.normalise and self.mode != "gkd"

    def check(self, plan: Plan) -> None:
        """Any plan that keeps what it requires."""

    def costs(self, plan: Plan, num_prompts: int) -> Costs:
        """A teacher at each row, and the regularizers' snapshots."""
        others = {part.to for part in self.penalties if part.to}
        return Costs(sum(plan.trained_rows(num_prompts)), frozen=1 + len(others))

    def points(self, batch: Batch) -> Points:
        """One a kept step."""
        return Points(len(batch.samples.transitions), batch.samples.transitions.__getitem__)

    def measure(self, point: Transitions, evaluator: Evaluator) -> Stats:
        """Distances from each row's own teacher and from the regularizers' snapshots `[E]`."""
        names = [f"teacher/{known[self.by]}" for known in evaluator.metadata]
        given = (point.latents, point.sigma)
        velocity, guidance = evaluator.trained(*given, unconditional=point.unconditional)
        others = {"teacher": evaluator.routed(names, *given)}
        others |= {part.to: evaluator.frozen(part.to, *given) for part in self.penalties if part.to}
        stats = {"old_log_prob": point.log_prob}
        for name, (other, other_guidance) in others.items():
            negative = None if other_guidance is None else point.spread(other_guidance.negative_velocity)
            out = flow_log_prob(
                point.spread(point.latents),
                point.spread(velocity),
                point.next_latents,
                evaluator.coeffs,
                point.row,
                guidance=point.spread_guidance(guidance),
                extras=Extras(reference_velocity=point.spread(other), reference_negative=negative),
            )
            assert isinstance(out, FlowLogProbOutput)
            assert out.drift is not None
            distance = out.drift / evaluator.coeffs[point.row, 2].square()
            stats |= {
                "log_prob": out.log_prob,
                f"drift/{name}": out.drift,
                f"distance/{name}": distance,
            }
        return stats | {"std": evaluator.coeffs[point.row, 3], "interval": evaluator.interval[point.row]}

    def loss(self, stats: Stats, advantages: Tensor) -> Terms:
        """As of the module's text; of `[B, N]` tables a mean over the steps."""
        kl = stats["drift/teacher"] * stats["interval"] / (2 * stats["std"].square())
        log_ratio = self.log_ratio(stats)
        if self.mode == "gkd":
            loss, ratio = kl, torch.exp(log_ratio).detach()
        else:
            signal = kl.detach()
            if self.normalise:
                signal = (signal - signal.mean(0)) / (signal.std(0, correction=1) + _FLOOR)
            credit = self.scale * signal
            if self.mode == "mixed":
                wide = advantages[:, None] if credit.ndim > advantages.ndim else advantages
                credit = credit + wide
            loss, ratio, _ = self.trust(log_ratio, credit.clamp(-self.bound, self.bound))
        for part in self.penalties:
            loss = loss + part.beta * part.penalty(stats)
        shown = {"loss": loss.detach(), "teacher_kl": kl.detach(), "ratio_mean": ratio}
        if self.couples:
            shown = {name: values.mean(1) for name, values in shown.items()}
            return Terms(loss.mean(1), shown, {"ratio_max": ratio.amax(1)})
        return Terms(loss, shown, {"ratio_max": ratio})

    @property
    def ratio_range(self) -> float:
        """The trust region's."""
        return self.trust.range

    def log_ratio(self, stats: Stats) -> Tensor:
        """`[E]`."""
        return stats["log_prob"] - stats["old_log_prob"]
