"""Log-probabilities out of a diffusers pipeline: one line changes the scheduler, one block records the walk.

Runs on a CPU in seconds: a tiny, random FLUX pipeline stands in for the real one.
"""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)

from flowgrpo_fast.compat import FlowMatchTransitionScheduler
from flowgrpo_fast.ops import flow_log_prob

torch.manual_seed(0)
transformer = FluxTransformer2DModel(
    patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
)  # fmt: skip
vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae, None, None, None, None, transformer)
pipe.set_progress_bar_config(disable=True)
prompt = {"prompt_embeds": torch.randn(2, 5, 16), "pooled_prompt_embeds": torch.randn(2, 16)}

# The two lines. Steps 1 and 2 are stochastic, those after them DPM-Solver++ 2M.
pipe.scheduler = FlowMatchTransitionScheduler.from_config(
    pipe.scheduler.config, dynamics="flow_sde", stochastic_steps=[1, 2], solver="dpmpp_2m"
)
with pipe.scheduler.record() as walks:
    latents = pipe(**prompt, height=32, width=32, num_inference_steps=6, output_type="latent").images

# Replay with gradient, as a trainer would: the model again, on the recorded latents.
record = walks[0]
text_ids, image_ids = torch.zeros(5, 3), pipe._prepare_latent_image_ids(2, 16, 16, "cpu", torch.float32)
for k, step in enumerate(record.step_index):
    velocity = transformer(
        record.latents[k],
        timestep=pipe.scheduler.timesteps[step].expand(2) / 1000,
        guidance=None,
        pooled_projections=prompt["pooled_prompt_embeds"],
        encoder_hidden_states=prompt["prompt_embeds"],
        txt_ids=text_ids,
        img_ids=image_ids,
        return_dict=False,
    )[0]
    log_prob = flow_log_prob(record.latents[k], velocity, record.next_latents[k], record.coeffs, step)
    log_prob.sum().backward()
    ratio = torch.exp(log_prob.detach() - record.log_prob[k])
    print(
        f"step {step}   log_prob {record.log_prob[k].tolist()}   max |ratio - 1| {(ratio - 1).abs().max():.0e}"
    )
