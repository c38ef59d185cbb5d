"""Flow-OPD: a student distilled on its own samples by teachers, each prompt by the one for its data set.

arXiv 2605.08063. With mu the mean of a transition and q the SDE's rate without sqrt(-dt), as released:

    kl = mean((mu - mu_teacher)^2) / (2 q^2)

    "gkd"      loss = kl, differentiated
    "kl_only"  a policy gradient whose advantage at each step is clip(scale * kl, +-bound), without gradient
    "mixed"    the same with the task's advantage added at the last trained step
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from flowgrpo_fast.checks import one_of, positive, require
from flowgrpo_fast.objectives.objective import Costs, Evaluator, Points, Requires, Stats, Terms
from flowgrpo_fast.objectives.regularizers import Regularizer
from flowgrpo_fast.objectives.snapshots import SnapshotRule
from flowgrpo_fast.objectives.trust import Clip, Trust
from flowgrpo_fast.ops import Extras, FlowLogProbOutput, flow_log_prob
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.types import Batch, Transitions, spread, spread_guidance


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """See the module's text. `teachers` maps values of the metadata field `by` to weights."""

    teachers: dict[str, SnapshotRule] = field(default_factory=dict)
    by: str = "dataset"
    mode: Literal["gkd", "kl_only", "mixed"] = "gkd"
    scale: float = -1.0
    bound: float = 5.0
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
            incomplete="" if self.teachers else nobody,
        )
        for part in self.regularizers:
            needs = needs.joined(part.requires)
        return needs

    @property
    def couples(self) -> bool:
        """Every edge by itself."""
        return False

    def check(self, plan: Plan) -> None:
        """Any plan that keeps what it requires."""

    def costs(self, plan: Plan, num_prompts: int) -> Costs:
        """A teacher at each row, and the regularizers' snapshots."""
        others = {part.to for part in self.regularizers if part.to}
        return Costs(sum(plan.trained_rows(num_prompts)), frozen=1 + len(others))

    def points(self, batch: Batch) -> Points:
        """One a kept step."""
        return Points(len(batch.samples.transitions), batch.samples.transitions.__getitem__)

    def measure(self, point: Transitions, evaluator: Evaluator) -> Stats:
        """Distances from each row's own teacher and from the regularizers' snapshots `[E]`."""
        names = []
        for known in evaluator.metadata:
            value = str(known.get(self.by, ""))
            require(
                value in self.teachers,
                f"a prompt's metadata has {self.by} = {value!r}, for which Distillation.teachers has nobody; "
                f"known: {', '.join(map(repr, self.teachers))}",
            )
            names.append(f"teacher/{value}")
        given = (point.latents, point.sigma)
        velocity, guidance = evaluator.trained(*given, unconditional=point.unconditional)
        others = {"teacher": evaluator.routed(names, *given)}
        others |= {part.to: evaluator.frozen(part.to, *given) for part in self.regularizers if part.to}
        stats = {"old_log_prob": point.log_prob}
        for name, (other, other_guidance) in others.items():
            negative = None if other_guidance is None else spread(other_guidance.negative_velocity, point.fan)
            out = flow_log_prob(
                spread(point.latents, point.fan),
                spread(velocity, point.fan),
                point.next_latents,
                evaluator.coeffs,
                point.row,
                guidance=spread_guidance(guidance, point.fan),
                extras=Extras(reference_velocity=spread(other, point.fan), reference_negative=negative),
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
        """As of the module's text."""
        kl = stats["drift/teacher"] * stats["interval"] / (2 * stats["std"].square())
        log_ratio = self.log_ratio(stats)
        if self.mode == "gkd":
            loss, ratio = kl, torch.exp(log_ratio).detach()
        else:
            credit = (self.scale * kl.detach()).clamp(-self.bound, self.bound)
            credit = credit + advantages if self.mode == "mixed" else credit
            loss, ratio, _ = self.trust(log_ratio, credit)
        for part in self.regularizers:
            loss = loss + part.beta * part.penalty(stats)
        shown = {"loss": loss.detach(), "teacher_kl": kl.detach(), "ratio_mean": ratio}
        return Terms(loss, shown, {"ratio_max": ratio})

    @property
    def ratio_range(self) -> float:
        """The trust region's."""
        return self.trust.range

    def log_ratio(self, stats: Stats) -> Tensor:
        """`[E]`."""
        return stats["log_prob"] - stats["old_log_prob"]
