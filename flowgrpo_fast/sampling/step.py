"""One step of a walk: velocities in micro-batches, then the transition of all rows. Nothing here asks the device.

A plan becomes asks: rows of one step whose velocity is asked for together, since they share how many children each
has and whether their edges are trained. Trained rows go through the network apart from the others, in forwards of a
size that the update can repeat: the same shapes give the same bits, so the first importance ratio is exactly 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrpo_fast.ops import FlowStepOutput, Guidance, flow_step
from flowgrpo_fast.sampling.policy import Policy
from flowgrpo_fast.schedule.plan import IDLE, Index, Plan
from flowgrpo_fast.types import Conditioning, Predicted, spread, spread_guidance


@dataclass(frozen=True, slots=True)
class Forwards:
    """How many rows go through the network at once, in rollout and update alike."""

    rows: int  # of samples that are rows of their own
    prompts: int = 1  # optimiser steps and chunks are whole multiples of so many prompts

    def rows_at(self, heads_per_prompt: int | None, num_members: int, trained: bool) -> int:
        """Rows of a forward at a step with so many rows a prompt, None where prompts differ.

        Where members share rows that are trained, a forward takes whole prompts, as many as fit into `rows` and
        divide `prompts`: a forward of the update then has the same rows. Where prompts differ, it takes a part of one.
        """
        if not trained or heads_per_prompt == num_members:
            return self.rows
        if heads_per_prompt is None:
            return gcd(self.rows, num_members)
        most = max(1, min(self.rows // heads_per_prompt, self.prompts))
        return heads_per_prompt * next(n for n in range(most, 0, -1) if self.prompts % n == 0)


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """Rows of a step that are alike. Index tensors are on the device; None stands for all, in order."""

    num_heads: int
    fan: int  # children of each
    rows: int  # of a forward
    trained: bool  # whether their edges are kept
    row: int | Tensor  # of the table: one for all edges, or [num_heads * fan]
    head_index: Tensor | None  # [num_heads] rows of the walk
    edge_index: Tensor | None  # [num_heads * fan] rows of the walk after the step
    first_samples: Index  # [num_heads] host: the first sample behind each
    seed_index: Tensor | None  # [num_heads * fan] the first sample behind each edge
    kept_fan: int  # kept children of each
    kept_index: Tensor | None  # [num_heads * kept_fan] among the edges
    offsets: Index  # [P+1] host: of the heads, by prompt
    uniform: bool  # one row for all


@dataclass(frozen=True, slots=True, eq=False)
class StepLayout:
    """One step of a plan for a number of prompts."""

    asks: tuple[Ask, ...]
    num_rows: int  # of the walk after it
    idle: tuple[Tensor, Tensor] | None  # rows after it that are rows before it: (before, after)
    samples: Index | None  # [kept edges, m] host: the samples behind each


def lay_out(plan: Plan, num_prompts: int, forwards: Forwards, device: torch.device) -> list[StepLayout]:
    """What a walk over a plan reads at each step, uploaded at once."""
    members, behind, width = plan.candidates(), plan.behind(), plan.width
    layouts = []
    for step, leaves, size in zip(plan.steps, behind, members, strict=True):
        num_children = len(step.parent)
        shape = (num_prompts, num_children)
        row, kept = np.broadcast_to(step.row, shape), np.broadcast_to(step.kept, shape)
        head = (np.arange(num_prompts)[:, None] * width + step.parent).ravel()
        moves = (row != IDLE).ravel()
        fan = np.bincount(head[moves], minlength=num_prompts * width)
        trained = np.bincount(head, weights=kept.ravel(), minlength=num_prompts * width) > 0
        first = np.array([leaf[0] for leaf in leaves])
        first_of_edge = (np.arange(num_prompts)[:, None] * size + first).ravel()
        asks, samples = [], None
        for is_trained in (True, False):
            for count in np.unique(fan[(trained == is_trained) & (fan > 0)]):
                asked = (trained == is_trained) & (fan == count)
                heads = np.flatnonzero(asked)
                edges = np.flatnonzero(moves & asked[head])
                edges = edges[np.argsort(head[edges], kind="stable")]
                kept_edges = np.flatnonzero(kept.ravel()[edges])
                counts = asked.reshape(num_prompts, width).sum(axis=1)
                rows = row.ravel()[edges]
                one = bool((rows == rows[0]).all())
                if is_trained:
                    m = len(leaves[int(edges[kept_edges[0]]) % num_children])
                    samples = _samples(leaves, edges[kept_edges], num_children, size, m)
                asks.append(
                    Ask(
                        num_heads=len(heads),
                        fan=int(count),
                        rows=forwards.rows_at(
                            int(counts[0]) if (counts == counts[0]).all() else None, size, is_trained
                        ),
                        trained=is_trained,
                        row=int(rows[0]) if one else _upload(rows, device),
                        head_index=_unless_all(heads, num_prompts * width, device),
                        edge_index=_unless_all(edges, num_prompts * num_children, device),
                        first_samples=first_of_edge[edges[:: int(count)]],
                        seed_index=_unless_all(first_of_edge[edges], num_prompts * size, device),
                        kept_fan=len(kept_edges) // len(heads),
                        kept_index=_unless_all(kept_edges, len(edges), device),
                        offsets=np.concatenate([[0], np.cumsum(counts)]),
                        uniform=one,
                    )
                )
        assert sum(ask.trained for ask in asks) <= 1, "the kept rows of a step have equally many children"
        still = np.flatnonzero(~moves)
        idle = (_upload(head[still], device), _upload(still, device)) if len(still) else None
        layouts.append(StepLayout(tuple(asks), num_prompts * num_children, idle, samples))
        width = step.cut.size if step.cut else num_children
    return layouts


def _samples(
    leaves: tuple[tuple[int, ...], ...], edges: Index, num_children: int, size: int, num_behind: int
) -> Index:
    """`[edges, num_behind]`: the samples behind edges that are numbered over all prompts."""
    table = np.array([leaf if len(leaf) == num_behind else (0,) * num_behind for leaf in leaves])
    return table[edges % num_children] + (edges // num_children * size)[:, None]


def _upload(values: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device, non_blocking=True)


def _unless_all(index: Index, size: int, device: torch.device) -> Tensor | None:
    """None where an index takes all there is, in order."""
    return None if np.array_equal(index, np.arange(size)) else _upload(index, device)


@dataclass(frozen=True, slots=True)
class StepInput:
    """N rows before a step, and what their `N * fan` children take."""

    latents: Tensor  # [N, *S]
    conditioning: Conditioning  # [N, ...]
    seed: Tensor  # [N * fan] int64
    row: int | Tensor  # of the table: one for all, or [N * fan] int64
    x0_pred: Tensor | None = None  # [N, *S] fp32


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a step has to read and to give, besides next latents and log-probs."""

    fan: int
    rows: int  # of a forward
    reads_x0: bool = False  # the x0 predictions of the step before
    gives_x0: bool = False
    gives_velocity: bool = False
    gives_unconditional: bool = False


@dataclass(frozen=True, slots=True)
class StepResult:
    """`N * fan` children after a step of N rows."""

    out: FlowStepOutput
    velocity: Tensor | None = None  # [N * fan, *S] where wanted
    guidance: Guidance | None = None  # [N * fan, *S] where a cut wants it
    unconditional: Tensor | None = None  # [N, *S] where the update will read it


def row_slices(num_rows: int, rows: int) -> Iterator[slice]:
    """Consecutive micro-batches of `rows`. Rollout and replay use the same ones: same shapes, same bits."""
    for first in range(0, num_rows, rows):
        yield slice(first, min(first + rows, num_rows))


def take_step(policy: Policy, given: StepInput, coeffs: Tensor, wanted: Wanted) -> StepResult:
    """One step of N rows: one velocity each, `wanted.fan` children each.

    Args:
        coeffs: `[N, 8]`, the table on the device.
    """
    fan, row = wanted.fan, given.row
    # Children of one row start from one sigma, whatever rows of the table they take.
    sigma = coeffs[row, 0] if isinstance(row, int) else coeffs[:, 0].index_select(0, row[::fan])
    parts = [
        policy.predict(
            given.latents[rows],
            sigma if sigma.ndim == 0 else sigma[rows],
            given.conditioning.rows(rows),
        )
        for rows in row_slices(len(given.latents), wanted.rows)
    ]
    predicted = parts[0] if len(parts) == 1 else _joined(parts, policy.guidance_scale)
    velocity, guidance = spread(predicted.velocity, fan), spread_guidance(predicted.guidance, fan)
    x0_prev = given.x0_pred if wanted.reads_x0 else None
    out = flow_step(
        spread(given.latents, fan),
        velocity,
        coeffs,
        row,
        given.seed,
        guidance=guidance,
        x0_prev=None if x0_prev is None else spread(x0_prev, fan),
        return_x0_pred=wanted.gives_x0,
    )
    halves = predicted.guidance if wanted.gives_unconditional else None
    return StepResult(
        out,
        velocity if wanted.gives_velocity else None,
        guidance if wanted.gives_velocity else None,
        None if halves is None else halves.negative_velocity,
    )


def _joined(parts: list[Predicted], scale: float) -> Predicted:
    velocity = torch.cat([part.velocity for part in parts])
    negative = [part.guidance.negative_velocity for part in parts if part.guidance is not None]
    return Predicted(velocity, Guidance(torch.cat(negative), scale) if negative else None)
