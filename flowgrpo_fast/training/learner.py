"""A learner: trained weights, their optimiser, the objective, and the snapshots that follow by rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrpo_fast.objectives.objective import Objective, Point
from flowgrpo_fast.objectives.snapshots import Moment, SnapshotRule
from flowgrpo_fast.ops import Guidance
from flowgrpo_fast.sampling.policy import Policy
from flowgrpo_fast.training.snapshots import Snapshot, View
from flowgrpo_fast.types import Batch, Conditioning, Partition, Predicted, PromptSet

# Rewards `[R]` with gradient, of finished latents `[R, *S]` and what was asked of each.
RewardGradient = Callable[[Tensor, PromptSet], Tensor]


@dataclass(slots=True)
class Counts:
    """Rows that went through the network, each half of guidance one, and rows that went back through it."""

    evaluations: int = 0
    backwards: int = 0


@dataclass(slots=True)
class Learner:
    """What one optimiser trains. A fake score or a discriminator is a second learner."""

    policy: Policy
    objective: Objective
    optimizer: torch.optim.Optimizer  # a fused one, which steps or not as the device says
    max_grad_norm: float
    updates_per_step: int  # optimiser steps an epoch over the batch, each on its own share of the samples
    rows: int  # samples of a forward
    snapshots: dict[str, View] = field(default_factory=dict)
    rules: dict[str, SnapshotRule] = field(default_factory=dict)
    replay_rows: int = 0  # samples of a forward of the update; 0 = as in the rollout
    steps_per_forward: int = 1  # trained steps of a sample that one forward takes
    reward_gradient: RewardGradient | None = None
    partition: Partition = "groups"
    epochs: int = 1  # over the batch of a training step
    num_updates: int = 0  # finished optimiser steps

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Those with gradient, in the module's order: the optimiser holds them, and no tree of modules is walked."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def shares(self, batch: Batch) -> list[slice | NDArray[np.int64]]:
        """The samples of each optimiser step of a training step, as of `Batch.shares`."""
        return [
            share
            for epoch in range(self.epochs)
            for share in batch.shares(self.updates_per_step, self.partition, epoch)
        ]

    def rows_at(self, point: Point) -> int:
        """Rows of a point that one forward takes: the rollout's own, so that the first ratio is exactly 1."""
        return (
            max(1, self.replay_rows * point.rows // self.rows)
            if self.replay_rows and point.rows
            else point.rows or self.rows
        )

    def step(self) -> Tensor:
        """Clips the gradient, steps, and lets the snapshots follow; returns the gradient's norm before the clip.

        Where the norm is not finite no weight and no moment changes: the optimiser learns it on the device, so nothing
        waits. A step none of whose samples has a gradient is one with a gradient of 0, which its moments move.
        """
        if all(parameter.grad is None for parameter in self.parameters):
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.num_updates += 1  # first: from here on the weights may have moved
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.follow(Moment(step=0, num_updates=self.num_updates, ends_step=False, metrics={}))
        return norm

    def follow(self, moment: Moment) -> None:
        """Moves each snapshot as far as its rule says."""
        for name, rule in self.rules.items():
            kept, snapshot = rule.keep(moment), self.snapshots[name]
            if kept is not None:
                assert isinstance(snapshot, Snapshot)
                snapshot.average(kept)


@dataclass(slots=True)
class Networks:
    """The `Evaluator` of a batch: the learner's networks, with the conditioning of the rows of one point at a time."""

    learner: Learner
    batch: Batch
    coeffs: Tensor
    interval: Tensor
    counts: Counts
    _conditioning: Conditioning | None = None
    _level: Tensor | None = None
    _samples: Any = None  # [H] host: the first sample behind each row

    def at(self, point: Point) -> Networks:
        """Bound to the rows of a point."""
        self._samples = point.owners
        first, last = int(self._samples[0]), int(self._samples[-1])
        neighbours = last - first + 1 == len(self._samples) and bool(
            (self._samples[1:] > self._samples[:-1]).all()
        )
        if neighbours:
            self._conditioning = self.batch.conditioning.rows(slice(first, last + 1))
        else:
            index = torch.from_numpy(np.ascontiguousarray(self._samples))
            index = index.to(point.samples.device, non_blocking=True)
            self._conditioning = self.batch.conditioning.rows(index)
        self._level = point.level
        return self

    def trained(self, latents: Tensor, sigma: Tensor, unconditional: Tensor | None = None) -> Predicted:
        """As of `Evaluator`."""
        policy = self.learner.policy
        self.counts.evaluations += len(latents) * (policy.halves - (unconditional is not None))
        with_gradient = policy.halves if policy.unconditional_gradient else 1
        self.counts.backwards += len(latents) * with_gradient * torch.is_grad_enabled()
        assert self._conditioning is not None
        return policy.at(self._level).predict(latents, sigma, self._conditioning, unconditional)

    def frozen(self, name: str, latents: Tensor, sigma: Tensor) -> Predicted:
        """As of `Evaluator`."""
        policy = self.learner.policy.of(self.learner.snapshots[name])
        self.counts.evaluations += len(latents) * policy.halves
        assert self._conditioning is not None
        with torch.no_grad():
            return policy.at(self._level).predict(latents, sigma, self._conditioning)

    def routed(self, names: Sequence[str], latents: Tensor, sigma: Tensor) -> Predicted:
        """As of `Evaluator`; rows of one snapshot go through the network together."""
        policy, conditioning = self.learner.policy, self._conditioning
        assert conditioning is not None
        self.counts.evaluations += len(latents) * policy.halves
        velocity, negative = torch.empty_like(latents), torch.empty_like(latents)
        for name in dict.fromkeys(names):
            places = [place for place, own in enumerate(names) if own == name]
            index = torch.tensor(places).to(latents.device, non_blocking=True)
            with torch.no_grad():
                part = (
                    policy.of(self.learner.snapshots[name])
                    .at(self._level)
                    .predict(latents[index], sigma[index], conditioning.rows(index))
                )
            velocity[index] = part.velocity.to(velocity.dtype)
            if part.guidance is not None:
                negative[index] = part.guidance.negative_velocity.to(negative.dtype)
        guided = policy.halves == 2 and not policy.model.mixes_guidance
        return Predicted(velocity, Guidance(negative, policy.guidance_scale) if guided else None)

    def pull_back(
        self, name: str, latents: Tensor, sigma: Tensor, cotangent: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As of `Evaluator`; forward and backward run inside one swap of weights, which a recompute must see, too."""
        snapshot, policy = self.learner.snapshots[name], self.learner.policy
        self.counts.evaluations += len(latents) * policy.halves
        self.counts.backwards += len(latents) * (policy.halves if policy.unconditional_gradient else 1)
        assert self._conditioning is not None
        with torch.enable_grad(), snapshot.changed():
            moving = latents.detach().requires_grad_()
            velocity = policy.at(self._level).predict(moving, sigma, self._conditioning).mixed
            (gradient,) = torch.autograd.grad(velocity, moving, cotangent)
        return velocity.detach(), gradient

    @property
    def metadata(self) -> list[dict[str, Any]]:
        """What is known of the prompt of each row."""
        return [self.batch.prompts.metadata[int(sample)] for sample in self._samples]

    def reward(self, x0: Tensor) -> Tensor:
        """As of `Evaluator`."""
        assert self.learner.reward_gradient is not None
        prompts, places = self.batch.prompts, [int(sample) for sample in self._samples]
        asked = PromptSet(
            tuple(prompts.prompts[i] for i in places),
            tuple(prompts.metadata[i] for i in places),
            tuple(prompts.images[i] for i in places) if prompts.images else (),
        )
        return self.learner.reward_gradient(x0, asked)


def networks(learner: Learner, batch: Batch, counts: Counts) -> Networks:
    """The evaluator of a batch."""
    interval = batch.samples.plan.interval.to(batch.samples.coeffs.device, non_blocking=True)
    return Networks(learner, batch, batch.samples.coeffs, interval, counts)
