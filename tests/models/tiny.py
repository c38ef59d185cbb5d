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
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

PROMPTS = ["a red cat", "two blue dogs and a very long tail", "sun"]


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
        vae=_image_vae(),
        text_encoder=_clip(transformers.CLIPTextModelWithProjection),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(transformers.CLIPTextModelWithProjection),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5(transformers.T5EncoderModel, transformers.T5Config) if t5 else None,
        tokenizer_3=_t5_tokenizer() if t5 else None,
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
        vae=_image_vae(),
        text_encoder=_clip(transformers.CLIPTextModel),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(transformers.T5EncoderModel, transformers.T5Config),
        tokenizer_2=_t5_tokenizer(),
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
    tokenizer = _qwen_tokenizer()
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
        text_encoder=_t5(transformers.UMT5EncoderModel, transformers.UMT5Config),
        tokenizer=_t5_tokenizer(),
        boundary_ratio=0.8 if experts else None,
        expand_timesteps=expand_timesteps,
    )


_FAMILIES: dict[str, Callable[..., diffusers.DiffusionPipeline]] = {
    "sd3": sd3,
    "flux": flux,
    "flux_kontext": lambda: flux(kontext=True),
    "qwen_image": qwen_image,
    "wan": wan,
}


def _image_vae() -> diffusers.AutoencoderKL:
    """Three levels: 4 pixels a latent."""
    return diffusers.AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )


def _clip(kind: type) -> Any:
    """SD3's projects to 16 and joins two; FLUX's gives its own 32."""
    size = 16 if kind is transformers.CLIPTextModelWithProjection else 32
    return kind(
        transformers.CLIPTextConfig(
            hidden_size=size,
            projection_dim=size,
            intermediate_size=32,
            num_attention_heads=2,
            num_hidden_layers=2,
            vocab_size=len(_clip_tokenizer()),
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def _t5(kind: type, config: type) -> Any:
    return kind(
        config(
            vocab_size=len(_t5_tokenizer()),
            d_model=32,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            relative_attention_num_buckets=8,
            feed_forward_proj="gated-gelu",
        )
    )


def _clip_tokenizer() -> transformers.CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return transformers.CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77
    )


def _t5_tokenizer() -> transformers.T5Tokenizer:
    words = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789,.-"]
    scored = [(word, 0.0 if index < 3 else -2.0) for index, word in enumerate(words)]
    return transformers.T5Tokenizer(vocab=scored, extra_ids=0, model_max_length=512)


def _qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return transformers.Qwen2Tokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=2048
    )
