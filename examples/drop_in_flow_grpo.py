"""flow_grpo's sampler, replaced by one import: samples a few steps, replays them, shows a first ratio of exactly 1.

Runs on a CPU in seconds: a tiny, random SD3 transformer stands in for the real one.
"""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

# was: from flow_grpo.diffusers_patch.sd3_sde_with_logprob import sde_step_with_logprob
from flowgrpo_fast.compat.flow_grpo import sde_step_with_logprob

torch.manual_seed(0)
transformer = SD3Transformer2DModel(
    sample_size=16, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
    joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, pos_embed_max_size=16,
)  # fmt: skip
scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
scheduler.set_timesteps(10)
prompt_embeds, pooled, latents = torch.randn(4, 7, 32), torch.randn(4, 32), torch.randn(4, 4, 16, 16)


def velocity(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The policy; bf16 autocast as in training."""
    with torch.autocast("cpu", torch.bfloat16):
        return transformer(latents, prompt_embeds, pooled, timestep.expand(4), return_dict=False)[0]


rollout = []
with torch.no_grad():
    for t in scheduler.timesteps[:-1]:
        following, log_prob, *_ = sde_step_with_logprob(scheduler, velocity(latents, t), t[None], latents)
        rollout.append((t, latents, following, log_prob))
        latents = following

for t, before, after, old_log_prob in rollout:
    timestep = t.repeat(4)  # the trainer passes [B], the sampler [1]
    _, log_prob, mean, std_dev_t = sde_step_with_logprob(
        scheduler, velocity(before, timestep), timestep, before, prev_sample=after
    )
    log_prob.sum().backward()
    log_prob = log_prob.detach()
    ratio = torch.exp(log_prob - old_log_prob)
    print(
        f"t {float(t):7.2f}   log_prob {float(log_prob.mean()):8.4f}   max |ratio - 1| {(ratio - 1).abs().max():.0e}"
    )
    assert torch.equal(ratio, torch.ones(4)), "rollout and replay differ"
