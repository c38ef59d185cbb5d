"""Published pipelines as data: the `config.json` of each part, shortened to what differs from diffusers' defaults.

A part is `(class, config)`; classes are those of diffusers and transformers. `tokens` is the number of text tokens
the transformer sees at its usual prompt length, `names` where the weights are published, `options` what the pipeline
is told besides its parts.
"""

from __future__ import annotations

from typing import Any, TypeAlias

Part: TypeAlias = tuple[str, dict[str, Any]]

_UP_AND_DOWN = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
_VAE_16: Part = (
    "AutoencoderKL",
    {
        **_UP_AND_DOWN,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.0,  # each has its own, which is added all the same
    },
)
_VAE_DC: Part = (
    "AutoencoderDC",
    {
        "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
        "upsample_block_type": "interpolate",
        "downsample_block_type": "conv",
    },
)
_CLIP_L: Part = (
    "CLIPTextModel",
    {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
)
_CLIP_G: Part = (
    "CLIPTextModelWithProjection",
    {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "intermediate_size": 5120,
        "projection_dim": 1280,
    },
)
_T5 = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_T5_XXL: Part = ("T5EncoderModel", {**_T5, "vocab_size": 32128})
_UMT5_XXL: Part = ("UMT5EncoderModel", {**_T5, "vocab_size": 256384})
_QWEN_3_4B: Part = (
    "Qwen3Model",
    {
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "vocab_size": 151936,
    },
)
_QWEN_25_7B: Part = (
    "Qwen2Model",  # the language half of Qwen2.5-VL
    {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    },
)
_LLAMA_3_8B: Part = (
    "LlamaModel",
    {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128320,
    },
)
_GEMMA_2_2B: Part = (
    "Gemma2Model",
    {
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 9216,
        "vocab_size": 256000,
    },
)


def _sd3(num_layers: int, positions: int, **more: Any) -> Part:
    return (
        "SD3Transformer2DModel",
        {
            "num_layers": num_layers,
            "num_attention_heads": num_layers,
            "caption_projection_dim": 64 * num_layers,
            "pos_embed_max_size": positions,
            **more,
        },
    )


def _wan(heads: int, ffn: int, layers: int, **more: Any) -> Part:
    return (
        "WanTransformer3DModel",
        {"num_attention_heads": heads, "ffn_dim": ffn, "num_layers": layers, **more},
    )


_SD3_TEXT = (_CLIP_L, _CLIP_G, _T5_XXL)
_WAN_VAE: Part = ("AutoencoderKLWan", {})
_WAN_22_VAE: Part = (
    "AutoencoderKLWan",
    {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,  # their number counts
        "latents_std": [1.0] * 48,
    },
)

PUBLISHED: dict[str, dict[str, Any]] = {
    "sd3-medium": {
        "pipeline": "StableDiffusion3Pipeline",
        "transformer": _sd3(24, 192),
        "vae": _VAE_16,
        "text_encoders": _SD3_TEXT,
        "tokens": 205,  # 77 of CLIP beside 128 of T5, as Flow-GRPO trains
        "names": ("stabilityai/stable-diffusion-3-medium-diffusers",),
    },
    "sd3.5-medium": {
        "pipeline": "StableDiffusion3Pipeline",
        "transformer": _sd3(24, 384, dual_attention_layers=list(range(13)), qk_norm="rms_norm"),
        "vae": _VAE_16,
        "text_encoders": _SD3_TEXT,
        "tokens": 205,
        "names": ("stabilityai/stable-diffusion-3.5-medium",),
    },
    "sd3.5-large": {
        "pipeline": "StableDiffusion3Pipeline",
        "transformer": _sd3(38, 192, qk_norm="rms_norm"),
        "vae": _VAE_16,
        "text_encoders": _SD3_TEXT,
        "tokens": 205,
        "names": ("stabilityai/stable-diffusion-3.5-large", "stabilityai/stable-diffusion-3.5-large-turbo"),
    },
    "flux.1-dev": {
        "pipeline": "FluxPipeline",
        "transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}),
        "vae": _VAE_16,
        "text_encoders": (_CLIP_L, _T5_XXL),
        "tokens": 512,
        "names": ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-Krea-dev"),
    },
    "flux.1-kontext-dev": {
        "pipeline": "FluxKontextPipeline",
        "transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}),
        "vae": _VAE_16,
        "text_encoders": (_CLIP_L, _T5_XXL),
        "tokens": 512,
        "names": ("black-forest-labs/FLUX.1-Kontext-dev",),
    },
    "flux.2-klein-4b": {
        "pipeline": "Flux2KleinPipeline",
        "transformer": (
            "Flux2Transformer2DModel",
            {
                "num_layers": 5,
                "num_single_layers": 20,
                "num_attention_heads": 24,
                "joint_attention_dim": 7680,
                "guidance_embeds": False,
            },
        ),
        "vae": ("AutoencoderKLFlux2", {}),
        "text_encoders": (_QWEN_3_4B,),
        "tokens": 512,
        "names": ("black-forest-labs/FLUX.2-klein-4B", "black-forest-labs/FLUX.2-klein-base-4B"),
    },
    "qwen-image": {
        "pipeline": "QwenImagePipeline",
        "transformer": ("QwenImageTransformer2DModel", {}),
        "vae": ("AutoencoderKLQwenImage", {}),
        "text_encoders": (_QWEN_25_7B,),
        "tokens": 128,
        "names": ("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"),
    },
    "z-image": {
        "pipeline": "ZImagePipeline",
        "transformer": ("ZImageTransformer2DModel", {}),
        "vae": _VAE_16,
        "text_encoders": (_QWEN_3_4B,),
        "tokens": 128,
        "names": ("Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo"),
    },
    "sana-1.6b": {
        "pipeline": "SanaPipeline",
        "transformer": ("SanaTransformer2DModel", {}),
        "vae": _VAE_DC,
        "text_encoders": (_GEMMA_2_2B,),
        "tokens": 300,
        "names": (
            "Efficient-Large-Model/Sana_1600M_512px_diffusers",
            "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
        ),
    },
    "wan2.1-1.3b": {
        "pipeline": "WanPipeline",
        "transformer": _wan(12, 8960, 30),
        "vae": _WAN_VAE,
        "text_encoders": (_UMT5_XXL,),
        "tokens": 512,
        "names": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",),
    },
    "wan2.1-14b": {
        "pipeline": "WanPipeline",
        "transformer": _wan(40, 13824, 40),
        "vae": _WAN_VAE,
        "text_encoders": (_UMT5_XXL,),
        "tokens": 512,
        "names": ("Wan-AI/Wan2.1-T2V-14B-Diffusers",),
    },
    "wan2.2-5b": {
        "pipeline": "WanPipeline",
        "transformer": _wan(24, 14336, 30, in_channels=48, out_channels=48),
        "vae": _WAN_22_VAE,
        "text_encoders": (_UMT5_XXL,),
        "tokens": 512,
        "options": {"expand_timesteps": True},
        "names": ("Wan-AI/Wan2.2-TI2V-5B-Diffusers",),
    },
    "wan2.2-a14b": {
        "pipeline": "WanPipeline",
        "transformer": _wan(40, 13824, 40),
        "transformer_2": _wan(40, 13824, 40),
        "options": {"boundary_ratio": 0.875},
        "vae": _WAN_VAE,
        "text_encoders": (_UMT5_XXL,),
        "tokens": 512,
        "names": ("Wan-AI/Wan2.2-T2V-A14B-Diffusers",),
    },
    "hunyuan-video": {
        "pipeline": "HunyuanVideoPipeline",
        "transformer": ("HunyuanVideoTransformer3DModel", {}),
        "vae": ("AutoencoderKLHunyuanVideo", {}),
        "text_encoders": (_LLAMA_3_8B, _CLIP_L),
        "tokens": 256,
        "names": ("hunyuanvideo-community/HunyuanVideo",),
    },
}
