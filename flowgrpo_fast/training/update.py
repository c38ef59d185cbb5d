"""The update: points, measurements, loss, backward, optimiser. There is no branch on the method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrpo_fast.objectives.objective import Objective, Points, Stats, Terms
from flowgrpo_fast.objectives.surrogates import PathLogProb
from flowgrpo_fast.sampling.step import row_slices
from flowgrpo_fast.training.learner import Counts, Learner, Networks, networks
from flowgrpo_fast.types import Batch, Credit

_LEAST_WEIGHT = 1e-9  # behind an edge, below any that a sample has

# The scalar that one micro-batch pulls the weights by: of column(s) k of the points, the point, its statistics.
Pull = Callable[[Any, Any, Stats], Tensor]


@dataclass(slots=True)
class Tally:
    """What a training step shows, kept on the device until its end."""

    shown: dict[str, list[Tensor]] = field(default_factory=dict)
    worst: dict[str, list[Tensor]] = field(default_factory=dict)
    grad_norm: list[Tensor] = field(default_factory=list)
    # Of the replays before the first optimiser step, whose true log-ratio is 0: the row of the table, and |log_ratio|.
    first_rows: list[Tensor] = field(default_factory=list)
    first_ratios: list[Tensor] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    def show(self, terms: Terms) -> None:
        """Takes what a loss shows."""
        for into, values in ((self.shown, terms.shown), (self.worst, terms.worst)):
            for name, value in values.items():
                into.setdefault(name, []).append(value)

    def add(self, objective: Objective, point: Any, stats: Stats, terms: Terms | None) -> None:
        """One micro-batch; before the first optimiser step its log-ratios, too."""
        if terms is not None:
            self.show(terms)
        log_ratio = None if self.grad_norm else objective.log_ratio(stats)
        if log_ratio is not None and point.row is not None:
            self.first_rows.append(point.row)
            self.first_ratios.append(log_ratio.detach())

    def metrics(self, batch: Batch) -> dict[str, float]:
        """Means over all trained edges; the one place where the device is asked for numbers."""
        values = {name: torch.cat(parts).mean() for name, parts in self.shown.items()}
        values |= {name: torch.cat(parts).max() for name, parts in self.worst.items()}
        if self.grad_norm:
            norms = torch.stack(self.grad_norm)
            finite = torch.isfinite(norms)
            values["grad_norm"] = norms.where(finite, 0.0).sum() / finite.sum()
            values["skipped_updates"] = (~finite).sum()
        if self.first_ratios:
            values |= self._mismatch(batch)
        numbers = torch.stack([value.float() for value in values.values()]).tolist() if values else []
        # A number that is none is left out: of a step that was skipped, or of a loss that is on its way there.
        named = {name: number for name, number in zip(values, numbers, strict=True) if math.isfinite(number)}
        if not named.get("skipped_updates", 1.0):
            del named["skipped_updates"]
        named["network_evaluations"] = float(batch.samples.evaluations + self.counts.evaluations)
        named["network_backwards"] = float(self.counts.backwards)
        return named

    def _mismatch(self, batch: Batch) -> dict[str, Tensor]:
        """How far the replay's log-probs lie from the rollout's, by step of the schedule."""
        row, log_ratio = torch.cat(self.first_rows), torch.cat(self.first_ratios)
        delta, zeros = log_ratio.abs(), log_ratio.new_zeros(len(batch.samples.coeffs))
        largest = zeros.scatter_reduce(0, row, delta, "amax")
        count = zeros.index_add(0, row, torch.ones_like(delta))
        mean = zeros.index_add(0, row, delta) / count.clamp(min=1)
        plan = batch.samples.plan
        kept = sorted({int(r) for place in plan.kept for r in plan.steps[place].kept_rows})
        values = {"first_ratio_error": (torch.exp(log_ratio) - 1).abs().max()}
        values |= {"delta_log_prob_max": delta.max(), "delta_log_prob_mean": delta.mean()}
        values |= {f"delta_log_prob_max/step_{plan.starts[r]}": largest[r] for r in kept}
        return values | {f"delta_log_prob_mean/step_{plan.starts[r]}": mean[r] for r in kept}


def update(learner: Learner, batch: Batch) -> dict[str, float]:
    """Passes of optimiser steps over the batch, each on its own share of the samples.

    Every point of a share is measured in micro-batches, each of which goes back through the network at once: memory is
    that of one. Their gradients add up to one optimiser step.
    """
    tally = Tally()
    for rows in learner.shares(batch):
        share = batch.of_samples(rows)
        if not share.teaches:
            continue  # every group of it had equal rewards, and its mean counts none of them
        accumulate(learner, share, tally)
        tally.grad_norm.append(learner.step())
        # What the rollout kept of guidance is of the weights before.
        batch = batch.without_unconditional()
    return tally.metrics(batch)


def accumulate(learner: Learner, share: Batch, tally: Tally) -> None:
    """Adds the gradient of one optimiser step to the parameters' own; none where no sample has one."""
    if not share.live.any():
        return
    points, evaluator = learner.objective.points(share), networks(learner, share, tally.counts)
    if learner.objective.couples:
        share = replace(share, live=_live_groups(share))
        pull = linearised(learner, share, points, evaluator, tally)
    else:
        pull = separable(learner.objective, share, points, tally)
    for column, point in micro_batches(learner, share, points):
        pull(column, point, measured(learner, point, evaluator)).backward()


@torch.no_grad()
def rescored(learner: Learner, batch: Batch) -> Batch:
    """The batch with log-probs of the learner's own policy, for walks that another model, or precision, has sampled.

    Costs a forward a kept step. Forwards are those of the rollout, so a replay by this policy has ratio 1.
    """
    batch = batch.without_unconditional()
    evaluator = networks(learner, batch, Counts())
    transitions = []
    step: Any
    for step in batch.samples.transitions:
        pieces = [step.heads(rows) for rows in row_slices(step.num_heads, learner.rows_at(step))]
        scored = [PathLogProb().measure(piece, evaluator.at(piece), ())["log_prob"] for piece in pieces]
        transitions.append(replace(step, log_prob=torch.cat(scored)))
    return replace(batch, samples=replace(batch.samples, transitions=tuple(transitions)))


def measured(learner: Learner, point: Any, evaluator: Networks) -> Stats:
    """Statistics of the edges of a micro-batch.

    The last one of a share that is no whole number of the rollout's forwards is filled up to one, so that where a ratio
    is taken it is exactly 1 before the first update.
    """
    rows = learner.rows_at(point)
    if point.row is None or point.num_heads >= rows or learner.replay_rows:
        return learner.objective.measure(point, evaluator.at(point))
    full, num_edges = point.filled(rows), len(point.row)
    stats = learner.objective.measure(full, evaluator.at(full))
    return {name: values[:num_edges] for name, values in stats.items()}


def micro_batches(learner: Learner, share: Batch, points: Points) -> Iterator[tuple[int | Tensor, Any]]:
    """Every point in parts that go through the network at once, with the number(s) of its place among the points.

    Parts in which no sample carries weight are passed over, which the host knows since the rewards were read. With
    `steps_per_forward` several points of one expert stand side by side, as many rows a forward as one had alone.
    """
    columns: int | Tensor
    place = 0
    while place < len(points):
        point = points[place]
        rows = learner.rows_at(point)
        beside = [point]
        if point.fan == 1 and point.num_heads == len(share):
            expert = learner.policy.at(point.level).model
            for other in range(place + 1, min(place + learner.steps_per_forward, len(points))):
                following = points[other]
                if following.fan > 1 or learner.policy.at(following.level).model is not expert:
                    break
                beside.append(following)
            while rows % len(beside):
                beside.pop()  # parts would not fill a forward evenly
        num_beside = len(beside)
        for part in row_slices(point.num_heads, rows // num_beside):
            pieces = [one.heads(part) for one in beside]
            if not share.live[pieces[0].samples_host].any():
                continue
            if num_beside == 1:
                columns, piece = place, pieces[0]
            else:
                numbers = torch.arange(place, place + num_beside, device=point.samples.device)
                columns, piece = numbers.repeat_interleave(part.stop - part.start), point.side_by_side(pieces)
            yield columns, piece
        place += num_beside


def separable(objective: Objective, share: Batch, points: Points, tally: Tally) -> Pull:
    """The pull of a loss that is taken edge by edge: its weighted mean over samples and their trained steps."""
    credit, imported = share.credit, share.samples.weight
    per_column = credit.weight.shape[1] if credit.weight.ndim > 1 else 1
    total = _total_weight(share) * points.per_sample
    total = total if per_column == 1 else total / per_column

    def pull(column: int | Tensor, point: Any, stats: Stats) -> Tensor:
        terms = objective.loss(stats, _advantages(credit, point.samples, column))
        tally.add(objective, point, stats, terms)
        loss = terms.loss.flatten(1).mean(1) if terms.loss.ndim > 1 else terms.loss
        # An edge counts for all the samples that are behind it, each as much as it weighs.
        weight = _at(credit.weight, point.samples, column if isinstance(column, int) else column[:, None])
        weight = weight if imported is None else weight * imported[point.samples]
        return (loss * weight.sum(1)).sum().div(total)

    return pull


def linearised(learner: Learner, share: Batch, points: Points, evaluator: Networks, tally: Tally) -> Pull:
    """The pull of a loss that joins a sample's steps, or a group: its slope by every statistic, taken once.

    A first pass without gradient fills tables `[B, N]` of all statistics. Near the weights they were taken at the loss
    is linear in them, so pulling each statistic by its slope gives the gradient of the whole, a micro-batch at a time.
    Groups in which no sample carries weight are in no table: the loss sees the others, whole.
    """
    objective, credit = learner.objective, share.credit
    tables: dict[str, Tensor] = {}
    with torch.no_grad():
        for column, point in micro_batches(learner, share, points):
            columns = column if isinstance(column, int) else column[:, None]
            for name, values in measured(learner, point, evaluator).items():
                if name not in tables:
                    tables[name] = values.new_zeros(len(share), len(points), *values.shape[1:])
                wide = values[:, None].expand(point.samples.shape[:2] + values.shape[1:])
                tables[name][point.samples, columns] = wide
    weight = credit.weight if share.samples.weight is None else credit.weight * share.samples.weight
    advantages, own = credit.advantages, tables
    if not share.live.all():
        rows = torch.from_numpy(np.flatnonzero(share.live)).to(weight.device, non_blocking=True)
        weight, advantages = weight[rows], advantages[rows]
        own = {name: values[rows] for name, values in tables.items()}
    leaves = {name: values.requires_grad_() for name, values in own.items()}
    terms = objective.loss(leaves, advantages)
    mean = (terms.loss * weight).sum() / _total_weight(share)
    slopes = torch.autograd.grad(mean, list(leaves.values()), allow_unused=True)
    slope_of = {name: slope for name, slope in zip(leaves, slopes, strict=True) if slope is not None}
    if not share.live.all():
        slope_of = {
            name: torch.zeros_like(tables[name]).index_copy_(0, rows, slope)
            for name, slope in slope_of.items()
        }
    tally.show(terms)

    def pull(column: int | Tensor, point: Any, stats: Stats) -> Tensor:
        tally.add(objective, point, stats, None)
        columns = column if isinstance(column, int) else column[:, None]
        pulls = [
            (slope_of[name][point.samples, columns].sum(1) * values).sum()
            for name, values in stats.items()
            if name in slope_of and values.requires_grad
        ]
        return torch.stack(pulls).sum()

    return pull


def _live_groups(share: Batch) -> NDArray[np.bool_]:
    """`[B]` host: which samples are of a group that carries weight; each by itself where a share splits groups."""
    if not share.whole_groups:
        return share.live
    group_size = share.samples.plan.group_size
    return share.live.reshape(-1, group_size).any(1).repeat(group_size)


def _total_weight(share: Batch) -> Tensor:
    """What its mean divides by: samples that have no gradient may count, and be left out all the same."""
    return share.credit.weight.sum() if share.total_weight is None else share.total_weight


def _advantages(credit: Credit, samples: Tensor, column: int | Tensor) -> Tensor:
    """What edges `[E]` are worth, by the samples `[E, m]` behind each.

    The mean over those that weigh anything; where every step has its credit, all samples behind an edge have the same,
    and the first is read.
    """
    if samples.shape[1] == 1 or credit.advantages.ndim > 1:
        return _at(credit.advantages, samples[:, 0], column)
    weight = _at(credit.weight, samples, column if isinstance(column, int) else column[:, None])
    return (credit.advantages[samples] * weight).sum(1) / weight.sum(1).clamp_min(_LEAST_WEIGHT)


def _at(values: Tensor, samples: Tensor, column: int | Tensor) -> Tensor:
    """Credit of edges, by the samples `[E]` or `[E, m]` behind them, from `[B]`, `[B, K]` or `[B, K or 1, *region]`."""
    if values.ndim == 1:
        return values[samples]
    return values[samples, column if values.shape[1] > 1 else 0]
