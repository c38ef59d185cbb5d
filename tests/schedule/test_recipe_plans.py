"""The plans of whole recipes: which steps are stochastic, which solver takes the others, at every iteration."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.recipes import RECIPES
from flowgrpo_fast.recipes.trajectory import mix_grpo, mix_grpo_flash
from flowgrpo_fast.schedule.dynamics import DPMSolver2M
from flowgrpo_fast.schedule.sigmas import DynamicShift, Sigmas
from flowgrpo_fast.schedule.topology import SharedStart, ode_plan
from flowgrpo_fast.schedule.windows import FrozenWindow


def with_window(recipe: Recipe, window: FrozenWindow, **changes) -> Recipe:
    return replace(recipe, topology=SharedStart(at=window), **changes)


def test_stochastic_inside_the_window_euler_outside() -> None:
    plan = with_window(mix_grpo(), FrozenWindow(size=4, start=7)).plan(0)
    assert plan.kept == (7, 8, 9, 10)
    noisy = plan.coeffs[:, 3] > 0
    assert noisy.nonzero().flatten().tolist() == [7, 8, 9, 10]
    dt = plan.sigmas.diff()
    np.testing.assert_allclose(plan.coeffs[~noisy, 2], dt[~noisy], rtol=1e-5)
    assert torch.equal(plan.coeffs[~noisy, 1], torch.ones(21))
    assert not any(plan.history)


def test_flash_shortens_only_the_steps_after_the_window() -> None:
    full = mix_grpo().plan(0)
    plan = with_window(mix_grpo_flash(), FrozenWindow(size=4, start=7)).plan(0)
    assert len(plan.steps) == 11 + int(14 * 0.4)
    assert torch.equal(plan.sigmas[:12], full.sigmas[:12])
    # The first step after the window already has history: the window's steps warmed it up.
    assert tuple(plan.history) == (False,) * 11 + (True,) * 4 + (False,)
    assert [plan.reads_x0(place) for place in range(len(plan.steps))] == list(plan.history)
    assert [plan.gives_x0(place) for place in range(len(plan.steps))] == [*plan.history[1:], False]


@pytest.mark.parametrize(
    ("start", "after"), [(0, 7), (1, 7), (2, 7), (5, 5), (8, 4), (11, 3), (14, 2), (16, 1), (19, 1)]
)
def test_flash_walks_the_published_number_of_steps_after_a_window(start: int, after: int) -> None:
    """After start 19 the authors' code walks none and ends at sigma 0.207; here one step ends at 0."""
    plan = with_window(mix_grpo_flash(), FrozenWindow(size=4, start=start)).plan(0)
    assert len(plan.steps) - (start + 4) == after
    assert plan.sigmas[-1] == 0
    if start == 19:
        assert plan.sigmas[23] == pytest.approx(0.207, abs=5e-4)


def test_flash_keeps_at_least_one_step() -> None:
    recipe = with_window(mix_grpo_flash(), FrozenWindow(size=4, start=20), solver=DPMSolver2M(keep=0.1))
    plan = recipe.plan(0)
    assert len(plan.steps) == 25
    assert plan.sigmas[-1] == 0


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_resolves_at_every_iteration(name: str) -> None:
    recipe = RECIPES[name].make()
    for iteration in range(0, 700, 7):
        plan = recipe.plan(iteration)
        assert plan.coeffs.dtype == torch.float32
        assert torch.isfinite(plan.coeffs).all()
        rows = [row for place in plan.kept for row in plan.steps[place].kept_rows]
        needs = recipe.requires
        assert (plan.coeffs[rows, 5] > 0).all() == (needs.log_probs or not rows)
        assert (0 < plan.num_trained <= len(plan.kept)) == (needs.log_probs or needs.states)


def test_dynamic_shift_reaches_the_tail_too() -> None:
    sigmas = Sigmas(num_inference_steps=12, shift=DynamicShift())
    recipe = with_window(mix_grpo_flash(), FrozenWindow(size=2), sigmas=sigmas)
    assert recipe.plan(0, seq_len=4096).sigmas[3] > recipe.plan(0, seq_len=256).sigmas[3]
    with pytest.raises(ValueError, match="image tokens"):
        recipe.plan(0)


def test_an_ode_plan_keeps_nothing() -> None:
    plan = ode_plan(Sigmas(num_inference_steps=5, shift=1.0).grid())
    assert plan.kept == ()
    np.testing.assert_allclose(plan.sigmas, [1, 0.8, 0.6, 0.4, 0.2, 0], atol=1e-7)
    assert (plan.coeffs[:, 3] == 0).all()
