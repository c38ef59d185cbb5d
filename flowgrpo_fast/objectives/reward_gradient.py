"""Gradients of a differentiable reward, taken through a few steps of a stored walk.

LeapAlign (arXiv 2604.15311): two stored states x_k (noisier) and x_j of a deterministic walk, and two leaps

    xhat_j = x_k - (sigma_k - sigma_j) v(x_k)            x_j' = xhat_j + sg(x_j - xhat_j)
    xhat_0 = x_j' - sigma_j v(alpha x_j' + (1 - alpha) sg(x_j'))
    loss   = relu(threshold - reward(xhat_0 + sg(x_0 - xhat_0))) / (max(tau, |xhat_j - x_j|) + max(tau, |xhat_0 - x_0|))

Values are the walk's own, gradients leap. `|.|` is a mean over elements, `sg` carries no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrpo_fast.checks import positive, require
from flowgrpo_fast.objectives.objective import Costs, Evaluator, Points, Requires, Stats, Terms
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.types import Batch, Transitions


@dataclass(frozen=True, slots=True, eq=False)
class Leaps:
    """Two states of each sample's walk, and its end."""

    earlier: Transitions
    later: Transitions
    x0: Tensor  # [R, *S]
    fan = 1  # one loss a sample
    row = None  # no ratio is taken
    level = None  # the two states are at different sigmas

    @property
    def num_heads(self) -> int:
        """R."""
        return len(self.x0)

    @property
    def rows(self) -> int:
        """As the walk."""
        return self.earlier.rows

    @property
    def samples(self) -> Tensor:
        """`[R, 1]`."""
        return self.earlier.samples

    @property
    def samples_host(self) -> NDArray[np.int64]:
        """`[R, 1]`."""
        return self.earlier.samples_host

    @property
    def owners(self) -> NDArray[np.int64]:
        """`[R]`."""
        return self.earlier.owners

    def heads(self, rows: slice) -> Leaps:
        """Some samples."""
        return Leaps(self.earlier.heads(rows), self.later.heads(rows), self.x0[rows])

    @staticmethod
    def side_by_side(steps: Sequence[Leaps]) -> Leaps:
        """There is one point."""
        (only,) = steps
        return only


@dataclass(frozen=True, slots=True, kw_only=True)
class LeapAlign:
    """See the module's text. `alpha` scales the gradient that runs through the network's input at the later state."""

    alpha: float = 0.3
    threshold: float = 0.55
    tau: float = 0.1
    requires = Requires(states=True, reward_gradient=True)  # two states of each walk
    couples = False  # every sample by itself
    ratio_range = 0.0  # there is no ratio

    def __post_init__(self) -> None:
        """A nested gradient is scaled by 0 to 1."""
        require(0 <= self.alpha <= 1, f"LeapAlign.alpha is {self.alpha}; it must be in [0, 1]")
        positive(self, tau=self.tau)

    def check(self, plan: Plan) -> None:
        """Two states of every sample's own walk."""
        alone = all(len(plan.steps[place].kept_heads) == plan.group_size for place in plan.kept)
        require(
            len(plan.kept) == 2 and alone,
            f"LeapAlign reads two states of every sample; the plan keeps {len(plan.kept)} steps: use "
            "Independent(at=RandomPair())",
        )

    def costs(self, plan: Plan, num_prompts: int) -> Costs:
        """Two leaps of every sample, and the reward of where they end."""
        num_samples = num_prompts * plan.group_size
        return Costs(num_samples, trained=2, rewarded=num_samples)

    def points(self, batch: Batch) -> Points:
        """One: the pair of states that the window kept."""
        states = batch.samples.transitions
        return Points(1, lambda _: Leaps(states[0], states[1], batch.samples.x0))

    def measure(self, point: Leaps, evaluator: Evaluator) -> Stats:
        """The reward `[R]` with gradient, and the two distances' sum `[R]` without."""
        shape = (-1, *[1] * (point.x0.ndim - 1))
        sigma_k, sigma_j = (state.sigma.view(shape) for state in (point.earlier, point.later))
        x_k, x_j = point.earlier.latents, point.later.latents
        leap = x_k - (sigma_k - sigma_j) * evaluator.trained(x_k, point.earlier.sigma).mixed
        landed = leap + (x_j - leap).detach()
        given = self.alpha * landed + (1 - self.alpha) * landed.detach()
        last = landed - sigma_j * evaluator.trained(given, point.later.sigma).mixed
        gaps = [
            (a - b).detach().abs().flatten(1).mean(1).clamp_min(self.tau)
            for a, b in ((leap, x_j), (last, point.x0))
        ]
        return {"reward": evaluator.reward(last + (point.x0 - last).detach()), "gap": gaps[0] + gaps[1]}

    def loss(self, stats: Stats, advantages: Tensor) -> Terms:
        """The hinge on the reward, weighed by how truly the leaps land."""
        loss = torch.relu(self.threshold - stats["reward"]) / stats["gap"]
        shown = {"loss": loss.detach(), "reward_with_gradient": stats["reward"].detach(), "gap": stats["gap"]}
        return Terms(loss, shown, {})

    def log_ratio(self, stats: Stats) -> None:
        """There are no likelihoods."""
        return None
