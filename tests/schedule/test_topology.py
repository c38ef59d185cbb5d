"""Every topology's plan: invariants that hold for all of them, and each shape against its definition.

The plan is followed row by row (`follow`): every child must take a row of the table that begins where its parent is,
read an x0 prediction only where one was made the step before, and end at the sample. It is then walked in numpy
(`walked`), and each sample compared with the path that its topology defines, written out a sample at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrpo_fast.schedule.dynamics import CPS, DPMSolver2M, Euler, FlowSDE
from flowgrpo_fast.schedule.plan import IDLE, Cut, Plan
from flowgrpo_fast.schedule.sigmas import Sigmas, respaced_tail
from flowgrpo_fast.schedule.topology import (
    Comb,
    Course,
    Cuts,
    Independent,
    OneStepEach,
    SharedStart,
    Tree,
)
from flowgrpo_fast.schedule.windows import (
    AllSteps,
    Deterministic,
    EarlySteps,
    FractionOfSteps,
    FrozenWindow,
    RandomPair,
    RandomWindow,
    SlidingWindow,
)


def course(num_steps: int = 10, **changes) -> Course:
    shift = changes.pop("shift", 3.0)
    return Course(
        **(
            {
                "sigmas": Sigmas(num_inference_steps=num_steps, shift=shift).grid(),
                "shift": shift,
                "dynamics": FlowSDE(noise_level=0.7),
                "solver": Euler(),
                "iteration": 0,
                "seed": 0,
                "num_prompts": 3,
                "group_size": 4,
            }
            | changes
        )
    )


class Followed(NamedTuple):
    """What following a plan finds."""

    evaluations: int  # of one prompt
    kept: list[
        list[tuple[int, int]]
    ]  # of each prompt and finished sample: (place, row) of kept edges on its way
    noisy: list[list[int]]  # of each prompt and finished sample: rows with noise on its way


def follow(plan: Plan, num_prompts: int) -> Followed:
    """Checks the plan's invariants; returns counts that were made a row at a time."""
    num_steps = len(plan.sigmas) - 1
    sigma = plan.sigmas.double().numpy()
    ends = np.array(
        [
            int(np.argmin(np.abs(sigma - (sigma[start] - float(gap)))))
            for start, gap in zip(plan.starts, plan.interval.tolist(), strict=True)
        ]
    )
    np.testing.assert_allclose(plan.coeffs[:, 0], plan.sigmas[plan.starts], rtol=1e-6)
    assert (ends > plan.starts).all()
    evaluations = 0
    for prompt in range(num_prompts):
        at = [0] * plan.width  # the step at which each row is
        x0_of: list[int | None] = [
            None
        ] * plan.width  # the step whose x0 prediction each row has, made just before
        paths: list[list[tuple[int, int]]] = [[] for _ in range(plan.width)]
        for place, step in enumerate(plan.steps):
            row, kept = (values[prompt if len(values) > 1 else 0] for values in (step.row, step.kept))
            assert len(row) == len(kept) == len(step.parent)
            assert len(step.row) in (1, num_prompts)
            assert set(step.parent.tolist()) == set(range(len(at))), "every row has a child"
            asked, new_at, new_x0, new_paths = set(), [], [], []
            for child, parent in enumerate(step.parent):
                if row[child] == IDLE:
                    assert not kept[child]
                    assert at[parent] > step.step, "it waits where it is already ahead"
                    new_at.append(at[parent])
                    new_x0.append(None)
                    new_paths.append(paths[parent])
                    continue
                assert plan.starts[row[child]] == at[parent] == step.step
                if plan.history[row[child]]:
                    assert x0_of[parent] == step.step - 1, "the step before made its x0 prediction"
                    assert plan.reads_x0(place)
                    assert plan.gives_x0(place - 1)
                assert not kept[child] or plan.coeffs[row[child], 3] > 0 or plan.num_trained == 2
                asked.add(int(parent))
                new_at.append(int(ends[row[child]]))
                new_x0.append(step.step)
                new_paths.append([*paths[parent], (place, int(row[child]))])
            if prompt == 0:
                evaluations += len(asked)
            assert asked <= set(step.heads.tolist())
            at, x0_of, paths = new_at, new_x0, new_paths
            if step.cut:
                assert step.cut.size < len(at)
                at, x0_of, paths = at[: step.cut.size], x0_of[: step.cut.size], paths[: step.cut.size]
        assert at == [num_steps] * plan.group_size, "every sample is finished"
    kept_of, noisy_of = [], []
    for prompt in range(num_prompts):
        kept, noisy = [], []
        for path in way_of(plan, prompt):
            kept.append([(place, row) for place, row, is_kept in path if is_kept])
            noisy.append([row for _, row, _ in path if plan.coeffs[row, 3] > 0])
        kept_of += kept
        noisy_of += noisy
    assert plan.evaluations(num_prompts) == num_prompts * evaluations
    return Followed(evaluations, kept_of, noisy_of)


def way_of(plan: Plan, prompt: int) -> list[list[tuple[int, int, bool]]]:
    """Of each finished sample, the moves on its way: (place, row, whether it is kept). Cuts keep the first ones."""
    paths: list[list[tuple[int, int, bool]]] = [[] for _ in range(plan.width)]
    for place, step in enumerate(plan.steps):
        row, kept = (values[prompt if len(values) > 1 else 0] for values in (step.row, step.kept))
        paths = [
            paths[parent] + ([(place, int(row[child]), bool(kept[child]))] if row[child] != IDLE else [])
            for child, parent in enumerate(step.parent)
        ]
        paths = paths[: step.cut.size] if step.cut else paths
    return paths


def check_behind(plan: Plan) -> None:
    """`behind`, `roots` and `candidates` against the leaves that each row reaches, found from the front."""
    place = 0
    while place < len(plan.steps):  # each stretch up to a cut is numbered by itself
        stop = next((p for p in range(place, len(plan.steps)) if plan.steps[p].cut), len(plan.steps) - 1)
        # Of each row before step `place`, the way of each child of the last step of the stretch.
        width = plan.width if place == 0 else plan.steps[place - 1].cut.size
        ancestors = [[root] for root in range(width)]
        for step in plan.steps[place : stop + 1]:
            ancestors = [[*ancestors[parent], child] for child, parent in enumerate(step.parent)]
        for offset in range(place, stop + 1):
            found = {}
            for leaf, way in enumerate(ancestors):
                found.setdefault(way[offset - place + 1], set()).add(leaf)
            behind = plan.behind()[offset]
            assert {child: set(leaves) for child, leaves in enumerate(behind)} == found
            assert sum(map(len, behind)) == len(ancestors) == plan.candidates()[offset]
        if place == 0:
            assert all(ancestors[leaf][0] == root for root, leaf in enumerate(plan.roots()))
        place = stop + 1
    # A cut that is the schedule's end leaves nothing after it.
    assert plan.num_candidates == plan.candidates()[0]


def walked(plan: Plan, prompt: int, noise: Callable[[int, int], float], same_start: bool) -> np.ndarray:
    """The samples of one prompt, a number each, along the plan: the arithmetic of the walk in fp64."""
    coeffs = plan.coeffs.double().numpy()
    roots, behind = plan.roots(), plan.behind()
    x = np.array([start_of(0 if same_start else int(root)) for root in roots])
    x0 = np.zeros(plan.width)
    for place, step in enumerate(plan.steps):
        row = step.row[prompt if len(step.row) > 1 else 0]
        new, new_x0 = np.empty(len(row)), np.zeros(len(row))
        for child, parent in enumerate(step.parent):
            if row[child] == IDLE:
                new[child] = x[parent]
                continue
            sigma, a, b, c, d, *_ = coeffs[row[child]]
            velocity = field_at(x[parent], sigma)
            new[child] = a * x[parent] + b * velocity + d * x0[parent]
            new[child] += c * noise(behind[place][child][0], int(row[child])) if c else 0.0
            new_x0[child] = x[parent] - sigma * velocity
        x, x0 = new, new_x0
    return x


def start_of(sample: int) -> float:
    return 0.3 + 0.1 * sample


def field_at(x: float, sigma: float) -> float:
    return float(np.tanh(x) * (1 + sigma))


def path(
    sigmas: np.ndarray, x: float, moves: list[tuple[object, int, int]], noise: Callable[[int], float]
) -> float:
    """One sample by itself: (rule, step, to) in turn, each by the published row."""
    x0_prev = 0.0
    for rule, step, to in moves:
        sigma, a, b, c, d, *_ = rule.row(sigmas, step, to)
        velocity = field_at(x, sigma)
        x, x0_prev = a * x + b * velocity + c * noise(step) + d * x0_prev, x - sigma * velocity
    return x


WINDOWS = st.sampled_from(
    [
        AllSteps(),
        EarlySteps(size=3),
        FractionOfSteps(fraction=0.5),
        FrozenWindow(size=3, start=0),
        FrozenWindow(size=1, start=4),
        FrozenWindow(size=2, start=2),
        RandomWindow(size=2),
        SlidingWindow(size=3, every=2),
    ]
)
SOLVERS = st.sampled_from([Euler(), DPMSolver2M(), DPMSolver2M(keep=0.5), DPMSolver2M(variant="heun")])


# ----------------------------------------------------------------------------------------------- Independent


@settings(max_examples=60, deadline=None)
@given(
    window=WINDOWS,
    solver=SOLVERS,
    num_steps=st.integers(6, 12),
    group_size=st.integers(1, 6),
    iteration=st.integers(0, 30),
)
def test_independent(window, solver, num_steps: int, group_size: int, iteration: int) -> None:
    setting = course(num_steps, solver=solver, group_size=group_size, iteration=iteration)
    plan = Independent(at=window).plan(setting)
    found, wanted = follow(plan, 1), window.steps(num_steps, iteration, 0)
    check_behind(plan)
    walked_steps = len(plan.steps)
    assert found.evaluations == group_size * walked_steps
    assert (plan.width, plan.group_size, plan.num_trained) == (group_size, group_size, wanted.num_trained)
    assert plan.kept == wanted.kept
    for kept, noisy in zip(found.kept, found.noisy, strict=True):
        assert [place for place, _ in kept] == list(wanted.kept)
        assert noisy == list(wanted.stochastic)
    # Euler up to the window's end, the solver after it, on its own steps.
    end = wanted.stochastic[-1] + 1
    sigmas = solver.tail(setting.sigmas, end, setting.shift)
    assert walked_steps == len(sigmas) - 1
    for step in range(walked_steps):
        rule = FlowSDE(noise_level=0.7) if step in wanted.stochastic else Euler() if step < end else solver
        np.testing.assert_array_equal(plan.coeffs[step], np.float32(rule.row(sigmas, step, step + 1)))


def test_independent_without_a_log_prob_keeps_nothing() -> None:
    for window in (AllSteps(), Deterministic()):
        plan = Independent(at=window).plan(course(keeps=False))
        assert plan.kept == ()
        assert plan.num_trained == 0
        follow(plan, 1)


@pytest.mark.parametrize("solver", [Euler(), DPMSolver2M()])
def test_a_random_pair_keeps_two_states_of_a_deterministic_walk(solver) -> None:
    pairs = set()
    for iteration in range(40):
        plan = Independent(at=RandomPair(low=1, high=8)).plan(course(iteration=iteration, solver=solver))
        found = follow(plan, 1)
        assert len(plan.kept) == plan.num_trained == 2
        assert plan.kept[0] < plan.kept[1] < 8
        assert plan.kept[0] >= 1
        assert all([place for place, _ in kept] == list(plan.kept) for kept in found.kept)
        assert found.noisy == [[]] * 4
        assert (plan.coeffs[:, 3] == 0).all()
        pairs.add(plan.kept)
    assert len(pairs) > 10


# ----------------------------------------------------------------------------------------------- SharedStart


@settings(max_examples=60, deadline=None)
@given(
    window=WINDOWS,
    solver=SOLVERS,
    num_steps=st.integers(6, 12),
    group_size=st.integers(2, 6),
    iteration=st.integers(0, 30),
    share_prefix=st.booleans(),
    whole_groups=st.booleans(),
)
def test_shared_start(
    window, solver, num_steps, group_size, iteration, share_prefix: bool, whole_groups: bool
) -> None:
    """One row until the first stochastic step: the numbers of a group whose members compute all by themselves."""
    setting = course(
        num_steps, solver=solver, group_size=group_size, iteration=iteration, whole_groups=whole_groups
    )
    plan = SharedStart(at=window, share_prefix=share_prefix).plan(setting)
    alone = Independent(at=window).plan(setting)
    found, wanted = follow(plan, 1), window.steps(num_steps, iteration, 0)
    check_behind(plan)
    assert np.array_equal(plan.coeffs, alone.coeffs)
    assert (plan.kept, plan.num_trained) == (alone.kept, alone.num_trained)
    assert found.kept == follow(alone, 1).kept
    # How many rows each step has, by its definition.
    first = wanted.stochastic[0]
    if not share_prefix:
        shared = 0
    elif whole_groups and wanted.num_trained == len(wanted.stochastic) == len(wanted.kept):
        shared = first + 1  # the first stochastic step too asks for one velocity
    else:
        shared = first
    assert found.evaluations == shared + group_size * (len(plan.steps) - shared)
    assert plan.width == (1 if shared else group_size)
    assert [len(step.heads) for step in plan.steps] == [1] * shared + [group_size] * (
        len(plan.steps) - shared
    )
    noise = lambda sample, row: 0.1 * (1 + sample) * (1 + row)  # noqa: E731
    mine, theirs = (walked(p, 0, noise, same_start=True) for p in (plan, alone))
    np.testing.assert_array_equal(mine, theirs)


# ------------------------------------------------------------------------------------------------------ Tree


@settings(max_examples=40, deadline=None)
@given(
    fan=st.integers(2, 3),
    depth=st.integers(1, 4),
    start=st.integers(0, 4),
    num_steps=st.integers(9, 12),
    solver=SOLVERS,
)
def test_tree(fan: int, depth: int, start: int, num_steps: int, solver) -> None:
    leaves = fan**depth
    topology = Tree(at=FrozenWindow(size=depth, start=start), fan=fan)
    setting = course(num_steps, solver=solver, group_size=leaves)
    assert topology.only_group_size(num_steps) == leaves
    plan = topology.plan(setting)
    found = follow(plan, 1)
    check_behind(plan)
    assert (plan.width, plan.group_size, plan.num_trained) == (1, leaves, depth)
    window = range(start, start + depth)
    assert plan.kept == tuple(window)
    # Each step is asked at as many rows as there are before it.
    rows = [fan ** min(max(step - start, 0), depth) for step in range(len(plan.steps))]
    assert found.evaluations == sum(rows)
    assert [len(step.heads) for step in plan.steps] == rows
    for level, step in enumerate(window):
        assert plan.steps[step].parent.tolist() == [child // fan for child in range(rows[step] * fan)]
        behind = fan ** (depth - level - 1)
        assert plan.behind()[step] == tuple(
            tuple(range(edge * behind, (edge + 1) * behind)) for edge in range(fan ** (level + 1))
        )
    for kept, noisy in zip(found.kept, found.noisy, strict=True):
        assert kept == [(step, step) for step in window]
        assert noisy == list(window)
    # Every leaf is the path that it would be by itself, an edge's noise being that of the first leaf behind it.
    samples = walked(plan, 0, lambda sample, row: 0.01 * (1 + sample) * (1 + row), same_start=True)
    end = start + depth
    sigmas = solver.tail(setting.sigmas, end, setting.shift)
    for leaf in range(leaves):
        moves = [
            (
                FlowSDE(noise_level=0.7) if step in window else Euler() if step < end else solver,
                step,
                step + 1,
            )
            for step in range(len(sigmas) - 1)
        ]
        first = lambda step: leaf // fan ** (end - step - 1) * fan ** (end - step - 1)  # noqa: B023, E731
        expected = path(
            sigmas,
            start_of(0),
            moves,
            lambda step: 0.01 * (1 + first(step)) * (1 + step),  # noqa: B023
        )
        assert samples[leaf] == pytest.approx(expected, rel=1e-5, abs=1e-7)


# ------------------------------------------------------------------------------------------------------ Comb


@settings(max_examples=60, deadline=None)
@given(
    fan=st.integers(1, 3),
    size=st.integers(1, 4),
    start=st.integers(0, 3),
    merge=st.integers(1, 4),
    num_steps=st.integers(9, 12),
    solver=st.sampled_from([Euler(), DPMSolver2M(), DPMSolver2M(keep=0.5)]),
)
def test_comb(fan: int, size: int, start: int, merge: int, num_steps: int, solver) -> None:
    setting = course(num_steps, solver=solver, group_size=fan * size)
    topology = Comb(at=FrozenWindow(size=size, start=start), fan=fan, merge=merge)
    assert topology.only_group_size(num_steps) == fan * size
    leaving, last = range(start, start + size), start + size - 1
    landed = last + merge
    if landed >= num_steps:
        with pytest.raises(ValueError, match=f"Comb.merge is {merge}: a step from {last} would end at"):
            topology.plan(setting)
        return
    sigmas = solver.tail(setting.sigmas, landed, setting.shift)
    total = len(sigmas) - 1
    solver_rows = [solver.row(sigmas, step, step + 1) for step in range(total)]
    # A branch that begins to move again after the trunk's end takes the solver's row, whose step before it has not.
    first_moves = [step + merge for step in leaving if step + merge > last]
    if merge > 1 and any(solver_rows[step][4] != 0 for step in first_moves):
        with pytest.raises(ValueError, match=r"Comb.merge is above 1, which leaves a solver of second order"):
            topology.plan(setting)
        return
    plan = topology.plan(setting)
    found = follow(plan, 1)
    check_behind(plan)
    assert (plan.width, plan.group_size, plan.num_trained) == (1, fan * size, 1)
    assert plan.kept == tuple(leaving)
    assert len(plan.steps) == total

    # Counted by hand: the trunk at every step up to the last branching, each branch at the steps after it landed.
    branches = sum(fan * (total - (step + merge)) for step in leaving)
    assert found.evaluations == (last + 1) + branches
    for sample, (kept, noisy) in enumerate(zip(found.kept, found.noisy, strict=True)):
        step = leaving[sample // fan]
        ((place, row),) = kept
        assert noisy == [row]
        assert place == row == step  # noise is that of the step, as in any other walk
        merged = FlowSDE(noise_level=0.7).row(sigmas, step, step + merge)
        np.testing.assert_array_equal(plan.coeffs[row], np.float32(merged))
        assert float(plan.interval[row]) == pytest.approx(sigmas[step] - sigmas[step + merge], rel=1e-5)

    samples = walked(plan, 0, lambda sample, row: 0.2 * (1 + sample), same_start=True)
    for sample in range(fan * size):
        step = leaving[sample // fan]
        moves = [(Euler(), k, k + 1) for k in range(step)]
        moves += [(FlowSDE(noise_level=0.7), step, step + merge)]
        moves += [(Euler() if k <= last else solver, k, k + 1) for k in range(step + merge, total)]
        expected = path(sigmas, start_of(0), moves, lambda k: 0.2 * (1 + sample))  # noqa: B023
        assert samples[sample] == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_branches_rest_until_the_others_are_where_they_are() -> None:
    """Two branches leave at step 1 by a merged step of 3; two at step 2; the trunk ends there."""
    plan = Comb(at=FrozenWindow(size=2, start=1), fan=2, merge=3).plan(course(8))
    assert [len(step.parent) for step in plan.steps] == [1, 3, 4, 4, 4, 4, 4, 4]
    idle = [(step.row[0] == IDLE).tolist() for step in plan.steps]
    assert idle[1] == [False] * 3
    assert idle[2] == [True, True, False, False]  # the first two have landed at step 4 already
    assert idle[3] == [True] * 4  # nobody moves, and nobody is asked
    assert idle[4] == [False, False, True, True]
    assert not any(map(any, idle[5:]))
    assert [len(step.heads) for step in plan.steps] == [1, 1, 1, 0, 2, 4, 4, 4]
    assert plan.evaluations(2) == 2 * 17


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_a_comb_follows_a_second_order_solver_where_nobody_rested(keep: float) -> None:
    solver = DPMSolver2M(keep=keep)
    plan = Comb(at=FrozenWindow(size=2, start=1), fan=2).plan(course(10, solver=solver))
    sigmas = respaced_tail(course(10).sigmas, 3, int(7 * keep), 3.0)
    assert len(plan.steps) == len(sigmas) - 1 == 3 + int(7 * keep)
    assert [plan.reads_x0(place) for place in range(len(plan.steps))] == [False] * 3 + [True] * (
        int(7 * keep) - 1
    ) + [False]
    samples = walked(plan, 0, lambda sample, row: 0.2 * (1 + sample), same_start=True)
    for sample in range(4):
        step = 1 + sample // 2
        moves = [
            (FlowSDE(noise_level=0.7) if k == step else Euler() if k < 3 else solver, k, k + 1)
            for k in range(len(sigmas) - 1)
        ]
        expected = path(sigmas, start_of(0), moves, lambda k: 0.2 * (1 + sample))  # noqa: B023
        assert samples[sample] == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_a_solver_of_second_order_is_refused_only_where_it_would_read_what_is_not_there() -> None:
    topology = Comb(at=FrozenWindow(size=2, start=1), fan=2, merge=2)
    with pytest.raises(ValueError, match=r"Comb.merge is above 1, .* use Euler"):
        topology.plan(course(8, solver=DPMSolver2M()))
    # Landing before the last step, which is of first order and needs no history.
    late = Comb(at=FrozenWindow(size=1, start=3), fan=2, merge=2)
    follow(late.plan(course(6, solver=DPMSolver2M(), group_size=2)), 1)


# ----------------------------------------------------------------------------------------------- OneStepEach


@settings(max_examples=40, deadline=None)
@given(
    window=st.sampled_from([AllSteps(), FrozenWindow(size=3, start=2), RandomWindow(size=4)]),
    solver=st.sampled_from([Euler(), DPMSolver2M(), DPMSolver2M(variant="heun")]),
    num_prompts=st.integers(1, 6),
    group_size=st.integers(2, 4),
    iteration=st.integers(0, 30),
    share_start=st.booleans(),
)
def test_one_step_each(window, solver, num_prompts, group_size, iteration, share_start: bool) -> None:
    setting = course(9, solver=solver, num_prompts=num_prompts, group_size=group_size, iteration=iteration)
    topology = OneStepEach(at=window, share_start=share_start)
    assert topology.shares_start == share_start
    plan = topology.plan(setting)
    found = follow(plan, num_prompts)
    check_behind(plan)
    assert found.evaluations == group_size * 9
    assert (plan.width, plan.group_size, plan.num_trained) == (group_size, group_size, 1)
    choices = window.steps(9, iteration, 0).stochastic
    own = []
    for prompt in range(num_prompts):
        group = slice(prompt * group_size, (prompt + 1) * group_size)
        steps = {place for kept in found.kept[group] for place, _ in kept}
        assert len(steps) == 1, "all samples of a prompt take the same one"
        (step,) = steps
        assert step in choices
        assert {row for kept in found.kept[group] for _, row in kept} == {step}  # and so its noise
        assert all(
            noisy == [row] for noisy, ((_, row),) in zip(found.noisy[group], found.kept[group], strict=True)
        )
        own.append(step)
        part = plan.of_prompts(prompt, 1)
        assert part.kept == (step,)
        samples = walked(plan, prompt, lambda sample, row: 0.2 * (1 + sample), same_start=share_start)
        np.testing.assert_array_equal(
            samples, walked(part, 0, lambda sample, row: 0.2 * (1 + sample), same_start=share_start)
        )
        moves = [
            (FlowSDE(noise_level=0.7) if k == step else Euler() if k < step else solver, k, k + 1)
            for k in range(9)
        ]
        for sample in range(group_size):
            begin = start_of(0 if share_start else sample)
            expected = path(setting.sigmas, begin, moves, lambda k: 0.2 * (1 + sample))  # noqa: B023
            assert samples[sample] == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert plan.kept == tuple(sorted(set(own)))
    # A prompt's step is a function of its place: more prompts change nothing for the first ones.
    more = topology.plan(setting._replace(num_prompts=num_prompts + 2))
    for prompt, step in enumerate(own):
        assert more.of_prompts(prompt, 1).kept == (step,)


def test_prompts_draw_their_steps_evenly_and_anew_each_iteration() -> None:
    topology = OneStepEach(at=FrozenWindow(size=4, start=1))
    plans = [topology.plan(course(8, num_prompts=50, iteration=i)) for i in range(40)]
    drawn = [[plan.of_prompts(prompt, 1).kept[0] for prompt in range(50)] for plan in plans]
    assert drawn[0] != drawn[1]
    counts = np.bincount(np.ravel(drawn), minlength=6)
    assert counts[[0, 5]].sum() == 0
    assert ((counts[1:5] > 410) & (counts[1:5] < 590)).all()  # 500 expected, standard deviation 19
    # The table never changes, so that what was captured on a GPU stays valid.
    assert all(np.array_equal(plan.coeffs, plans[0].coeffs) for plan in plans)
    again = topology.plan(course(8, num_prompts=50, iteration=7))
    assert [again.of_prompts(prompt, 1).kept[0] for prompt in range(50)] == drawn[7]


# ------------------------------------------------------------------------------------------------------ Cuts


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.integers(1, 10), min_size=1, max_size=3, unique=True).map(sorted),
    solver=st.sampled_from([Euler(), DPMSolver2M()]),
    window=st.sampled_from([AllSteps(), FrozenWindow(size=3, start=1), SlidingWindow(size=2, every=2)]),
    iteration=st.integers(0, 12),
)
def test_cuts(steps, solver, window, iteration: int) -> None:
    sizes = tuple(range(4 + 3 * len(steps), 4, -3))
    topology = Cuts(inner=Independent(at=window), steps=tuple(steps), sizes=sizes)
    setting = course(10, solver=solver, iteration=iteration)
    assert topology.num_candidates(4) == sizes[0]
    assert topology.stages == sizes
    plan = topology.plan(setting)
    follow(plan, 1)
    check_behind(plan)
    left = dict(zip(steps, [*sizes[1:], 4], strict=True))
    assert plan.cuts == tuple(
        (step - 1, Cut(left[step], "variance", "reward", 8)) for step in steps
    )  # before step k is after the one before it
    under_way, expected = sizes[0], []
    for step in range(10):
        expected.append(under_way)
        under_way = left.get(step + 1, under_way)
    assert list(plan.candidates()) == expected
    assert plan.evaluations(2) == 2 * sum(expected)
    assert (plan.num_candidates, plan.group_size, plan.width) == (sizes[0], 4, sizes[0])
    assert all(plan.gives_x0(place) for place, _ in plan.cuts)
    assert plan.kept == window.steps(10, iteration, 0).stochastic


def test_cuts_of_a_shared_start_come_after_the_group_has_parted() -> None:
    inner = SharedStart(at=FrozenWindow(size=2, start=2))
    plan = Cuts(inner=inner, steps=(4, 6), sizes=(12, 8)).plan(course(10))
    found = follow(plan, 1)
    check_behind(plan)
    assert [len(step.parent) for step in plan.steps] == [1, 1, 12, 12, 8, 8, 4, 4, 4, 4]
    assert list(plan.candidates()) == [12, 12, 12, 12, 8, 8, 4, 4, 4, 4]
    assert found.evaluations == 1 + 1 + 1 + 12 + 8 + 8 + 4 * 4
    assert plan.width == 1
    assert Cuts(inner=inner, sizes=(12,)).shares_start


# -------------------------------------------------------------------------------------------------- refusals


@dataclass(frozen=True, slots=True, kw_only=True)
class Scattered:
    """A user's own window, whose steps need not be neighbours."""

    at: tuple[int, ...] = field(default=(1, 4))

    def steps(self, num_steps: int, iteration: int, seed: int):
        from flowgrpo_fast.schedule.windows import WindowSteps

        return WindowSteps(self.at, len(self.at))

    def latest_start(self, num_steps: int) -> int:
        return self.at[0]

    def earliest_end(self, num_steps: int) -> int:
        return self.at[-1] + 1


@pytest.mark.parametrize(
    ("topology", "group_size"),
    [
        (Independent(at=Scattered()), 3),
        (SharedStart(at=Scattered()), 3),
        (Tree(at=Scattered()), 4),
        (Comb(at=Scattered(), merge=2), 4),
        (OneStepEach(at=Scattered()), 3),
        (Cuts(inner=Independent(at=Scattered()), steps=(3,), sizes=(8,)), 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_users_own_window_is_used_like_ours(topology, group_size: int) -> None:
    setting = course(9, group_size=group_size, dynamics=CPS(noise_level=0.8))
    plan = topology.plan(setting)
    found = follow(plan, 3)
    check_behind(plan)
    assert {place for kept in found.kept for place, _ in kept} <= {1, 4}
    rows = sorted({row for kept in found.kept for _, row in kept})
    for row in rows:
        assert float(plan.coeffs[row, 5]) == 2.0  # CPS scores without its variance


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tree(fan=1), "Tree.fan is 1; it must be at least 2"),
        (lambda: Comb(fan=0), "Comb.fan is 0; it must be above 0"),
        (lambda: Comb(merge=0), "Comb.merge is 0; it must be above 0"),
        (
            lambda: SharedStart(at=Deterministic()).plan(course()),
            "SharedStart.at leaves no step stochastic; .* use Independent",
        ),
        (
            lambda: SharedStart(at=RandomPair()).plan(course()),
            "SharedStart.at leaves no step stochastic; .* use Independent",
        ),
        (
            lambda: Tree(at=Deterministic()).plan(course(group_size=1)),
            "Tree.at trains 0 of 0 stochastic steps; a tree trains all, at least one",
        ),
        (
            lambda: Tree(at=EarlySteps(size=2)).plan(course()),
            "Tree.at trains 2 of 9 stochastic steps; a tree trains all, at least one",
        ),
        (
            lambda: Tree(at=FrozenWindow(size=3)).plan(course(group_size=4)),
            "Tree has 2 children at 3 steps, .* 8 leaves .* group_size is 4: set group_size=8",
        ),
        (
            lambda: Tree(at=FrozenWindow(size=2)).plan(course(whole_groups=False)),
            "Tree: an optimiser step takes whole trees; set optimizer.partition=groups, and make",
        ),
        (lambda: Comb(at=Deterministic()).plan(course()), "Comb.at leaves no step stochastic"),
        (
            lambda: Comb(at=FrozenWindow(size=3)).plan(course(group_size=4)),
            "Comb has 2 branches at 3 steps, .* 6 samples .* group_size is 4: set group_size=6",
        ),
        (
            lambda: Comb(at=FrozenWindow(size=2, start=6), merge=3).plan(course()),
            "Comb.merge is 3: a step from 7 would end at the sample; merge at most 2, or leave earlier",
        ),
        (
            lambda: Comb(at=FrozenWindow(size=2)).plan(course(whole_groups=False)),
            "Comb: an optimiser step takes whole combs; set optimizer.partition=groups, and make",
        ),
        (lambda: OneStepEach(at=Deterministic()).plan(course()), "OneStepEach.at leaves no step stochastic"),
        (
            lambda: OneStepEach().plan(course(solver=DPMSolver2M(keep=0.4))),
            "OneStepEach.at has a step of its own for every prompt; .* set its keep to 1",
        ),
        (lambda: Cuts(steps=(1, 2), sizes=(9,)), "Cuts.steps names 2 steps and Cuts.sizes 1 sizes; give one"),
        (lambda: Cuts(steps=(), sizes=()), "Cuts.steps names 0 steps and Cuts.sizes 0 sizes; give one"),
        (lambda: Cuts(steps=(3, 3), sizes=(9, 8)), r"Cuts.steps is \(3, 3\); its steps must rise, from 1"),
        (lambda: Cuts(steps=(0,), sizes=(9,)), r"Cuts.steps is \(0,\); its steps must rise, from 1"),
        (lambda: Cuts(steps=(1, 2), sizes=(8, 9)), r"Cuts.sizes is \(8, 9\); its sizes must fall"),
        (lambda: Cuts(sizes=(0,)), r"Cuts.sizes is \(0,\); its sizes must fall"),
        (lambda: Cuts(sizes=(1025,)), r"Cuts.sizes is \(1025,\); a selection takes at most 1024 of a prompt"),
        (lambda: Cuts(select="best"), "Cuts.select is 'best'; it must be 'variance' or 'top_bottom'"),
        (lambda: Cuts(score="images"), "Cuts.score is 'images'; it must be 'reward' or 'latents'"),
        (lambda: Cuts(pool=0), "Cuts.pool is 0; it must be above 0"),
        (
            lambda: Cuts(select="top_bottom", score="latents"),
            "Cuts.select is 'top_bottom', which needs score='reward'; latents have no best",
        ),
        (
            lambda: Cuts(sizes=(4,)).plan(course(group_size=4)),
            "Cuts.sizes ends at 4; it must be above group_size = 4, which the last cut leaves",
        ),
        (
            lambda: Cuts(steps=(11,)).plan(course()),
            r"Cuts.steps is \(11,\), outside the schedule; with 10 steps the last cut is at 10",
        ),
        (
            lambda: Cuts(inner=SharedStart(at=FrozenWindow(size=2, start=2)), steps=(3,)).plan(course()),
            r"Cuts.steps is \(3,\), but a shared start .* may be step 2; cut no earlier than at 4",
        ),
        (
            lambda: Cuts(inner=Tree(at=FrozenWindow(size=3, start=3)), steps=(5,), sizes=(8,)).plan(course()),
            "Cuts.inner is a Tree, .* cut Independent or SharedStart",
        ),
        (
            lambda: Cuts(inner=Tree(at=FrozenWindow(size=3, start=1)), steps=(8,), sizes=(8,)).plan(course()),
            "Cuts.inner is a Tree, .* cut Independent or SharedStart",
        ),
        (
            lambda: Cuts(inner=Comb(at=FrozenWindow(size=3), fan=3), steps=(8,), sizes=(9,)).plan(course()),
            "Cuts.inner is a Comb, .* cut Independent or SharedStart",
        ),
        (
            lambda: Cuts(inner=OneStepEach(), steps=(8,), sizes=(9,)).plan(course()),
            "Cuts.inner is a OneStepEach, .* cut Independent or SharedStart",
        ),
    ],
)
def test_refusals_name_value_and_remedy(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_the_solvers_tail_is_counted_where_cuts_are_checked() -> None:
    """Every iteration's walk must be long enough: the shortest one decides."""
    window = SlidingWindow(size=2, every=1)
    topology = Cuts(inner=Independent(at=window), steps=(6,), sizes=(8,))
    short = course(
        10, solver=DPMSolver2M(keep=0.4)
    )  # 2 + round(8 * 0.4) - 1 = 4 steps at the first iteration
    with pytest.raises(ValueError, match=r"outside the schedule; with 4 steps the last cut is at 4"):
        topology.plan(short._replace(iteration=5))
    plan = Cuts(inner=Independent(at=window), steps=(4,), sizes=(8,)).plan(short)
    assert plan.cuts == ((3, Cut(4, "variance", "reward", 8)),)
