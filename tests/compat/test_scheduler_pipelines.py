"""Real diffusers pipelines over the scheduler, as small as they get; prompts come as embeddings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from flowgrpo_fast.compat import FlowMatchTransitionScheduler
from flowgrpo_fast.ops import flow_log_prob

Sample = Callable[..., Tensor]


def tiny_vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,),
        latent_channels=channels,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def sd3() -> tuple[StableDiffusion3Pipeline, Sample]:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    )
    pipe = StableDiffusion3Pipeline(
        transformer.eval(), FlowMatchEulerDiscreteScheduler(shift=3.0), tiny_vae(4), *[None] * 6
    )
    embeds, pooled = torch.randn(2, 5, 16), torch.randn(2, 16)

    def sample(**options) -> Tensor:
        return pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=-embeds,
            pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=-pooled,
            height=8,
            width=8,
            num_inference_steps=5,
            guidance_scale=3.0,
            **({"output_type": "latent", "generator": torch.Generator().manual_seed(3)} | options),
        ).images

    return pipe, sample


def flux() -> tuple[FluxPipeline, Sample]:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, tiny_vae(4), None, None, None, None, transformer.eval())
    embeds, pooled = torch.randn(2, 5, 16), torch.randn(2, 16)

    def sample(**options) -> Tensor:
        return pipe(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            height=16,
            width=16,
            num_inference_steps=5,
            **({"output_type": "latent", "generator": torch.Generator().manual_seed(3)} | options),
        ).images

    return pipe, sample


@pytest.fixture(params=[sd3, flux])
def pipeline(request: pytest.FixtureRequest):
    pipe, sample = request.param()
    pipe.set_progress_bar_config(disable=True)
    return pipe, sample


def test_deterministic_walk_of_a_pipeline_is_diffusers_own(pipeline) -> None:
    pipe, sample = pipeline
    expected = sample()
    config = pipe.scheduler.config
    for options in ({"dynamics": "euler"}, {"dynamics": "flow_sde", "stochastic_steps": ()}):
        pipe.scheduler = FlowMatchTransitionScheduler.from_config(config, **options)
        torch.testing.assert_close(sample(), expected, rtol=1e-5, atol=1e-6)
    pipe.scheduler = FlowMatchTransitionScheduler.from_config(config, dynamics="dpmpp_2m")
    assert sample().isfinite().all()
    assert (sample() - expected).abs().mean() < 0.2 * expected.abs().mean()


@pytest.mark.parametrize("dynamics", ["flow_sde", "dance_sde", "cps"])
def test_a_pipeline_leaves_log_probs_that_replay_exactly(pipeline, dynamics: str) -> None:
    pipe, sample = pipeline
    pipe.scheduler = FlowMatchTransitionScheduler.from_config(
        pipe.scheduler.config, dynamics=dynamics, noise_level=0.6, solver="dpmpp_2m", stochastic_steps=[1, 2]
    )
    velocities = spy_on_velocities(pipe.scheduler)
    with pipe.scheduler.record() as walks:
        image = sample()
        sample(output_type="pt")
    assert len(walks) == 2
    record = walks[0]
    assert record.step_index == [1, 2]
    assert record.latents[1] is record.next_latents[0]
    for k, step in enumerate(record.step_index):
        replayed = flow_log_prob(
            record.latents[k], velocities[step].contiguous(), record.next_latents[k], record.coeffs, step
        )
        assert torch.equal(replayed, record.log_prob[k])
    pipe.scheduler.set_seeds(record.seed)
    assert torch.equal(sample(), image)


def spy_on_velocities(scheduler: FlowMatchTransitionScheduler) -> list[Tensor]:
    seen: list[Tensor] = []
    step = scheduler.step

    def spy(model_output: Tensor, *rest, **options):
        seen.append(model_output)
        return step(model_output, *rest, **options)

    scheduler.step = spy
    return seen


def test_a_saved_pipeline_loads_with_its_scheduler(tmp_path) -> None:
    pipe, _ = sd3()
    pipe.scheduler = FlowMatchTransitionScheduler.from_config(pipe.scheduler.config, stochastic_steps=[1])
    absent = {name: None for name, part in pipe.components.items() if part is None}
    pipe.save_pretrained(tmp_path)
    for options in ({}, {"scheduler": pipe.scheduler}):
        loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path, **absent, **options)
        assert isinstance(loaded.scheduler, FlowMatchTransitionScheduler)
        assert loaded.scheduler.config.stochastic_steps == [1]
