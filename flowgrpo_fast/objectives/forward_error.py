"""AWM and its kin: a pseudo log-probability from the error on the forward process. arXiv 2509.25050.

A finished sample is noised again at several sigmas; how well the velocity there is predicted stands in for how likely
the sample is:

    error    = mean((v - (noise - x0))^2)
    log_prob = -w(error, sigma)

    "uniform"  error              "sigma"   sigma * error                "sigma2"  sigma^2 * error
    "huber"    sigma * (sqrt(error + 1e-10) - 1e-5)
    "ghuber"   sigma / power * ((error + 1e-10)^power - 1e-10^power)       in fp64
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flowgrpo_fast.checks import fraction, one_of, positive, require
from flowgrpo_fast.objectives.forward import at_schedule_steps, forward_process, noised_points
from flowgrpo_fast.objectives.objective import Evaluator, Points, Requires, Stats
from flowgrpo_fast.objectives.snapshots import Ramp, SnapshotRule
from flowgrpo_fast.ops import matching
from flowgrpo_fast.types import Batch, Noised

_FLOOR = 1e-10


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardError:
    """A surrogate that needs no stochastic trajectory: any solver may have made the samples.

    `sigmas` "logit_normal": `times` sigmas a sample, one from each of as many equal parts of a logit-normal (0, 1)
    distribution; "schedule": of the rollout's own, drawn without repetition. `old` "detached": the policy that sampled
    is the present one, on-policy, so the old log-prob is the new one without its gradient; "snapshot": the weights
    before this step's first update, kept and asked again.
    """

    weighting: Literal["uniform", "sigma", "sigma2", "huber", "ghuber"] = "ghuber"
    power: float = 0.25  # of "ghuber"
    times: int = 6
    sigmas: Literal["logit_normal", "schedule"] = "logit_normal"
    old: Literal["detached", "snapshot"] = "detached"

    def __post_init__(self) -> None:
        """Known words, positive counts."""
        one_of(self, ("uniform", "sigma", "sigma2", "huber", "ghuber"), weighting=self.weighting)
        one_of(self, ("logit_normal", "schedule"), sigmas=self.sigmas)
        one_of(self, ("detached", "snapshot"), old=self.old)
        positive(self, times=self.times)
        fraction(self, power=self.power)

    @property
    def requires(self) -> Requires:
        """Finished samples; the old weights where they are asked again."""
        rules: dict[str, SnapshotRule] = {"before": Ramp(most=0.0)} if self.old == "snapshot" else {}
        return Requires(snapshots=rules)

    def points(self, batch: Batch) -> Points:
        """One a time; every sample at each."""
        if self.sigmas == "schedule":
            num_steps = len(batch.samples.plan.sigmas) - 1
            require(
                self.times <= num_steps,
                f"ForwardError.times is {self.times}, but the schedule has {num_steps} steps to draw from",
            )
            return at_schedule_steps(batch, self.times)
        drawn = batch.choices.uniform(self.times)  # [B, times]
        strata = (np.arange(self.times) + drawn) / self.times
        sigma = torch.sigmoid(torch.special.ndtri(torch.from_numpy(strata))).float()
        steps = np.tile(np.arange(self.times), (len(batch), 1))
        return noised_points(batch, self.times, lambda turn: (sigma[:, turn], steps[:, turn]))

    def measure(self, point: Noised, evaluator: Evaluator, references: Sequence[str]) -> Stats:
        """As of `Surrogate`; gradient flows through the trained velocity."""
        latents, target = forward_process(point.x0, point.seed, point.sigma, point.step)
        given = (latents, point.sigma)
        velocity = evaluator.trained(*given).mixed
        old = evaluator.frozen("before", *given).mixed if self.old == "snapshot" else None
        others = [evaluator.frozen(name, *given).mixed for name in references]
        first = others[0] if others else None
        means = matching(velocity, target, old_velocity=old, reference_velocity=first)
        log_prob = -self.weigh(means.error, point.sigma)
        stats = {"log_prob": log_prob, "old_log_prob": log_prob.detach()}
        if means.old_error is not None:
            stats["old_log_prob"] = -self.weigh(means.old_error, point.sigma)
        for name, other in zip(references, others, strict=True):
            drift = means.reference_drift if other is first else None
            if drift is None:  # the kernel takes one reference a call
                drift = matching(velocity, target, reference_velocity=other).reference_drift
            assert drift is not None
            stats[f"distance/{name}"] = drift
        return stats

    def weigh(self, error: Tensor, sigma: Tensor) -> Tensor:
        """`w` of the module's text, `[R]`."""
        if self.weighting == "uniform":
            return error
        if self.weighting == "sigma":
            return sigma * error
        if self.weighting == "sigma2":
            return sigma.square() * error
        if self.weighting == "huber":
            return sigma * (torch.sqrt(error + _FLOOR) - _FLOOR**0.5)
        wide = error.double()  # the difference of two small powers
        return (sigma.double() / self.power * ((wide + _FLOOR) ** self.power - _FLOOR**self.power)).to(
            error.dtype
        )
