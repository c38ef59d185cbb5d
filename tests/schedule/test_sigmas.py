from __future__ import annotations

import math

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrpo_fast.schedule.dynamics import FlowSDE, WanSDE
from flowgrpo_fast.schedule.sigmas import DynamicShift, Sigmas, respaced_tail, shift_sigmas


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("num_steps", [2, 10, 25])
def test_diffusers_spacing_is_what_diffusers_computes(shift: float, num_steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    ours = Sigmas(num_inference_steps=num_steps, shift=shift, spacing="diffusers").grid()
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=2e-6, atol=1e-9)


@settings(max_examples=200, deadline=None)
@given(
    shift=st.floats(0.01, 20.0),
    num_steps=st.integers(2, 60),
    spacing=st.sampled_from(["linear", "diffusers", "unipc"]),
    dynamic=st.booleans(),
    terminal=st.sampled_from([0.0, 0.02]),
)
def test_every_schedule_begins_at_1_to_the_bit(shift, num_steps, spacing, dynamic, terminal) -> None:
    part = DynamicShift(base_shift=math.log(shift), max_shift=math.log(shift)) if dynamic else shift
    grid = Sigmas(num_inference_steps=num_steps, shift=part, spacing=spacing, terminal=terminal).grid(1024)
    assert grid[0] == 1.0
    assert FlowSDE().rate(grid, 0) == 0.7 * math.sqrt(1 / (1 - grid[1]))


@pytest.mark.parametrize("first", [1.0, 1 - 1e-16, 1 - 1e-12, 0.9997, 0.9998])
def test_the_noise_of_a_step_from_just_under_1_is_that_of_one_from_1(first: float) -> None:
    sigmas = Sigmas(num_inference_steps=10, shift=3.0).grid()
    whole = FlowSDE().row(sigmas, 0, 1)[3]
    sigmas[0] = first
    assert FlowSDE().row(sigmas, 0, 1)[3] == pytest.approx(whole, rel=5e-3)
    assert FlowSDE().row(sigmas, 0, 1)[3] < 1


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_flow_sigmas_are_those_of_diffusers(shift: float) -> None:
    """UniPC takes 1e-6 off its first sigma for a logarithm that is not taken here."""
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    for spacing, scheduler in (
        ("unipc", UniPCMultistepScheduler(**options)),
        ("dpm", DPMSolverMultistepScheduler(**options)),
    ):
        scheduler.set_timesteps(20)
        ours = Sigmas(num_inference_steps=20, shift=shift, spacing=spacing).grid()
        np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=0, atol=1.1e-6)


def test_wan_moves_at_its_own_rate() -> None:
    """q = smin + (smax - smin) sigma, with 20 steps of UniPC at shift 3; the published std of three steps."""
    sigmas = Sigmas(num_inference_steps=20, shift=3.0, spacing="unipc").grid()
    std = [WanSDE().row(sigmas, step, step + 1)[3] for step in (0, 9, 18)]
    assert std == [pytest.approx(value, abs=5e-4) for value in (0.129, 0.146, 0.083)]
    x, v, (s, t) = 0.3, -1.1, sigmas[9:11]
    q = sigmas[1] * s
    mean = x * (1 + q**2 / (2 * s) * (t - s)) + v * (1 + q**2 * (1 - s) / (2 * s)) * (t - s)
    row = WanSDE().row(sigmas, 9, 10)
    assert row[1] * x + row[2] * v == pytest.approx(mean, rel=1e-13)


@pytest.mark.parametrize("seq_len", [64, 256, 1024, 4096])
def test_dynamic_shift_is_what_diffusers_computes(seq_len: int) -> None:
    part = DynamicShift()
    slope = (part.max_shift - part.base_shift) / (part.max_seq_len - part.base_seq_len)
    mu = part.base_shift + slope * (seq_len - part.base_seq_len)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 12, 12), mu=mu)
    ours = Sigmas(num_inference_steps=12, shift=part).grid(seq_len)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=2e-6, atol=1e-9)
    assert part.value(part.base_seq_len) == pytest.approx(np.exp(0.5))


def test_a_terminal_stretches_the_schedule_as_diffusers_does() -> None:
    """Qwen-Image's scheduler: dynamic shift to 8192 tokens, then stretched to end at 0.02."""
    part = DynamicShift(max_shift=0.9, max_seq_len=8192)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.02, max_shift=0.9, max_image_seq_len=8192
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 10, 10), mu=np.log(part.value(1024)))
    ours = Sigmas(num_inference_steps=10, shift=part, terminal=0.02).grid(1024)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=2e-6, atol=1e-7)
    assert ours[-2] == pytest.approx(0.02)


def test_linear_spacing_is_an_even_grid_before_the_shift() -> None:
    ours = Sigmas(num_inference_steps=8, shift=3.0).grid()
    np.testing.assert_allclose(shift_sigmas(ours, 1 / 3.0), np.linspace(1, 0, 9), atol=1e-15)


def test_golden_schedules(golden) -> None:
    num_steps = len(golden["c0_timesteps"])
    sigmas = golden["c0_sigmas"]
    candidates = [
        Sigmas(num_inference_steps=num_steps, shift=shift, spacing=spacing).grid()
        for shift in (1.0, 3.0)
        for spacing in ("linear", "diffusers")
    ]
    assert min(np.abs(c - sigmas).max() for c in candidates) < 1e-6


def test_respaced_tail_keeps_the_head_and_is_even_in_unshifted_time() -> None:
    full = Sigmas(num_inference_steps=25, shift=3.0).grid()
    short = respaced_tail(full, 10, 6, 3.0)
    np.testing.assert_array_equal(short[:11], full[:11])
    assert len(short) == 17
    assert short[-1] == 0.0
    np.testing.assert_allclose(np.diff(shift_sigmas(short[10:], 1 / 3.0)), -(15 / 25) / 6, atol=1e-12)


def test_dynamic_shift_needs_the_tokens() -> None:
    with pytest.raises(ValueError, match="needs the model's number of image tokens"):
        Sigmas(shift=DynamicShift()).grid()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sigmas(num_inference_steps=1), "Sigmas.num_inference_steps is 1; it must be at least 2"),
        (lambda: Sigmas(shift=0.0), "Sigmas.shift is 0.0; it must be above 0"),
        (
            lambda: Sigmas(spacing="log"),
            "Sigmas.spacing is 'log'; it must be 'linear', 'diffusers', 'unipc' or 'dpm'",
        ),
        (lambda: Sigmas(terminal=1.0), r"Sigmas.terminal is 1.0; it must be in \[0, 1\)"),
        (
            lambda: DynamicShift(base_seq_len=256, max_seq_len=256),
            "DynamicShift.max_seq_len is 256; it must be above base_seq_len = 256",
        ),
    ],
)
def test_refusals_name_value_and_remedy(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
