"""AWM and its kin: a pseudo log-probability from the error on the forward process. arXiv 2509.25050.

A finished sample is noised again at several sigmas; how well the velocity there is predicted stands in for how likely
the sample is:

    error    = mean((v - (noise - x0))^2)
    log_prob = -w(error, sigma)

    "uniform"  error              "sigma"   sigma * error                "sigma2"  sigma^2 * error
    "huber"    sigma * (sqrt(error + 1e-10) - 1e-5)
    "ghuber"   sigma / power * ((error + 1e-10)^power - 1e-10^power)       in fp64

The error is a mean over elements before it is weighed. `ratio` says what an importance ratio is taken of:

    "exp_first"  every noising has its own, exp(log_prob - old_log_prob); the loss is a mean over them (AWM's recipes)
    "sum_first"  a sample has one, exp(mean over its noisings of log_prob - old_log_prob)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrpo_fast.checks import fraction, one_of, positive, require
from flowgrpo_fast.objectives.forward import forward_process, noised_points
from flowgrpo_fast.objectives.objective import Costs, Evaluator, Points, Requires, Stats
from flowgrpo_fast.objectives.snapshots import Ramp, SnapshotRule
from flowgrpo_fast.ops import matching
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.types import Batch, Noised

_FLOOR = 1e-10
_LEAST_SIGMA = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardError:
    """A surrogate that needs no stochastic trajectory: any solver may have made the samples.

    Each sample is noised `times` times, once in each of as many equal parts (strata) of what `sigmas` names:
    "schedule", the rollout's own sigmas without the first `skip`, up to `fraction` of the steps; "logit_normal", a
    logit-normal (0, 1) distribution, shifted as schedules are, `shift * s / (1 + (shift - 1) * s)`, at least 0.01.

    `old` "detached": the policy that sampled is the present one, on-policy, so the old log-prob is the new one without
    its gradient; "snapshot": the weights before this step's first update, kept and asked again.
    """

    weighting: Literal["uniform", "sigma", "sigma2", "huber", "ghuber"] = "ghuber"
    power: float = 0.25  # of "ghuber"
    times: int = 6
    sigmas: Literal["schedule", "logit_normal"] = "schedule"
    skip: int = 1  # of "schedule"
    fraction: float = 0.9  # of "schedule"
    shift: float = 3.0  # of "logit_normal"
    ratio: Literal["exp_first", "sum_first"] = "exp_first"
    old: Literal["detached", "snapshot"] = "detached"

    def __post_init__(self) -> None:
        """Known words, positive counts."""
        one_of(self, ("uniform", "sigma", "sigma2", "huber", "ghuber"), weighting=self.weighting)
        one_of(self, ("schedule", "logit_normal"), sigmas=self.sigmas)
        one_of(self, ("exp_first", "sum_first"), ratio=self.ratio)
        one_of(self, ("detached", "snapshot"), old=self.old)
        positive(self, times=self.times, shift=self.shift)
        fraction(self, power=self.power, fraction=self.fraction)
        require(self.skip >= 0, f"ForwardError.skip is {self.skip}; it must be at least 0")

    @property
    def requires(self) -> Requires:
        """Finished samples; the old weights where they are asked again."""
        rules: dict[str, SnapshotRule] = {"before": Ramp(most=0.0)} if self.old == "snapshot" else {}
        return Requires(snapshots=rules)

    @property
    def couples(self) -> bool:
        """Whether a sample's noisings share a ratio."""
        return self.ratio == "sum_first"

    def costs(self, plan: Plan, num_prompts: int) -> Costs:
        """The old weights are asked again where they are a snapshot."""
        return Costs(self.times * num_prompts * plan.group_size, frozen=int(self.old == "snapshot"))

    def points(self, batch: Batch) -> Points:
        """One a time; every sample at each."""
        drawn = batch.choices.uniform(self.times)  # [B, times]
        if self.sigmas == "schedule":
            schedule = batch.samples.plan.sigmas
            sigma = schedule[torch.from_numpy(self.schedule_steps(drawn, len(schedule) - 1))]
        else:
            strata = torch.from_numpy((np.arange(self.times) + drawn) / self.times)
            plain = torch.sigmoid(torch.special.ndtri(strata))
            sigma = (self.shift * plain / (1 + (self.shift - 1) * plain)).clamp(min=_LEAST_SIGMA)
        turns = np.tile(np.arange(self.times), (len(batch), 1))
        return noised_points(batch, self.times, lambda turn: (sigma[:, turn], turns[:, turn]))

    def schedule_steps(self, drawn: NDArray[np.float64], num_steps: int) -> NDArray[np.int64]:
        """A step of each stratum `[B, times]`, by numbers `drawn` in [0, 1).

        Raises:
            ValueError: there are more strata than steps.
        """
        end = int(self.fraction * num_steps)
        require(
            self.times <= end - self.skip,
            f"ForwardError.times is {self.times}, but {num_steps} steps leave {max(0, end - self.skip)} to draw from "
            f"(without the first {self.skip}, up to {self.fraction:g} of them): lower times, or take more steps",
        )
        bounds = np.linspace(self.skip, end, self.times + 1).astype(np.int64)
        return bounds[:-1] + (drawn * np.diff(bounds)).astype(np.int64)

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
