"""Configs of other schedulers: flow sigmas with their shift and grid; all else is refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from flowgrpo_fast.compat import FlowMatchTransitionScheduler
from flowgrpo_fast.compat.flow_factory import FlowMatchEulerDiscreteSDEScheduler
from flowgrpo_fast.compat.flow_grpo import sde_step_with_logprob
from flowgrpo_fast.compat.tables import FLOW_SDE, schedule_table

OURS = [FlowMatchTransitionScheduler, FlowMatchEulerDiscreteSDEScheduler]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("theirs", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_flow_shift_and_grid_are_kept(ours, theirs, shift: float, tmp_path) -> None:
    other = theirs(**FLOW, flow_shift=shift)
    other.set_timesteps(20)
    scheduler = ours.from_config(other.config)
    scheduler.save_pretrained(tmp_path)
    for made in (scheduler, ours.from_pretrained(tmp_path)):
        made.set_timesteps(20)
        torch.testing.assert_close(made.sigmas, other.sigmas, rtol=0, atol=1.1e-6)
        assert made.config.shift == shift


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize(
    "theirs", [DDIMScheduler(), UniPCMultistepScheduler(), UniPCMultistepScheduler(use_flow_sigmas=True)]
)
def test_a_config_that_is_no_flow_is_refused_in_a_line(ours, theirs) -> None:
    with pytest.raises(ValueError, match="only flow models") as error:
        ours.from_config(theirs.config)
    assert "\n" not in str(error.value)


def test_a_table_made_under_inference_mode_is_replayed_with_gradient() -> None:
    scheduler = FlowMatchTransitionScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    latents, velocity = torch.randn(2, 2, 4, 4, 4)
    t = scheduler.timesteps[1:2]
    with torch.inference_mode():
        stepped = sde_step_with_logprob(scheduler, velocity, t, latents)[0]
    table = schedule_table((scheduler.sigmas, scheduler.timesteps), FLOW_SDE, 0.7, latents.device)
    assert not any(x.is_inference() for x in (table.coeffs, table.std, table.dt, table.timesteps))
    leaf = velocity.clone().requires_grad_()
    sde_step_with_logprob(scheduler, leaf, t, latents, prev_sample=stepped.clone())[1].sum().backward()
    assert leaf.grad.abs().sum() > 0
