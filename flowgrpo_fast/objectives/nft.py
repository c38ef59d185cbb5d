"""DiffusionNFT: a policy improved on the forward process, without likelihoods. arXiv 2509.16117.

A finished sample x0 is noised again, `x = (1 - sigma) * x0 + sigma * noise`. Two implicit policies lie on either side
of the old one, `v+ = (1 - beta) * old + beta * v` and `v- = (1 + beta) * old - beta * v`; the first is to predict x0
where the sample is good, the second where it is bad:

    loss = most / beta * (r * L(v+) + (1 - r) * L(v-)) + kl_beta * mean((v - ref)^2)
    r    = (clamp(A / most, -1, 1) + 1) / 2            the optimality probability, from advantages bounded at `most`
    L(u) = mean((x - sigma * u - x0)^2) / max(mean(|x - sigma * u - x0|), 1e-5)       the divisor carries no gradient
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowgrpo_fast.checks import fraction, positive, require
from flowgrpo_fast.objectives.forward import at_schedule_steps, forward_process
from flowgrpo_fast.objectives.objective import Costs, Evaluator, Points, Requires, Stats, Terms
from flowgrpo_fast.objectives.snapshots import Frozen, Ramp, SnapshotRule
from flowgrpo_fast.ops import implicit_matching
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.types import Batch, Noised

_FLOOR = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class NFT:
    """DiffusionNFT's loss. Samples come from an old policy, which follows the trained one by a rule."""

    beta: float = 1.0  # how far the implicit policies lie from the old one
    kl_beta: float = 0.0  # weight of the mean square distance of velocities from the start weights'
    # Of the schedule's sigmas: each sample trains on that many, drawn without repetition.
    fraction: float = 0.99
    most: float = 5.0  # the bound of advantages, at which a sample is certainly good
    old: SnapshotRule = field(default_factory=Ramp)
    couples = False  # every noised sample by itself
    ratio_range = 0.0  # there is no ratio

    def __post_init__(self) -> None:
        """Weights are not negative."""
        positive(self, beta=self.beta, most=self.most)
        fraction(self, fraction=self.fraction)
        require(self.kl_beta >= 0, f"NFT.kl_beta is {self.kl_beta}; it must be at least 0")

    @property
    def requires(self) -> Requires:
        """The old policy, which samples; the start weights where they are measured from."""
        snapshots: dict[str, SnapshotRule] = {"old": self.old}
        if self.kl_beta > 0:
            snapshots["start"] = Frozen()
        return Requires(snapshots=snapshots, sampled_by="old", no_guidance=True)

    def check(self, plan: Plan) -> None:
        """Any plan that keeps what it requires."""

    def costs(self, plan: Plan, num_prompts: int) -> Costs:
        """Old and new policy at each noised sample, and the start weights where they are measured from."""
        return Costs(self._num_times(plan) * num_prompts * plan.group_size, frozen=1 + (self.kl_beta > 0))

    def points(self, batch: Batch) -> Points:
        """Finished samples at some of the schedule's sigmas."""
        return at_schedule_steps(batch, self._num_times(batch.samples.plan))

    def _num_times(self, plan: Plan) -> int:
        """Sigmas that a sample trains on."""
        return max(1, int(self.fraction * (len(plan.sigmas) - 1)))

    def measure(self, point: Noised, evaluator: Evaluator) -> Stats:
        """L(v+), L(v-) and the distance from the start `[R]`; gradient flows through the trained velocity alone."""
        latents, target = forward_process(point.x0, point.seed, point.sigma, point.step)
        given = (latents, point.sigma)
        old = evaluator.frozen("old", *given).velocity
        reference = evaluator.frozen("start", *given).velocity if self.kl_beta else None
        means = implicit_matching(
            evaluator.trained(*given).velocity, target, old, self.beta, reference_velocity=reference
        )
        stats = {
            "positive": x0_error(means.positive, means.positive_abs, point.sigma),
            "negative": x0_error(means.negative, means.negative_abs, point.sigma),
        }
        return stats if means.reference_drift is None else {**stats, "distance/start": means.reference_drift}

    def loss(self, stats: Stats, advantages: Tensor) -> Terms:
        """As of the module's text."""
        good = (advantages / self.most).clamp(-1, 1) / 2 + 0.5
        positive, negative = stats["positive"], stats["negative"]
        loss = self.most / self.beta * (good * positive + (1 - good) * negative)
        kl = torch.zeros_like(loss).detach()
        if self.kl_beta:
            kl = stats["distance/start"]
            loss = loss + self.kl_beta * kl
        shown = {"loss": loss, "positive_loss": positive, "negative_loss": negative, "kl": kl}
        return Terms(loss, {name: value.detach() for name, value in shown.items()}, {})

    def log_ratio(self, stats: Stats) -> None:
        """There are no likelihoods."""
        return None


def x0_error(square: Tensor, absolute: Tensor, sigma: Tensor) -> Tensor:
    """L of the module's text: an x0 prediction's error is -sigma times that of its velocity."""
    return sigma.square() * square / (sigma * absolute).clamp_min(_FLOOR)
