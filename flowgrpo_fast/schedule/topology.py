"""Who starts from whom: the shape of a group's walk, each shape a part that writes its own plan.

Independent   every sample is a row of its own from the start                    (Flow-GRPO)
SharedStart   one start noise a group; one row until the first stochastic step   (DanceGRPO, MixGRPO)
Tree          every stochastic step branches                                     (TreeGRPO, TMPO)
Comb          an ODE trunk that branches leave, each by one stochastic step      (TempFlow, E-GRPO)
OneStepEach   every prompt has one stochastic step of its own                    (Flash-GRPO)
Cuts          any of the first two, with candidates cut on the way               (Pro-GRPO)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import numpy as np

from flowgrpo_fast.checks import one_of, positive, require
from flowgrpo_fast.schedule.dynamics import Dynamics, Euler, Solver
from flowgrpo_fast.schedule.plan import IDLE, Cut, Plan, PlanBuilder
from flowgrpo_fast.schedule.sigmas import Array
from flowgrpo_fast.schedule.windows import AllSteps, FrozenWindow, Window, WindowSteps

_MOST = 1024  # candidates of a prompt that `ops.best_variance_subset` and `ops.top_bottom` take
_OWN_STEP_STREAM = 0x6F6E65


class Course(NamedTuple):
    """What a plan is made of, besides the topology."""

    sigmas: Array  # [T+1]
    shift: float  # of the schedule: a respaced tail follows it
    dynamics: Dynamics
    solver: Solver  # of the steps after the last stochastic one; before it they are Euler's
    iteration: int
    seed: int
    num_prompts: int
    group_size: int  # finished samples a prompt
    keeps: bool = True  # whether the objective replays transitions at all
    # Whether an optimiser step takes whole groups: where it does not, members cannot share what they are trained on.
    whole_groups: bool = True
    # Whether it may take some edges of a row that members share, and leave the others to another optimiser step.
    some_edges: bool = False


class Topology(Protocol):
    """The shape of a group's walk."""

    @property
    def shares_start(self) -> bool:
        """Whether a group's samples start from one noise."""
        ...

    @property
    def at(self) -> Window:
        """The stochastic steps."""
        ...

    @property
    def stages(self) -> tuple[int, ...]:
        """Candidates a prompt before each cut; empty without cuts."""
        ...

    def only_group_size(self, num_steps: int) -> int | None:
        """The one group size that its shape allows on a schedule of `num_steps`; None = any."""
        ...

    def num_candidates(self, group_size: int) -> int:
        """Samples a prompt begins with, of which `group_size` are finished."""
        ...

    def plan(self, course: Course) -> Plan:
        """The walk of one iteration.

        Raises:
            ValueError: the steps do not fit the schedule, or the group does not fit the shape.
        """
        ...


def _lanes(course: Course, window: WindowSteps) -> tuple[PlanBuilder, list[int]]:
    """A builder whose row k is that of step k: dynamics in the window, Euler before its end, the solver after it."""
    end = window.stochastic[-1] + 1 if window.stochastic else 0
    builder = PlanBuilder(course.solver.tail(course.sigmas, end, course.shift))
    for step in range(len(builder.sigmas) - 1):
        rule = course.dynamics if step in window.stochastic else (Euler() if step < end else course.solver)
        builder.row(rule.row(builder.sigmas, step, step + 1), step, step + 1)
    return builder, list(range(len(builder.rows)))


class _Parting(NamedTuple):
    """Rows of the table where some leave by a stochastic step and others do not, by step of the schedule."""

    noisy: dict[int, int]
    euler: list[int]
    solver: list[int]


def _parting(builder: PlanBuilder, course: Course, leaving: tuple[int, ...], merge: int = 1) -> _Parting:
    """Adds the rows of walks whose steps `leaving` are stochastic for some, and end `merge` steps on.

    Row k of the table is the stochastic one of step k where there is one: noise is a function of the row's number, and
    so of the step, as in walks that all take together. Where the solver steps as Euler does, they share a row.
    """
    sigmas, num_steps = builder.sigmas, len(builder.sigmas) - 1
    rows = [
        builder.row(course.dynamics.row(sigmas, step, step + merge), step, step + merge)
        if step in leaving
        else builder.euler(step)
        for step in range(num_steps)
    ]
    euler = [builder.euler(step) if step in leaving else row for step, row in enumerate(rows)]
    later = [course.solver.row(sigmas, step, step + 1) for step in range(num_steps)]
    solver = [
        euler[step] if row == builder.rows[euler[step]] else builder.row(row, step, step + 1)
        for step, row in enumerate(later)
    ]
    return _Parting({step: rows[step] for step in leaving}, euler, solver)


@dataclass(frozen=True, slots=True, kw_only=True)
class Independent:
    """Every sample is a row of its own from the start."""

    at: Window = field(default_factory=AllSteps)
    shares_start = False  # start noise is a sample's own
    stages = ()  # no cuts

    def only_group_size(self, num_steps: int) -> int | None:
        """Any."""
        return None

    def num_candidates(self, group_size: int) -> int:
        """Every sample is finished."""
        return group_size

    def plan(self, course: Course) -> Plan:
        """As of `Topology`."""
        window = self.at.steps(len(course.sigmas) - 1, course.iteration, course.seed)
        builder, rows = _lanes(course, window)
        for step in rows:
            builder.step(step, step, range(course.group_size), course.keeps and step in window.kept)
        return builder.plan(course.group_size, window.num_trained if course.keeps else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedStart:
    """One start noise for a group, which is one row until its first stochastic step.

    One velocity then serves the whole group at that step too, in rollout and update alike, where every sample trains
    on all stochastic steps and an optimiser step takes whole groups, or some members of each. The numbers are those of
    `share_prefix=False`.
    """

    at: Window = field(default_factory=AllSteps)
    share_prefix: bool = True  # False computes every member's start by itself: a witness, and a baseline
    shares_start = True  # one noise a group
    stages = ()  # no cuts

    def only_group_size(self, num_steps: int) -> int | None:
        """Any."""
        return None

    def num_candidates(self, group_size: int) -> int:
        """Every sample is finished."""
        return group_size

    def plan(self, course: Course) -> Plan:
        """As of `Topology`."""
        window = self.at.steps(len(course.sigmas) - 1, course.iteration, course.seed)
        require(
            bool(window.stochastic),
            "SharedStart.at leaves no step stochastic; a group's samples would all be equal: use Independent",
        )
        builder, rows = _lanes(course, window)
        size, first = course.group_size, window.stochastic[0]
        trains_all = course.keeps and window.num_trained == len(window.stochastic) == len(window.kept)
        # The group becomes rows of its own at its first stochastic step, or one step before where that step's velocity
        # has to be each member's own.
        splits = first if trains_all and (course.whole_groups or course.some_edges) else first - 1
        width = 1 if self.share_prefix and splits >= 0 else size
        start = width
        for step in rows:
            parent = np.zeros(size, dtype=int) if width == 1 and step == splits else np.arange(width)
            width = len(parent)
            builder.step(step, step, parent, course.keeps and step in window.kept)
        return builder.plan(start, window.num_trained if course.keeps else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """Every stochastic step has `fan` children of each row, all else is the ODE; a group is the tree's leaves."""

    at: Window = field(default_factory=lambda: FrozenWindow(size=3))
    fan: int = 2
    shares_start = True  # a tree has one root
    stages = ()  # no cuts

    def __post_init__(self) -> None:
        """A tree branches."""
        require(self.fan >= 2, f"Tree.fan is {self.fan}; it must be at least 2")

    def only_group_size(self, num_steps: int) -> int | None:
        """The tree's leaves."""
        return self.fan ** len(self.at.steps(num_steps, 0, 0).stochastic)

    def num_candidates(self, group_size: int) -> int:
        """Every leaf is finished."""
        return group_size

    def plan(self, course: Course) -> Plan:
        """As of `Topology`."""
        window = self.at.steps(len(course.sigmas) - 1, course.iteration, course.seed)
        depth = len(window.stochastic)
        require(
            window.num_trained == depth > 0,
            f"Tree.at trains {window.num_trained} of {depth} stochastic steps; a tree trains all, at least one",
        )
        leaves = self.fan**depth
        require(
            course.group_size == leaves,
            f"Tree has {self.fan} children at {depth} steps, which makes {leaves} leaves a prompt; group_size is "
            f"{course.group_size}: set group_size={leaves}",
        )
        require(
            course.whole_groups,
            "Tree: an optimiser step takes whole trees; set optimizer.partition=groups, and make num_updates divide "
            "num_prompts",
        )
        builder, rows = _lanes(course, window)
        width = 1
        for step in rows:
            branches = step in window.stochastic
            parent = np.repeat(np.arange(width), self.fan if branches else 1)
            width = len(parent)
            builder.step(step, step, parent, course.keeps and branches)
        return builder.plan(1, depth if course.keeps else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comb:
    """An ODE trunk; at each step of `at` `fan` branches leave it by one stochastic step and follow the ODE to the end.

    With `merge = m` that one step goes m steps far (E-GRPO's merged steps); a branch then waits, unmoved and
    unevaluated, until the others are where it is.
    """

    at: Window = field(default_factory=lambda: FrozenWindow(size=2))
    fan: int = 2
    merge: int = 1
    shares_start = True  # there is one trunk
    stages = ()  # no cuts

    def __post_init__(self) -> None:
        """Counts are positive."""
        positive(self, fan=self.fan, merge=self.merge)

    def only_group_size(self, num_steps: int) -> int | None:
        """The branches of all steps."""
        return self.fan * len(self.at.steps(num_steps, 0, 0).stochastic)

    def num_candidates(self, group_size: int) -> int:
        """Every branch is finished."""
        return group_size

    def plan(self, course: Course) -> Plan:
        """As of `Topology`."""
        num_steps = len(course.sigmas) - 1
        leaving = self.at.steps(num_steps, course.iteration, course.seed).stochastic
        require(bool(leaving), "Comb.at leaves no step stochastic; a comb needs one at least")
        require(
            course.group_size == self.fan * len(leaving),
            f"Comb has {self.fan} branches at {len(leaving)} steps, which makes {self.fan * len(leaving)} samples a "
            f"prompt; group_size is {course.group_size}: set group_size={self.fan * len(leaving)}",
        )
        require(
            leaving[-1] + self.merge < num_steps,
            f"Comb.merge is {self.merge}: a step from {leaving[-1]} would end at the sample; merge at most "
            f"{num_steps - 1 - leaving[-1]}, or leave earlier",
        )
        require(
            course.whole_groups,
            "Comb: an optimiser step takes whole combs; set optimizer.partition=groups, and make num_updates divide "
            "num_prompts",
        )
        # A solver may shorten the steps after the last branch has landed, which all branches take.
        sigmas = course.solver.tail(course.sigmas, leaving[-1] + self.merge, course.shift)
        num_steps = len(sigmas) - 1
        builder = PlanBuilder(sigmas)
        noisy, euler, solver = _parting(builder, course, leaving, self.merge)
        waits: list[int] = []  # of each branch, the step at which it moves again
        for step in range(num_steps):
            has_trunk = step <= leaving[-1]
            parent, row, kept = [], [], []
            if step < leaving[-1]:  # the trunk goes on
                parent, row, kept = [0], [euler[step]], [False]
            for branch, moves in enumerate(waits):
                parent.append(has_trunk + branch)
                ready = solver[step] if step > leaving[-1] else euler[step]
                require(
                    not (moves == step and self.merge > 1 and builder.rows[ready][4] != 0),
                    "Comb.merge is above 1, which leaves a solver of second order without its last step; use Euler",
                )
                row.append(IDLE if step < moves else ready)
                kept.append(False)
            if step in leaving:
                parent += [0] * self.fan
                row += [noisy[step]] * self.fan
                kept += [course.keeps] * self.fan
                waits += [step + self.merge] * self.fan
            builder.step(step, row, parent, kept)
        return builder.plan(1, 1 if course.keeps else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class OneStepEach:
    """Every prompt has one stochastic step, drawn for it from those of `at`; all its samples take it there."""

    at: Window = field(default_factory=AllSteps)
    share_start: bool = False  # one start noise a group
    stages = ()  # no cuts

    @property
    def shares_start(self) -> bool:
        """As its field says."""
        return self.share_start

    def only_group_size(self, num_steps: int) -> int | None:
        """Any."""
        return None

    def num_candidates(self, group_size: int) -> int:
        """Every sample is finished."""
        return group_size

    def plan(self, course: Course) -> Plan:
        """As of `Topology`; a prompt's step is a function of (seed, iteration, its place in the batch)."""
        num_steps = len(course.sigmas) - 1
        choices = self.at.steps(num_steps, course.iteration, course.seed).stochastic
        require(bool(choices), "OneStepEach.at leaves no step stochastic; name those to draw from")
        require(
            len(course.solver.tail(course.sigmas, choices[0] + 1, course.shift)) == len(course.sigmas),
            "OneStepEach.at has a step of its own for every prompt; a solver cannot leave out steps after all of them: "
            "set its keep to 1",
        )
        generator = np.random.default_rng([course.seed, course.iteration, _OWN_STEP_STREAM])
        own = np.array(choices)[generator.integers(len(choices), size=course.num_prompts)]
        builder = PlanBuilder(course.sigmas)
        # The table has the rows of all steps that may be drawn, so that it is as long in every iteration.
        noisy, euler, solver = _parting(builder, course, choices)
        for step in range(num_steps):
            here = own == step
            row = np.where(here, noisy.get(step, 0), np.where(own < step, solver[step], euler[step]))
            if (row == row[0]).all():
                row, here = row[:1], here[:1]
            every = (len(row), course.group_size)
            builder.step(
                step,
                np.broadcast_to(row[:, None], every),
                range(course.group_size),
                np.broadcast_to(here[:, None] & course.keeps, every),
            )
        return builder.plan(course.group_size, 1 if course.keeps else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """Pro-GRPO's funnel: a prompt starts with `sizes[0]` candidates, and the batch shrinks on the way.

    Before step `steps[i]` a group of `sizes[i]` is cut to `sizes[i + 1]`; the last cut leaves `Recipe.group_size`.
    A cut reads the x0 prediction of the step before it and costs no network evaluation; one at the schedule's end
    reads finished samples. Survivors keep the transitions they have behind them, inside the window or not.

    `score` "reward": the rewards of decoded x0 predictions; "latents": the spread of pooled ones, no decode.
    `select` "variance": the subset whose scores vary most; "top_bottom": half the best, half the worst.
    """

    inner: Topology = field(default_factory=Independent)
    steps: tuple[int, ...] = (3,)
    sizes: tuple[int, ...] = (48,)
    select: Literal["variance", "top_bottom"] = "variance"
    score: Literal["reward", "latents"] = "reward"
    pool: int = 8  # side of a cell of pooled latents

    def __post_init__(self) -> None:
        """As many cuts as sizes; steps rise, groups shrink."""
        require(
            len(self.steps) == len(self.sizes) > 0,
            f"Cuts.steps names {len(self.steps)} steps and Cuts.sizes {len(self.sizes)} sizes; give one size per cut",
        )
        require(
            all(a < b for a, b in pairwise((0, *self.steps))),
            f"Cuts.steps is {self.steps}; its steps must rise, from 1",
        )
        require(
            all(a > b for a, b in pairwise((*self.sizes, 0))),
            f"Cuts.sizes is {self.sizes}; its sizes must fall",
        )
        require(
            self.sizes[0] <= _MOST,
            f"Cuts.sizes is {self.sizes}; a selection takes at most {_MOST} of a prompt",
        )
        one_of(self, ("variance", "top_bottom"), select=self.select)
        one_of(self, ("reward", "latents"), score=self.score)
        positive(self, pool=self.pool)
        require(
            self.score == "reward" or self.select == "variance",
            "Cuts.select is 'top_bottom', which needs score='reward'; latents have no best and no worst",
        )

    @property
    def shares_start(self) -> bool:
        """As the walk that is cut."""
        return self.inner.shares_start

    @property
    def at(self) -> Window:
        """As the walk that is cut."""
        return self.inner.at

    @property
    def stages(self) -> tuple[int, ...]:
        """As its field says."""
        return self.sizes

    def only_group_size(self, num_steps: int) -> int | None:
        """As the walk that is cut, whose shape the first cut's candidates fill."""
        return None

    def num_candidates(self, group_size: int) -> int:
        """What the first cut finds; refuses a group that the last one would not shrink to."""
        require(
            self.sizes[-1] > group_size,
            f"Cuts.sizes ends at {self.sizes[-1]}; it must be above group_size = {group_size}, "
            "which the last cut leaves",
        )
        return self.inner.num_candidates(self.sizes[0])

    def plan(self, course: Course) -> Plan:
        """As of `Topology`; every iteration's plan must hold the cuts, wherever its window stands."""
        num_steps = len(course.sigmas) - 1
        first_end = self.at.earliest_end(num_steps)
        fewest = len(course.solver.tail(course.sigmas, first_end, course.shift)) - 1
        require(
            self.steps[-1] <= fewest,
            f"Cuts.steps is {self.steps}, outside the schedule; with {fewest} steps the last cut is at "
            f"{fewest}, of finished samples",
        )
        start = self.at.latest_start(num_steps)
        require(
            not self.shares_start or self.steps[0] >= start + 2,
            f"Cuts.steps is {self.steps}, but a shared start makes a group's candidates equal until a stochastic "
            f"step, which may be step {start}; cut no earlier than at {start + 2}",
        )
        plan = self.inner.plan(course._replace(group_size=self.num_candidates(course.group_size)))
        left = dict(zip(self.steps, (*self.sizes[1:], course.group_size), strict=True))
        steps, size, width = [], self.sizes[0], plan.width
        for step in plan.steps:
            whole = step.kept.all() and len(step.parent) == self.sizes[0]
            parted = width == len(step.parent) == self.sizes[0] and not step.differs
            require(
                (whole or not step.is_kept) and (parted or step.step + 1 < self.steps[0]),
                f"Cuts.inner is a {type(self.inner).__name__}, whose samples share what a cut would take apart; cut "
                "Independent or SharedStart",
            )
            width = len(step.parent)
            if step.step >= self.steps[0]:
                step = replace(
                    step, row=step.row[:, :size], parent=step.parent[:size], kept=step.kept[:, :size]
                )
            size = left.get(step.step + 1, size)
            cut = Cut(size, self.select, self.score, self.pool) if step.step + 1 in left else None
            steps.append(replace(step, cut=cut))
        return replace(plan, steps=tuple(steps))


def ode_plan(sigmas: Array, solver: Solver | None = None, group_size: int = 1) -> Plan:
    """A deterministic walk, of Euler steps unless said otherwise: for evaluation, sampling and scouts."""
    rule, builder = solver or Euler(), PlanBuilder(sigmas)
    for step in range(len(sigmas) - 1):
        builder.step(step, builder.row(rule.row(sigmas, step, step + 1), step, step + 1), range(group_size))
    return builder.plan(group_size, 0)
