from __future__ import annotations

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from flowgrpo_fast.schedule.sigmas import DynamicShift, Sigmas, respaced_tail, shift_sigmas


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("num_steps", [2, 10, 25])
def test_diffusers_spacing_is_what_diffusers_computes(shift: float, num_steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    ours = Sigmas(num_inference_steps=num_steps, shift=shift, spacing="diffusers").grid()
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=2e-6, atol=1e-9)


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
        (lambda: Sigmas(spacing="log"), "Sigmas.spacing is 'log'; it must be 'linear' or 'diffusers'"),
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
