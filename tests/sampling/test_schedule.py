from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from flowgrpo_fast.sampling.schedule import ode_schedule, resolve_schedule

from flowgrpo_fast.recipe import NFT, DPMSolver2M, DynamicShift, FrozenWindow, Sigmas
from flowgrpo_fast.recipes import RECIPES, mix_grpo, mix_grpo_flash


def test_stochastic_inside_the_window_euler_outside() -> None:
    recipe = replace(mix_grpo(), window=FrozenWindow(size=4, start=7))
    schedule = resolve_schedule(recipe, 0)
    assert schedule.kept == (7, 8, 9, 10)
    noisy = schedule.coeffs[:, 3] > 0
    assert noisy.nonzero().flatten().tolist() == [7, 8, 9, 10]
    dt = schedule.sigmas.diff()
    np.testing.assert_allclose(schedule.coeffs[~noisy, 2], dt[~noisy], rtol=1e-5)
    assert torch.equal(schedule.coeffs[~noisy, 1], torch.ones(21))
    assert not any(schedule.history)


def test_flash_shortens_only_the_steps_after_the_window() -> None:
    recipe = replace(mix_grpo_flash(), window=FrozenWindow(size=4, start=7))
    full = resolve_schedule(mix_grpo(), 0)
    schedule = resolve_schedule(recipe, 0)
    assert schedule.num_steps == 11 + int(14 * 0.4)
    assert torch.equal(schedule.sigmas[:12], full.sigmas[:12])
    # The first step after the window already has history: the window's steps warmed it up.
    assert schedule.history == (False,) * 11 + (True,) * 4 + (False,)


def test_flash_keeps_at_least_one_step() -> None:
    recipe = replace(mix_grpo_flash(), window=FrozenWindow(size=4, start=20), solver=DPMSolver2M(keep=0.1))
    assert resolve_schedule(recipe, 0).num_steps == 25
    assert resolve_schedule(recipe, 0).sigmas[-1] == 0


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_resolves_at_every_iteration(name: str) -> None:
    recipe = RECIPES[name].make()
    for iteration in range(0, 700, 7):
        schedule = resolve_schedule(recipe, iteration)
        assert schedule.coeffs.dtype == torch.float32
        assert torch.isfinite(schedule.coeffs).all()
        assert (schedule.coeffs[list(schedule.kept), 5] > 0).all()
        assert (0 < schedule.num_trained <= len(schedule.kept)) != isinstance(recipe.loss, NFT)


def test_dynamic_shift_reaches_the_tail_too() -> None:
    sigmas = Sigmas(num_inference_steps=12, shift=DynamicShift())
    recipe = replace(mix_grpo_flash(), sigmas=sigmas, window=FrozenWindow(size=2))
    assert (
        resolve_schedule(recipe, 0, seq_len=4096).sigmas[3]
        > resolve_schedule(recipe, 0, seq_len=256).sigmas[3]
    )
    with pytest.raises(ValueError, match="image tokens"):
        resolve_schedule(recipe, 0)


def test_ode_schedule_keeps_nothing() -> None:
    schedule = ode_schedule(Sigmas(num_inference_steps=5, shift=1.0))
    assert schedule.kept == ()
    np.testing.assert_allclose(schedule.sigmas, [1, 0.8, 0.6, 0.4, 0.2, 0], atol=1e-7)
    assert (schedule.coeffs[:, 3] == 0).all()
