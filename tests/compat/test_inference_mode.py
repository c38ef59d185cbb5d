"""What a pipeline under `torch.inference_mode` has recorded can be replayed; what fixes the noise of the steps."""

from __future__ import annotations

import torch

from flowgrpo_fast.compat import FlowMatchTransitionScheduler
from flowgrpo_fast.ops import flow_log_prob


def test_what_is_recorded_under_inference_mode_can_be_replayed_with_gradient() -> None:
    scheduler = FlowMatchTransitionScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    latents, velocity = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    with torch.inference_mode(), scheduler.record() as walks:
        for timestep in scheduler.timesteps:
            latents = scheduler.step(velocity.clone(), timestep, latents).prev_sample
    walk, leaf = walks[0], velocity.clone().requires_grad_()
    for place, step in enumerate(walk.step_index):
        log_prob = flow_log_prob(walk.latents[place], leaf, walk.next_latents[place], walk.coeffs, step)
        assert torch.equal(log_prob, walk.log_prob[place])
        log_prob.sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_a_generator_fixes_the_noise_of_the_steps_through_set_seeds() -> None:
    def walk(seed: int) -> torch.Tensor:
        scheduler = FlowMatchTransitionScheduler(shift=3.0)
        scheduler.set_timesteps(4)
        scheduler.set_seeds(torch.Generator().manual_seed(seed))
        latents = torch.ones(2, 4, 3, 3)
        for timestep in scheduler.timesteps:
            latents = scheduler.step(torch.zeros_like(latents), timestep, latents).prev_sample
        return latents

    assert torch.equal(walk(1), walk(1))
    assert not torch.equal(walk(1), walk(2))
    assert not torch.equal(walk(1)[0], walk(1)[1])
