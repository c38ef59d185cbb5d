"""Tiny pipelines of the real classes, made without network: `make("sd3", folder)` saves one with save_pretrained.

Every part is there (transformer, autoencoder, text encoders, tokenizers, scheduler), a few kilobytes each, with
seeded weights that are not zero anywhere: diffusers starts output layers at 0, which would hide mistakes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from tests.models.tiny_parts import (
    clip_encoder,
    clip_tokenizer,
    image_vae,
    qwen3,
    qwen_tokenizer,
    t5_encoder,
    t5_tokenizer,
)

PROMPTS = ["a red cat", 'two blue dogs and a "very long" tail', "sun"]


def make(family: str, folder: Path, **changes: Any) -> Path:
    """Saves the tiny pipeline of a family to `folder`; `changes` go to the function that makes it."""
    pipeline = _FAMILIES[family](**changes)
    for index, part in enumerate(pipeline.components.values()):
        if isinstance(part, nn.Module):
            fill(part, seed=index)
    pipeline.save_pretrained(str(folder))
    return folder


def fill(module: nn.Module, seed: int) -> None:
    """Small seeded noise on every parameter, on top of what it was."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += (0.05 * noise).to(parameter.dtype)


def sd3(dual: bool = False, t5: bool = True) -> diffusers.StableDiffusion3Pipeline:
    """SD3, or with `dual` SD3.5-M: dual attention in the first block and normed queries and keys."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0,) if dual else (),
        qk_norm="rms_norm" if dual else None,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(),
        text_encoder=clip_encoder(transformers.CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(transformers.CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(transformers.T5EncoderModel, transformers.T5Config) if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    )


def flux(guidance: bool = True, kontext: bool = False) -> diffusers.FluxPipeline:
    """FLUX.1-dev; without `guidance` schnell; with `kontext` the editing pipeline."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline = diffusers.FluxKontextPipeline if kontext else diffusers.FluxPipeline
    return pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=image_vae(),
        text_encoder=clip_encoder(transformers.CLIPTextModel),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(transformers.T5EncoderModel, transformers.T5Config),
        tokenizer_2=t5_tokenizer(),
    )


def qwen_image() -> diffusers.QwenImagePipeline:
    """Qwen-Image with a Qwen2.5-VL language model of two layers."""
    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(4, 4, 8),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.0, 0.8, 1.5, 1.2],
    )
    tokenizer = qwen_tokenizer()
    text = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
            "vocab_size": len(tokenizer),
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
        vocab_size=len(tokenizer),
    )
    return diffusers.QwenImagePipeline(
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(text),
        tokenizer=tokenizer,
    )


def wan(experts: bool = False, expand_timesteps: bool = False) -> diffusers.WanPipeline:
    """Wan 2.1; with `experts` 2.2-A14B (two transformers), with `expand_timesteps` 2.2-5B."""
    torch.manual_seed(0)
    parts = [
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )
        for _ in range(1 + experts)
    ]
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.0, 0.8, 1.5, 1.2],
    )
    return diffusers.WanPipeline(
        transformer=parts[0],
        transformer_2=parts[1] if experts else None,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=t5_encoder(transformers.UMT5EncoderModel, transformers.UMT5Config),
        tokenizer=t5_tokenizer(),
        boundary_ratio=0.8 if experts else None,
        expand_timesteps=expand_timesteps,
    )


def flux2_klein() -> diffusers.Flux2KleinPipeline:
    """FLUX.2 klein; the text encoder has as many layers as it takes to reach the last that is read."""
    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return diffusers.Flux2KleinPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=qwen3(transformers.Qwen3ForCausalLM, layers=28),
        tokenizer=qwen_tokenizer(_CHAT),
    )


def z_image() -> diffusers.ZImagePipeline:
    """Z-Image, with too few image tokens to go without padding."""
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    return diffusers.ZImagePipeline(
        transformer=transformer,
        vae=image_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=qwen3(transformers.Qwen3Model, layers=2),
        tokenizer=qwen_tokenizer(_CHAT),
    )


def sana() -> diffusers.SanaPipeline:
    """SANA with an autoencoder of 4 pixels a latent."""
    torch.manual_seed(0)
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    kinds = ("ResBlock", "ResBlock", "EfficientViTBlock")
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        scaling_factor=0.41407,
    )
    text = transformers.Gemma2Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=len(t5_tokenizer()),
    )
    return diffusers.SanaPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=transformers.Gemma2Model(text),
        tokenizer=t5_tokenizer(),
    )


def hunyuan_video15() -> diffusers.HunyuanVideo15Pipeline:
    """HunyuanVideo 1.5, its template shortened to the tokens that the pipeline cuts off."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer("{{ '<|im_start|>' * 108 }}{{ messages[1]['content'] }}<|im_end|>")
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
        target_size=32,
        task_type="t2v",
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    text = transformers.Qwen2_5_VLConfig().text_config.__class__(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_parameters={"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
        vocab_size=len(tokenizer),
    )
    glyphs = transformers.ByT5Tokenizer()
    return diffusers.HunyuanVideo15Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder=transformers.Qwen2_5_VLTextModel(text),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(transformers.T5EncoderModel, transformers.T5Config, len(glyphs)),
        tokenizer_2=glyphs,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=1.0),
    )


_CHAT = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
_FAMILIES: dict[str, Callable[..., diffusers.DiffusionPipeline]] = {
    "sd3": sd3,
    "flux": flux,
    "flux_kontext": lambda: flux(kontext=True),
    "qwen_image": qwen_image,
    "wan": wan,
    "flux2_klein": flux2_klein,
    "z_image": z_image,
    "sana": sana,
    "hunyuan_video15": hunyuan_video15,
}
