"""One step of a walk: velocities in micro-batches, then the transition of all rows. Nothing here asks the device.

A plan becomes asks: rows of one step whose velocity is asked for together, since they share how many children each
has and whether their edges are trained. Trained rows go through the network apart from the others, in forwards of a
size that the update can repeat: the same shapes give the same bits, so the first importance ratio is exactly 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgrpo_fast.ops import FlowStepOutput, Guidance, flow_step
from flowgrpo_fast.sampling.policy import Policy
from flowgrpo_fast.schedule.plan import IDLE, Index, Plan, StepPlan
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
    row: int  # of the table, which all edges take
    row_index: Tensor | None  # [num_heads * fan] where edges take others each
    level: (
        Tensor | None
    )  # host, 0-d: the sigma of all rows, which an expert is picked by; None where they differ
    noisy: bool  # whether children of one row differ
    head_index: Tensor | None  # [num_heads] rows of the walk
    edge_index: Tensor | None  # [num_heads * fan] rows of the walk after the step
    sample_index: Tensor | None  # [num_heads] the first sample behind each, whose conditioning it reads
    seed_index: Tensor | None  # [num_heads * fan] the first sample behind each edge, whose noise it takes
    kept_fan: int  # kept children of each
    kept_index: Tensor | None  # [num_heads * kept_fan] among the edges
    kept_row: (
        Tensor | None
    )  # [num_heads * kept_fan] rows of the table; None where no edge is kept, as the next two
    samples: Tensor | None  # [num_heads * kept_fan, m] those behind each kept edge
    samples_host: Index | None
    offsets: Index  # [P+1] host: of the heads, by prompt


@dataclass(frozen=True, slots=True, eq=False)
class StepLayout:
    """One step of a plan for a number of prompts."""

    asks: tuple[Ask, ...]
    num_rows: int  # of the walk after it
    idle: tuple[Tensor, Tensor] | None  # rows after it that are rows before it: (before, after)


def lay_out(plan: Plan, num_prompts: int, forwards: Forwards, device: torch.device) -> list[StepLayout]:
    """What a walk over a plan reads at each step, uploaded at once."""
    drafts, uploads, width = [], _Uploads(), plan.width
    last: tuple[Any, ...] = ()
    for step, leaves, size in zip(plan.steps, plan.behind(), plan.candidates(), strict=True):
        at = _Place(leaves, size, width, num_prompts)
        regular = step.fan > 0 and width * step.fan == len(step.parent)
        alike = (regular, step.fan, step.is_kept, width, size, leaves)
        if not regular:
            drafts.append(_irregular(plan, step, at, forwards, uploads))
        elif alike == last:  # but for its row of the table
            drafts.append(_Draft([dict(drafts[-1].asks[0])], drafts[-1].num_rows))
        else:
            drafts.append(_regular(step, at, forwards, uploads))
        if regular:
            row, ask = int(step.row[0, 0]), drafts[-1].asks[0]
            ask |= {"row": row, "level": plan.levels[row], "noisy": plan.noisy[row]}
            if step.is_kept:
                ask["kept_row"] = uploads.add(np.full(drafts[-1].num_rows, row))
        last, width = alike, step.cut.size if step.cut else len(step.parent)
    tensors = uploads.sent(device)
    return [draft.laid(tensors) for draft in drafts]


class _Uploads:
    """Index arrays on their way to the device, all in one copy; equal ones become one tensor."""

    def __init__(self) -> None:
        self._arrays: list[Index] = []
        self._places: dict[tuple[tuple[int, ...], bytes], int] = {}

    def add(self, values: Index) -> int:
        """Its place among those that are sent."""
        values = np.ascontiguousarray(values, dtype=np.int64)
        place = self._places.setdefault((values.shape, values.tobytes()), len(self._arrays))
        if place == len(self._arrays):
            self._arrays.append(values)
        return place

    def unless_all(self, index: Index, size: int) -> int | None:
        """None where an index takes all there is, in order."""
        return None if np.array_equal(index, np.arange(size)) else self.add(index)

    def sent(self, device: torch.device) -> list[Tensor]:
        """The tensors, by place."""
        if not self._arrays:
            return []
        flat = torch.from_numpy(np.concatenate([values.ravel() for values in self._arrays]))
        parts = flat.to(device, non_blocking=True).split([values.size for values in self._arrays])
        return [part.view(values.shape) for part, values in zip(parts, self._arrays, strict=True)]


@dataclass(slots=True)
class _Draft:
    """A step's layout while its tensors are places among the uploads."""

    asks: list[dict[str, Any]]
    num_rows: int
    idle: tuple[int, int] | None = None

    def laid(self, tensors: list[Tensor]) -> StepLayout:
        """With the tensors in their places."""
        asks = []
        for ask in self.asks:
            found = {name: tensors[ask[name]] for name in _ON_DEVICE if ask[name] is not None}
            asks.append(Ask(**ask | found))
        idle = None if self.idle is None else (tensors[self.idle[0]], tensors[self.idle[1]])
        return StepLayout(tuple(asks), self.num_rows, idle)


_ON_DEVICE = (
    *("row_index", "head_index", "edge_index", "sample_index"),
    *("seed_index", "kept_index", "kept_row", "samples"),
)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a step stands in a walk of `num_prompts` prompts."""

    leaves: tuple[tuple[int, ...], ...]  # of each child, the samples behind it
    size: int  # samples a prompt
    width: int  # rows a prompt before the step
    num_prompts: int

    def over_prompts(self, index: Index, size: int) -> Index:
        """Indices within a prompt of `size` -> those within all."""
        return (np.arange(self.num_prompts)[:, None] * size + index).ravel()

    def samples(self, edges: Index) -> Index:
        """`[edges, m]`: the samples behind edges that are numbered over all prompts, each as many."""
        prompt, child = np.divmod(edges, len(self.leaves))
        num_behind = len(self.leaves[child[0]])
        table = np.array([leaf if len(leaf) == num_behind else (0,) * num_behind for leaf in self.leaves])
        return table[child] + (prompt * self.size)[:, None]


def _regular(step: StepPlan, at: _Place, forwards: Forwards, uploads: _Uploads) -> _Draft:
    """One ask of all rows; its row of the table is the caller's to fill in."""
    num_prompts, num_rows, fan = at.num_prompts, at.num_prompts * len(step.parent), step.fan
    if all(leaf == (member,) for member, leaf in enumerate(at.leaves)):  # every child is a sample by now
        first = np.arange(num_rows)
        samples = first[:, None] if step.is_kept else None
        seed_index = None
    else:
        first = at.over_prompts(np.array([leaf[0] for leaf in at.leaves]), at.size)
        samples = at.samples(np.arange(num_rows)) if step.is_kept else None
        seed_index = uploads.unless_all(first, num_prompts * at.size)
    ask = {
        "num_heads": num_prompts * at.width,
        "fan": fan,
        "rows": forwards.rows_at(at.width, at.size, step.is_kept),
        "trained": step.is_kept,
        "row_index": None,
        "head_index": None,
        "edge_index": None,
        "sample_index": None
        if seed_index is None and fan == 1
        else uploads.unless_all(first[::fan], num_prompts * at.size),
        "seed_index": seed_index,
        "kept_fan": fan if step.is_kept else 0,
        "kept_index": None,
        "kept_row": None,
        "samples": None if samples is None else uploads.add(samples),
        "samples_host": samples,
        "offsets": np.arange(num_prompts + 1) * at.width,
    }
    return _Draft([ask], num_rows)


def _irregular(plan: Plan, step: StepPlan, at: _Place, forwards: Forwards, uploads: _Uploads) -> _Draft:
    """An ask for each number of children that rows have, trained rows apart from the others."""
    num_prompts, width, size = at.num_prompts, at.width, at.size
    num_children = len(step.parent)
    shape, num_before = (num_prompts, num_children), num_prompts * width
    row = np.broadcast_to(step.row, shape).ravel()
    kept = np.broadcast_to(step.kept, shape).ravel()
    head, moves = at.over_prompts(step.parent, width), row != IDLE
    fan = np.bincount(head[moves], minlength=num_before)
    trained = np.bincount(head, weights=kept, minlength=num_before) > 0
    first = at.over_prompts(np.array([leaf[0] for leaf in at.leaves]), size)
    asks = []
    for is_trained in (True, False):
        for count in np.unique(fan[(trained == is_trained) & (fan > 0)]):
            asked = (trained == is_trained) & (fan == count)
            heads, edges = np.flatnonzero(asked), np.flatnonzero(moves & asked[head])
            edges = edges[np.argsort(head[edges], kind="stable")]
            kept_here = np.flatnonzero(kept[edges])
            counts = asked.reshape(num_prompts, width).sum(axis=1)
            rows, samples = row[edges], at.samples(edges[kept_here]) if is_trained else None
            one = bool((rows == rows[0]).all())
            ask = {
                "num_heads": len(heads),
                "fan": int(count),
                "rows": forwards.rows_at(
                    int(counts[0]) if (counts == counts[0]).all() else None, size, is_trained
                ),
                "trained": is_trained,
                "row": int(rows[0]),
                "row_index": None if one else uploads.add(rows),
                "level": plan.levels[rows[0]] if one else None,
                "noisy": any(plan.noisy[r] for r in np.unique(rows)) or not one,
                "head_index": uploads.unless_all(heads, num_before),
                "edge_index": uploads.unless_all(edges, num_prompts * num_children),
                "sample_index": uploads.unless_all(first[edges[:: int(count)]], num_prompts * size),
                "seed_index": uploads.unless_all(first[edges], num_prompts * size),
                "kept_fan": len(kept_here) // len(heads),
                "kept_index": uploads.unless_all(kept_here, len(edges)),
                "kept_row": uploads.add(rows[kept_here]) if is_trained else None,
                "samples": None if samples is None else uploads.add(samples),
                "samples_host": samples,
                "offsets": np.concatenate([[0], np.cumsum(counts)]),
            }
            asks.append(ask)
    assert sum(bool(ask["trained"]) for ask in asks) <= 1, (
        "the kept rows of a step have equally many children"
    )
    still = np.flatnonzero(~moves)
    idle = (uploads.add(head[still]), uploads.add(still)) if len(still) else None
    return _Draft(asks, num_prompts * num_children, idle)


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
    noisy: bool = True  # False: children of one row are equal, so that one is computed
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
    fan, row, seed = wanted.fan, given.row, given.seed
    # Children of one row start from one sigma, whatever rows of the table they take.
    sigma = coeffs[row, 0] if isinstance(row, int) else coeffs[:, 0].index_select(0, row[::fan])
    if given.latents.shape[0] <= wanted.rows:
        predicted = policy.predict(given.latents, sigma, given.conditioning)
    else:
        predicted = _predict_in_parts(policy, given, sigma, wanted.rows)
    copies = 1
    if fan > 1 and not wanted.noisy:  # one child is computed, and repeated
        fan, copies, seed = 1, fan, seed[::fan].contiguous()
        row = row if isinstance(row, int) else row[::copies].contiguous()
    velocity, guidance = spread(predicted.velocity, fan), spread_guidance(predicted.guidance, fan)
    x0_prev = given.x0_pred if wanted.reads_x0 else None
    out = flow_step(
        spread(given.latents, fan),
        velocity,
        coeffs,
        row,
        seed,
        guidance=guidance,
        x0_prev=None if x0_prev is None else spread(x0_prev, fan),
        return_x0_pred=wanted.gives_x0,
    )
    if copies > 1:
        out = FlowStepOutput(*(None if t is None else spread(t, copies) for t in out))  # type: ignore[arg-type]
    halves = predicted.guidance if wanted.gives_unconditional else None
    return StepResult(
        out,
        spread(velocity, copies) if wanted.gives_velocity else None,
        spread_guidance(guidance, copies) if wanted.gives_velocity else None,
        None if halves is None else halves.negative_velocity,
    )


def _predict_in_parts(policy: Policy, given: StepInput, sigma: Tensor, rows: int) -> Predicted:
    """Velocities of all rows, one micro-batch after another."""
    parts = [
        policy.predict(
            given.latents[part], sigma if sigma.ndim == 0 else sigma[part], given.conditioning.rows(part)
        )
        for part in row_slices(given.latents.shape[0], rows)
    ]
    velocity = torch.cat([part.velocity for part in parts])
    negative = [part.guidance.negative_velocity for part in parts if part.guidance is not None]
    return Predicted(velocity, Guidance(torch.cat(negative), policy.guidance_scale) if negative else None)
