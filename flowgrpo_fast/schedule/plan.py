"""A rollout as the host knows it before it begins: who moves at each step, by which row of the table, and from whom.

Shared start, shared prefix, tree, comb, merged step, one stochastic step a prompt and pruning cuts are all the same
record. One walk runs any plan, one replay scores it again, and the planner counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrpo_fast.schedule.dynamics import Row, check_falling, euler_row, table
from flowgrpo_fast.schedule.sigmas import Array

Index: TypeAlias = NDArray[np.int64]

IDLE = -1  # in place of a row: the child is its parent, unmoved, and asks no network


class Cut(NamedTuple):
    """How many of a prompt's candidates go on, and what chooses them; see `topology.Cuts`."""

    size: int
    select: str
    score: str
    pool: int


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One step of W rows a prompt, which become W' children. Where prompts differ, arrays have a row for each."""

    row: Index  # [1 | P, W'] row of the table that each child takes, or IDLE
    parent: Index  # [W'] which of the W rows before it a child comes from; repeats = branching
    kept: NDArray[np.bool_]  # [1 | P, W'] the edge is stored and trained
    step: int  # which step of the schedule it is
    cut: Cut | None = None  # after the step
    is_kept: bool = field(init=False)  # any edge is
    # Children of a row, where all rows have as many, side by side, by one row of the table, and all edges are kept or
    # none is; 0 elsewhere. Most steps of most plans are such, and a walk need not look at their arrays.
    fan: int = field(init=False)

    def __post_init__(self) -> None:
        """What a walk asks at every step is worked out once."""
        object.__setattr__(self, "is_kept", bool(self.kept.any()))
        fan, row = int(np.count_nonzero(self.parent == 0)), self.row[0, 0]
        regular = (
            row != IDLE
            and bool((self.row == row).all())
            and bool(self.kept.all()) == self.is_kept
            and bool((self.parent == np.arange(len(self.parent)) // max(fan, 1)).all())
        )
        object.__setattr__(self, "fan", fan if regular else 0)

    @property
    def heads(self) -> Index:
        """The rows before the step whose velocity is asked for, ascending: those with a child that moves."""
        return np.unique(self.parent[(self.row != IDLE).any(axis=0)])

    @property
    def kept_heads(self) -> Index:
        """Those of them that are trained, for at least one prompt."""
        return np.unique(self.parent[self.kept.any(axis=0)])

    def kept_of(self, num_prompts: int) -> tuple[int, int]:
        """Over all prompts, the rows before the step with a kept edge, and its kept edges."""
        times = num_prompts // len(self.kept)  # where one row stands for all prompts
        rows = sum(len(np.unique(self.parent[own])) for own in self.kept)
        return times * rows, times * int(self.kept.sum())

    @property
    def kept_rows(self) -> Index:
        """The rows of the table that kept edges take, ascending."""
        row, kept = np.broadcast_arrays(self.row, self.kept)
        return np.unique(row[kept])

    @property
    def differs(self) -> bool:
        """Whether prompts do."""
        return len(self.row) > 1 or len(self.kept) > 1


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A walk from noise to samples."""

    sigmas: Tensor  # [T+1] fp32, host: 1 = noise, last = 0
    coeffs: Tensor  # [N, 8] fp32, host: the table of rows
    interval: Tensor  # [N] fp32, host: sigma at the row's start minus sigma at its end
    steps: tuple[StepPlan, ...]
    width: int  # rows a prompt begins with; a shared start has 1
    num_trained: int  # of the kept edges on a sample's way, how many it trains on
    history: NDArray[np.bool_]  # [N] whether a row reads the x0 prediction of the step before
    starts: Index  # [N] the step of the schedule that a row begins at
    levels: tuple[Tensor, ...] = field(init=False)  # N of them, 0-d, host: the sigma that a row begins at
    noisy: tuple[bool, ...] = field(init=False)  # N of them: whether a row adds noise
    _behind: tuple[tuple[tuple[int, ...], ...], ...] = field(init=False)
    _candidates: tuple[int, ...] = field(init=False)
    _reads_x0: tuple[bool, ...] = field(init=False)

    def __post_init__(self) -> None:
        """What every walk along the plan asks is worked out once."""
        late = bool(self.history.any())
        for name, value in {
            "levels": self.coeffs[:, 0].unbind(),
            "noisy": tuple((self.coeffs[:, 3] != 0).tolist()),
            "_behind": _behind(self.steps),
            "_candidates": _candidates(self.steps),
            "_reads_x0": tuple(
                late and bool(self.history[step.row[step.row != IDLE]].any()) for step in self.steps
            ),
        }.items():
            object.__setattr__(self, name, value)

    @property
    def num_candidates(self) -> int:
        """Samples a prompt begins with, before any cut."""
        return self._candidates[0]

    @property
    def group_size(self) -> int:
        """Finished samples a prompt."""
        last = self.steps[-1]
        return last.cut.size if last.cut else len(last.parent)

    @property
    def kept(self) -> tuple[int, ...]:
        """Places in `steps` with kept edges."""
        return tuple(place for place, step in enumerate(self.steps) if step.is_kept)

    @property
    def cuts(self) -> tuple[tuple[int, Cut], ...]:
        """Places in `steps` after which candidates are cut, and how."""
        return tuple((place, step.cut) for place, step in enumerate(self.steps) if step.cut)

    def reads_x0(self, place: int) -> bool:
        """Whether a step reads the x0 predictions of the one before."""
        return self._reads_x0[place]

    def gives_x0(self, place: int) -> bool:
        """Whether a cut after a step, or the next step, reads its x0 predictions."""
        following = place + 1 < len(self.steps) and self.reads_x0(place + 1)
        return following or self.steps[place].cut is not None

    def evaluations(self, num_prompts: int) -> int:
        """Rows that go through the network, each half of guidance counted once."""
        return num_prompts * sum(len(step.heads) for step in self.steps)

    def trained_rows(self, num_prompts: int) -> list[int]:
        """Of each kept step, the rows before it that an update measures: those of the samples that cuts left."""
        found = []
        for place in self.kept:
            rows, edges = self.steps[place].kept_of(num_prompts)
            # Survivors of a cut take their own rows along; a row that several share stays for those of them that do.
            alone = rows == edges and any(cut >= place for cut, _ in self.cuts)
            found.append(num_prompts * self.group_size if alone else rows)
        return found

    def behind(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Of each step, of each child, the candidates behind it: as they are numbered before the step's cut."""
        return self._behind

    def roots(self) -> Index:
        """Of each of the `width` rows a prompt begins with, its first candidate."""
        first, behind = self.steps[0], self._behind[0]
        return np.array(
            [behind[int(np.flatnonzero(first.parent == row)[0])][0] for row in range(self.width)],
            dtype=np.int64,
        )

    def of_prompts(self, first: int, num_prompts: int) -> Plan:
        """The plan of some neighbouring prompts."""
        if not any(step.differs for step in self.steps):
            return self

        def own(values: NDArray[np.generic]) -> NDArray[np.generic]:
            return values[first : first + num_prompts] if len(values) > 1 else values

        steps = tuple(replace(s, row=own(s.row), kept=own(s.kept)) for s in self.steps)  # type: ignore[arg-type]
        return replace(self, steps=steps)

    def candidates(self) -> tuple[int, ...]:
        """Of each step, the samples a prompt has under way in it."""
        return self._candidates


def _behind(steps: Sequence[StepPlan]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    found: list[tuple[tuple[int, ...], ...]] = []
    for step in reversed(steps):
        width = len(step.parent)
        if not found or step.cut:
            children: tuple[tuple[int, ...], ...] = tuple((row,) for row in range(width))
        else:
            after, following = found[-1], steps[len(steps) - len(found)].parent
            if np.array_equal(following, np.arange(width)):
                found.append(after)  # the same object, by which a walk sees that nothing has changed
                continue
            children = tuple(
                tuple(leaf for child in np.flatnonzero(following == row) for leaf in after[child])
                for row in range(width)
            )
        found.append(children)
    return tuple(reversed(found))


def _candidates(steps: Sequence[StepPlan]) -> tuple[int, ...]:
    sizes: list[int] = []
    size = 0
    for step in reversed(steps):
        if step.cut or not sizes:
            size = len(step.parent)
        sizes.append(size)
    return tuple(reversed(sizes))


class PlanBuilder:
    """Collects the rows of a table and the steps that take them."""

    def __init__(self, sigmas: Array) -> None:
        check_falling(sigmas)
        self.sigmas = sigmas
        self.rows: list[Row] = []
        self.steps: list[StepPlan] = []
        self._ends: list[tuple[int, int]] = []

    def row(self, values: Row, step: int, to: int) -> int:
        """Adds a row for the way from `sigmas[step]` to `sigmas[to]`; returns its number."""
        self.rows.append(values)
        self._ends.append((step, to))
        return len(self.rows) - 1

    def euler(self, step: int) -> int:
        """Adds a first-order row."""
        return self.row(euler_row(float(self.sigmas[step]), float(self.sigmas[step + 1])), step, step + 1)

    def step(
        self,
        step: int,
        row: int | Sequence[int] | Index,
        parent: Sequence[int] | Index,
        kept: bool | Sequence[bool] | NDArray[np.bool_] = False,
    ) -> None:
        """Adds a step; one row, and one `kept`, may stand for all children."""
        rows, keeps = np.asarray(row, dtype=np.int64), np.asarray(kept, dtype=bool)
        self.steps.append(
            StepPlan(
                row=np.atleast_2d(np.broadcast_to(rows, (*rows.shape[:-1], len(parent)))),
                parent=np.asarray(parent, dtype=np.int64),
                kept=np.atleast_2d(np.broadcast_to(keeps, (*keeps.shape[:-1], len(parent)))),
                step=step,
            )
        )

    def plan(self, width: int, num_trained: int) -> Plan:
        """The whole walk."""
        coeffs, sigmas = table(self.rows), torch.from_numpy(self.sigmas).float()
        starts, ends = (torch.tensor(side, dtype=torch.int64) for side in zip(*self._ends, strict=True))
        return Plan(
            sigmas=sigmas,
            coeffs=coeffs,
            interval=sigmas[starts] - sigmas[ends],
            steps=tuple(self.steps),
            width=width,
            num_trained=num_trained,
            history=(coeffs[:, 4] != 0).numpy(),
            starts=starts.numpy(),
        )
