"""The records of a plan, on small plans written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowgrpo_fast.schedule.dynamics import DPMSolver2M, Euler, FlowSDE
from flowgrpo_fast.schedule.plan import IDLE, Cut, Plan, PlanBuilder, StepPlan
from flowgrpo_fast.schedule.sigmas import Sigmas
from flowgrpo_fast.schedule.topology import ode_plan

SIGMAS = np.linspace(1, 0, 4)


def fork() -> Plan:
    """Two roots; the first forks into a noisy child and one that waits; then all but that one move; then it too."""
    builder = PlanBuilder(SIGMAS)
    euler = [builder.euler(step) for step in range(3)]
    noisy = builder.row(FlowSDE().row(SIGMAS, 0, 2), 0, 2)
    builder.step(0, [noisy, euler[0], euler[0]], [0, 0, 1], [True, False, False])
    builder.step(1, [IDLE, euler[1], euler[1]], [0, 1, 2])
    builder.step(2, euler[2], [0, 1, 2])
    return builder.plan(2, 1)


def test_a_row_knows_where_it_begins_and_ends() -> None:
    plan = fork()
    assert plan.starts.tolist() == [0, 1, 2, 0]
    np.testing.assert_allclose(plan.interval, [1 / 3, 1 / 3, 1 / 3, 2 / 3], rtol=1e-6)
    assert plan.coeffs.dtype == torch.float32
    np.testing.assert_array_equal(plan.coeffs[3], np.float32(FlowSDE().row(SIGMAS, 0, 2)))
    assert torch.equal(plan.sigmas, torch.from_numpy(SIGMAS).float())


def test_who_is_asked_and_who_is_kept() -> None:
    plan = fork()
    assert [step.heads.tolist() for step in plan.steps] == [[0, 1], [1, 2], [0, 1, 2]]
    assert [step.kept_heads.tolist() for step in plan.steps] == [[0], [], []]
    assert [step.kept_rows.tolist() for step in plan.steps] == [[3], [], []]
    assert [step.is_kept for step in plan.steps] == [True, False, False]
    assert not any(step.differs for step in plan.steps)
    assert plan.kept == (0,)
    assert plan.evaluations(1) == 2 + 2 + 3
    assert plan.evaluations(5) == 5 * 7
    assert plan.group_size == plan.num_candidates == 3
    assert list(plan.candidates()) == [3, 3, 3]


def test_the_samples_behind_each_child_and_root() -> None:
    plan = fork()
    assert plan.behind() == (((0,), (1,), (2,)),) * 3
    assert plan.roots().tolist() == [0, 2]
    builder = PlanBuilder(SIGMAS)
    for step, parent in enumerate(([0, 0], [0, 1, 1], [2, 1, 0, 0])):
        builder.step(step, builder.euler(step), parent)
    crossed = builder.plan(1, 0)
    assert crossed.behind() == (((2, 3), (1, 0)), ((2, 3), (1,), (0,)), ((0,), (1,), (2,), (3,)))
    assert crossed.roots().tolist() == [2]
    assert crossed.group_size == 4


def test_candidates_are_numbered_anew_after_a_cut() -> None:
    plan = ode_plan(SIGMAS, group_size=6)
    cut = Cut(2, "variance", "reward", 8)
    steps = list(plan.steps)
    steps[0] = StepPlan(row=steps[0].row, parent=steps[0].parent, kept=steps[0].kept, step=0, cut=cut)
    steps[1:] = [
        StepPlan(row=s.row[:, :2], parent=s.parent[:2], kept=s.kept[:, :2], step=s.step) for s in steps[1:]
    ]
    plan = Plan(
        sigmas=plan.sigmas,
        coeffs=plan.coeffs,
        interval=plan.interval,
        steps=tuple(steps),
        width=6,
        num_trained=0,
        history=plan.history,
        starts=plan.starts,
    )
    assert plan.cuts == ((0, cut),)
    assert list(plan.candidates()) == [6, 2, 2]
    assert (plan.num_candidates, plan.group_size) == (6, 2)
    assert plan.behind()[0] == tuple((i,) for i in range(6))
    assert plan.behind()[1] == ((0,), (1,))
    assert plan.roots().tolist() == list(range(6))
    assert plan.evaluations(3) == 3 * (6 + 2 + 2)
    assert [plan.gives_x0(place) for place in range(3)] == [True, False, False]


def test_rows_and_keeps_may_differ_by_prompt() -> None:
    builder = PlanBuilder(SIGMAS)
    euler = [builder.euler(step) for step in range(3)]
    noisy = builder.row(FlowSDE().row(SIGMAS, 0, 1), 0, 1)
    builder.step(0, [[noisy, noisy], [0, 0], [0, 0]], [0, 1], [[True, True], [False, False], [False, False]])
    builder.step(1, euler[1], [0, 1])
    builder.step(2, [[2, 2]], [0, 1], [[False, True]])  # one row for all prompts
    plan = builder.plan(2, 1)
    assert [step.differs for step in plan.steps] == [True, False, False]
    assert plan.steps[0].kept_rows.tolist() == [noisy]
    assert plan.kept == (0, 2)
    for first, size in ((0, 1), (1, 2), (0, 3)):
        part = plan.of_prompts(first, size)
        assert part.steps[0].row.tolist() == plan.steps[0].row[first : first + size].tolist()
        assert part.steps[0].kept.tolist() == plan.steps[0].kept[first : first + size].tolist()
        assert part.steps[1:] == plan.steps[1:] or all(
            np.array_equal(mine.row, whole.row)
            for mine, whole in zip(part.steps[1:], plan.steps[1:], strict=True)
        )
    assert plan.of_prompts(1, 1).kept == (2,)
    alike = fork()
    assert alike.of_prompts(1, 1) is alike


def test_x0_predictions_are_read_where_a_row_has_history() -> None:
    sigmas = Sigmas(num_inference_steps=6, shift=3.0).grid()
    plan = ode_plan(sigmas, DPMSolver2M(), group_size=2)
    # No history at the first step, before it at sigma = 1, and none needed at the last.
    expected = [False, False, True, True, True, False]
    assert plan.history.tolist() == expected
    assert [plan.reads_x0(place) for place in range(6)] == expected
    assert [plan.gives_x0(place) for place in range(6)] == [*expected[1:], False]
    euler = ode_plan(sigmas, Euler())
    assert not any(euler.reads_x0(place) or euler.gives_x0(place) for place in range(6))


@pytest.mark.parametrize("group_size", [1, 5])
@pytest.mark.parametrize("solver", [None, Euler(), DPMSolver2M(variant="heun")])
def test_an_ode_walk_takes_every_row_in_turn(solver, group_size: int) -> None:
    sigmas = Sigmas(num_inference_steps=7, shift=2.0).grid()
    plan = ode_plan(sigmas, solver, group_size)
    rule = solver or Euler()
    for step in range(7):
        np.testing.assert_array_equal(plan.coeffs[step], np.float32(rule.row(sigmas, step, step + 1)))
        assert plan.steps[step].row.tolist() == [[step] * group_size]
        assert plan.steps[step].parent.tolist() == list(range(group_size))
    assert (plan.kept, plan.num_trained, plan.width) == ((), 0, group_size)
    assert plan.evaluations(3) == 3 * 7 * group_size


def test_a_schedule_must_fall() -> None:
    with pytest.raises(
        ValueError, match=r"sigmas must fall strictly within \[0, 1\]; they are \[1.0, 0.5, 0.5\]"
    ):
        PlanBuilder(np.array([1.0, 0.5, 0.5]))
