"""GCPO: one ratio for a chunk of consecutive steps. arXiv 2510.21583.

    ratio_j = exp(mean over the chunk's steps of log_prob - old_log_prob)
    loss    = mean over chunks of trust(log ratio_j, A)

Chunks of one step are Flow-GRPO; one chunk of all steps is a ratio of whole trajectories (GSPO).

How fast a trajectory changes, `L1rel(k) = |x_{k+1} - x_k|_1 / |x_{k+1}|_1`, is nearly the same for every prompt. The
paper cuts chunks by it (`adaptive_sizes`), and may train a part of them, drawn by its mean over a chunk
(`ChunkRatio.fraction`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrpo_fast.checks import fraction, require
from flowgrpo_fast.objectives.objective import Costs, Evaluator, Points, Requires, Stats, Terms
from flowgrpo_fast.objectives.policy_gradient import PolicyGradient
from flowgrpo_fast.objectives.trust import Trusted
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.schedule.sigmas import Array
from flowgrpo_fast.types import Batch, Transitions


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRatio(PolicyGradient):
    """A policy gradient over chunks of a sample's trained steps, in their order."""

    sizes: tuple[int, ...] = (2, 3, 4, 7)
    # Of the chunks, how many an optimiser step trains on, drawn anew for each training step; steps of others ask no
    # network. The paper's weighted sampling takes 0.5.
    fraction: float = 1.0
    couples = True  # the steps of a chunk

    def __post_init__(self) -> None:
        """A chunk has a step."""
        require(
            len(self.sizes) > 0 and all(size > 0 for size in self.sizes),
            f"ChunkRatio.sizes is {self.sizes}; name at least one chunk, of at least one step each",
        )
        fraction(self, fraction=self.fraction)

    @property
    def requires(self) -> Requires:
        """All stochastic steps of a sample: a chunk with a hole has no ratio."""
        return replace(PolicyGradient.requires.fget(self), all_steps=True)  # type: ignore[attr-defined]

    @property
    def num_taken(self) -> int:
        """Chunks that an optimiser step trains on."""
        return max(1, round(self.fraction * len(self.sizes)))

    def check(self, plan: Plan) -> None:
        """As of the policy gradient; the chunks must cover the trained steps."""
        PolicyGradient.check(self, plan)
        require(
            sum(self.sizes) == len(plan.kept) == plan.num_trained,
            f"ChunkRatio.sizes is {self.sizes}, {sum(self.sizes)} steps in all; a sample trains on {plan.num_trained}: "
            "name sizes that add up to them",
        )

    def costs(self, plan: Plan, num_prompts: int) -> Costs:
        """As of the policy gradient; of chunks that are drawn, what the longest cost."""
        own = PolicyGradient.costs(self, plan, num_prompts)
        if self.num_taken == len(self.sizes):
            return own
        ends = np.cumsum(self.sizes)[:-1]
        rows = sorted(int(chunk.sum()) for chunk in np.split(np.array(plan.trained_rows(num_prompts)), ends))
        return own._replace(rows=sum(rows[-self.num_taken :]))

    def points(self, batch: Batch) -> Points:
        """The kept steps, of all chunks or of those that are drawn. Drawing waits for the device, once."""
        steps = batch.samples.transitions
        if self.num_taken == len(self.sizes):
            return PolicyGradient.points(self, batch)
        weights = chunk_weights(relative_change(steps), self.sizes)
        taken = batch.choices.weighted(weights, self.num_taken)
        chunks = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes)).tolist()
        own = [
            InChunk.of(step, torch.full_like(step.log_prob, chunk))
            for step, chunk in zip(steps, chunks, strict=True)
            if chunk in taken
        ]
        return Points(len(own), own.__getitem__)

    def measure(self, point: Any, evaluator: Evaluator) -> Stats:
        """As of the policy gradient; where chunks are drawn, the number of each edge's as well."""
        if self.num_taken == len(self.sizes):
            return PolicyGradient.measure(self, point, evaluator)
        return {**PolicyGradient.measure(self, point.step, evaluator), "chunk": point.chunk}

    def loss(self, stats: Stats, advantages: Tensor) -> Terms:
        """The loss of each sample, of tables `[B, N]`."""
        require(
            advantages.ndim == 1,
            "ChunkRatio has one ratio for several steps, and the credit an advantage for each; leave out the credit "
            "step that makes them, or train with PolicyGradient",
        )
        log_ratio = self.log_ratio(stats)
        if self.num_taken == len(self.sizes):
            chunks = [self.trust(chunk.mean(1), advantages) for chunk in log_ratio.split(self.sizes, dim=1)]
        else:
            # Samples that teach nothing were not measured; their numbers are 0, which is no chunk's above the others'.
            member = stats["chunk"].amax(0)[:, None] == torch.arange(len(self.sizes), device=log_ratio.device)
            member = member.to(log_ratio.dtype)  # [N, chunks]
            means = log_ratio @ (member / member.sum(0).clamp_min(1))
            here = member.amax(0).argsort(descending=True, stable=True)[: self.num_taken]
            chunks = [self.trust(mean, advantages) for mean in means[:, here].unbind(1)]
        policy = torch.stack([chunk.loss for chunk in chunks]).mean(0)
        ratio = torch.stack([chunk.ratio for chunk in chunks], 1)
        clipped = torch.stack([chunk.clipped for chunk in chunks], 1)
        trusted = Trusted(policy, ratio.mean(1), clipped.mean(1))
        return PolicyGradient.with_penalties(self, trusted, stats, ratio_max=ratio.amax(1))


@dataclass(frozen=True, slots=True, eq=False)
class InChunk:
    """A kept step whose chunk was drawn: a `Point` of its transitions, and the chunk's number for each edge."""

    step: Transitions
    chunk: Tensor  # [E], of a float's type, as all statistics are
    fan: int
    rows: int
    row: Tensor
    samples: Tensor
    samples_host: NDArray[np.int64]
    level: Tensor | None
    num_heads: int

    @staticmethod
    def of(step: Transitions, chunk: Tensor) -> InChunk:
        """Some edges of a step."""
        behind = (step.samples, step.samples_host)
        return InChunk(step, chunk, step.fan, step.rows, step.row, *behind, step.level, step.num_heads)

    def heads(self, rows: slice) -> InChunk:
        """As of `Transitions`."""
        return InChunk.of(self.step.heads(rows), self.chunk[self.step.edges(rows)])

    def filled(self, num_rows: int) -> InChunk:
        """As of `Transitions`."""
        step = self.step.filled(num_rows)
        return InChunk.of(step, self.chunk[:1].expand(len(step.row)))

    @property
    def owners(self) -> NDArray[np.int64]:
        """As of `Transitions`."""
        return self.step.owners

    @staticmethod
    def side_by_side(steps: Sequence[InChunk]) -> InChunk:
        """As of `Transitions`."""
        joined = Transitions.side_by_side([one.step for one in steps])
        return InChunk.of(joined, torch.cat([one.chunk for one in steps]))


def relative_change(steps: Sequence[Transitions]) -> list[float]:
    """L1rel of each kept step, the mean over its edges: how much of where it leads a step has moved. Waits once."""
    changes = []
    for own in steps:
        step = own.heads(slice(0, own.num_heads))  # of an optimiser step's samples, gathered
        moved = (step.next_latents.double() - step.spread(step.latents).double()).abs().flatten(1).sum(1)
        changes.append((moved / step.next_latents.double().abs().flatten(1).sum(1)).mean())
    return torch.stack(changes).tolist()


def chunk_weights(change: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """Of each chunk, the mean of its steps' L1rel as a share of all chunks': what chunks are drawn by."""
    means = [float(chunk.mean()) for chunk in np.split(np.asarray(change), np.cumsum(sizes)[:-1])]
    return [mean / sum(means) for mean in means]


def adaptive_sizes(change: Sequence[float], largest: int = 4) -> tuple[int, ...]:
    """Sizes of chunks, cut where L1rel turns: for `ChunkRatio.sizes`, of a few prompts' mean `relative_change`.

    A chunk of more than `largest` steps is cut after each step at which the first difference changes sign, or in the
    middle where none does; what is still too long is cut by the next higher difference. INFERRED: `largest`, and that
    the step of a turn goes to the chunk before it.
    """

    def cut(values: Array, order: int) -> list[int]:
        if len(values) <= largest:
            return [len(values)]
        signs = np.sign(np.diff(values, order))
        turns = (
            np.flatnonzero(signs[1:] * signs[:-1] < 0) + 1
        )  # in steps: where two differences of opposite sign meet
        # A difference of order n spans n + 1 steps: its centre is what it says something of.
        ends = sorted({int(turn + (order + 1) // 2) for turn in turns}) or [len(values) // 2]
        return [size for piece in np.split(values, ends) for size in cut(piece, order + 1)]

    return tuple(cut(np.asarray(change, dtype=np.float64), 1))
