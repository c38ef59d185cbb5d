"""Credit on trees: what an edge is worth is what the leaves behind it are worth.

A(edge into a leaf) = A(leaf)
A(edge)             = sum over the edges that leave its end of share * A; leaves without a score have no share

loss                = mean over nodes of the sum over their children of trust(log ratio of the edge, A(edge))
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from flowgrpo_fast.checks import one_of, require
from flowgrpo_fast.objectives.objective import Requires
from flowgrpo_fast.types import Credit, Scored, Transitions


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeBackup:
    """TreeGRPO's back-up of leaf advantages, `[B] -> [B, K]`, and what an edge counts. arXiv 2512.08153.

    `shares` "uniform": the plain mean over children, as the released code; "probability": weights softmax over the
    children's log-probs under the policy that sampled, the paper's eq. 10 and 11.

    `edges` says what the loss is a mean of. "summed": of nodes, the losses of whose children are summed, as the
    released code; "mean": of nodes, the losses of whose children are averaged, its `loss_agg=mean`; "by_samples": of
    samples and their steps, so that an edge near the root counts for all leaves behind it and every depth weighs the
    same. All nodes have `fan` children, so the first two differ by that factor alone, which only a cut of the
    gradient's norm can see.
    """

    shares: Literal["uniform", "probability"] = "uniform"
    edges: Literal["mean", "summed", "by_samples"] = "mean"
    requires = Requires(log_probs=True, all_steps=True)  # every step of a path

    def __post_init__(self) -> None:
        """Known words."""
        one_of(self, ("uniform", "probability"), shares=self.shares)
        one_of(self, ("mean", "summed", "by_samples"), edges=self.edges)

    def __call__(self, credit: Credit, scored: Scored) -> Credit:
        """Advantages `[B, K]`: at each kept step that of the edge on the sample's way.

        Raises:
            ValueError: the kept steps make no tree, each going on from every edge of the one before.
        """
        steps = scored.samples.transitions
        require(
            all(len(above.row) == below.num_heads for above, below in pairwise(steps))
            and steps[-1].samples.shape == (len(credit.advantages), 1),
            f"TreeBackup needs kept steps that make a tree; rows before and edges after them are "
            f"{[(step.num_heads, len(step.row)) for step in steps]}: use the topology Tree, without Cuts",
        )
        columns, counts = [], []
        value = credit.advantages[steps[-1].samples[:, 0]]  # [E] of the last step
        here = credit.weight[steps[-1].samples[:, 0]] > 0  # whether a leaf behind the edge has a score
        for step in reversed(steps):
            columns.append(over_samples(step, value, len(credit.advantages)))
            counts.append(over_samples(step, credit.weight[step.samples].sum(1), len(credit.advantages)))
            # The rows before a step are the edges after the one above it, in the same order.
            children = here.view(-1, step.fan)
            value = (self._shares(step, children) * value.view(-1, step.fan)).sum(1)
            here = children.any(1)
        advantages = torch.stack(columns[::-1], 1)
        if self.edges == "by_samples":
            return replace(credit, advantages=advantages)
        # The update lets an edge count for the samples behind it that weigh anything; dividing by their number makes
        # each edge count once.
        once = 1 / torch.stack(counts[::-1], 1).clamp_min(1)
        # A trust region's loss is proportional to the advantage: a sum over children is their mean times `fan`.
        return replace(
            credit,
            advantages=advantages * steps[0].fan if self.edges == "summed" else advantages,
            weight=credit.weight[:, None] * once,
        )

    def _shares(self, step: Transitions, here: Tensor) -> Tensor:
        """`[H, fan]` weights of each row's children, which sum to 1; 0 for those behind which no leaf has a score."""
        if self.shares == "uniform":
            return here / here.sum(1, keepdim=True).clamp_min(1)
        log_prob = step.log_prob.view(-1, step.fan)
        return torch.softmax(log_prob.where(here, torch.finfo(log_prob.dtype).min), 1) * here


def over_samples(step: Transitions, value: Tensor, num_samples: int) -> Tensor:
    """Values of edges `[E]` as those of the samples behind them `[B]`; 0 where a sample has no edge there."""
    wide = value[:, None].expand(step.samples.shape).flatten()
    return value.new_zeros(num_samples).index_copy_(0, step.samples.flatten(), wide)
