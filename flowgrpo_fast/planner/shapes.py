"""What each transformer and autoencoder of diffusers is called with, as meta tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

Config: TypeAlias = Any  # a diffusers FrozenDict: fields by attribute


@dataclass(frozen=True, slots=True)
class Size:
    """What one row is: pixels, frames, text tokens; images beside the one that is made."""

    height: int = 512
    width: int = 512
    num_frames: int = 1
    tokens: int = 0
    stride: int = 8  # pixels a latent, each way
    sources: int = 0  # images of the same size that are edited, whose tokens stand in the sequence
    token_times: bool = False  # a timestep for each token, not for each row

    @property
    def latents(self) -> tuple[int, int]:
        """Rows and columns of latents."""
        return self.height // self.stride, self.width // self.stride

    @property
    def packed(self) -> tuple[int, int]:
        """Rows and columns of tokens, two by two latents each."""
        return self.height // (2 * self.stride), self.width // (2 * self.stride)

    def __str__(self) -> str:
        """As tables show it."""
        frames = f"x{self.num_frames}" if self.num_frames > 1 else ""
        return f"{self.height}x{self.width}{frames}"


@dataclass(frozen=True, slots=True)
class Calling:
    """How one transformer class is called."""

    inputs: Callable[[Config, Size], dict[str, Any]]
    patch: int = 2  # latents a token, each way
    frame_stride: int = 1  # frames behind one latent frame, after the first

    def tokens(self, size: Size) -> int:
        """Tokens of the image or video that is made."""
        frames = (size.num_frames - 1) // self.frame_stride + 1
        return frames * math.prod(side // self.patch for side in size.latents)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def _sd3(config: Config, size: Size) -> dict[str, Any]:
    return {
        "hidden_states": _empty(1, config.in_channels, *size.latents),
        "encoder_hidden_states": _empty(1, size.tokens, config.joint_attention_dim),
        "pooled_projections": _empty(1, config.pooled_projection_dim),
        "timestep": _empty(1, dtype=torch.float32),
    }


def _flux(config: Config, size: Size) -> dict[str, Any]:
    positions = math.prod(size.packed) * (1 + size.sources)
    return {
        "hidden_states": _empty(1, positions, config.in_channels),
        "encoder_hidden_states": _empty(1, size.tokens, config.joint_attention_dim),
        "pooled_projections": _empty(1, config.pooled_projection_dim),
        "timestep": _empty(1),
        "guidance": _empty(1, dtype=torch.float32) if config.guidance_embeds else None,
        "img_ids": _empty(positions, 3),
        "txt_ids": _empty(size.tokens, 3),
    }


def _flux2(config: Config, size: Size) -> dict[str, Any]:
    positions = math.prod(size.packed)
    return {
        "hidden_states": _empty(1, positions, config.in_channels),
        "encoder_hidden_states": _empty(1, size.tokens, config.joint_attention_dim),
        "timestep": _empty(1),
        "guidance": _empty(1, dtype=torch.float32) if config.guidance_embeds else None,
        "img_ids": _empty(1, positions, 4),
        "txt_ids": _empty(1, size.tokens, 4),
    }


def _qwen(config: Config, size: Size) -> dict[str, Any]:
    grid = (1, *size.packed)
    return {
        "hidden_states": _empty(1, grid[1] * grid[2], config.in_channels),
        "encoder_hidden_states": _empty(1, size.tokens, config.joint_attention_dim),
        "timestep": _empty(1),
        "img_shapes": [[grid]],
    }


def _video(config: Config, size: Size) -> Tensor:
    frames = (size.num_frames - 1) // 4 + 1
    return _empty(1, config.in_channels, frames, *size.latents)


def _wan(config: Config, size: Size) -> dict[str, Any]:
    video = _video(config, size)
    times = (1, math.prod(video.shape[2:]) // math.prod(config.patch_size)) if size.token_times else (1,)
    return {
        "hidden_states": video,
        "timestep": _empty(*times, dtype=torch.float32),
        "encoder_hidden_states": _empty(1, size.tokens, config.text_dim),
    }


def _hunyuan(config: Config, size: Size) -> dict[str, Any]:
    return {
        "hidden_states": _video(config, size),
        "timestep": _empty(1),
        "encoder_hidden_states": _empty(1, size.tokens, config.text_embed_dim),
        "encoder_attention_mask": _empty(1, size.tokens),
        "pooled_projections": _empty(1, config.pooled_projection_dim),
        "guidance": _empty(1, dtype=torch.float32) if config.guidance_embeds else None,
    }


def _z_image(config: Config, size: Size) -> dict[str, Any]:
    return {
        "x": [_empty(config.in_channels, 1, *size.latents)],
        "t": _empty(1),
        "cap_feats": [_empty(size.tokens, config.cap_feat_dim)],
    }


def _sana(config: Config, size: Size) -> dict[str, Any]:
    return {
        "hidden_states": _empty(1, config.in_channels, *size.latents),
        "encoder_hidden_states": _empty(1, size.tokens, config.caption_channels),
        "timestep": _empty(1),
    }


CALLS = {
    "SD3Transformer2DModel": Calling(_sd3),
    "FluxTransformer2DModel": Calling(_flux),
    "Flux2Transformer2DModel": Calling(_flux2),
    "QwenImageTransformer2DModel": Calling(_qwen),
    "WanTransformer3DModel": Calling(_wan, frame_stride=4),
    "HunyuanVideoTransformer3DModel": Calling(_hunyuan, frame_stride=4),
    "ZImageTransformer2DModel": Calling(_z_image),
    "SanaTransformer2DModel": Calling(_sana, patch=1),
}


FP32_VAES = ("AutoencoderKLWan",)  # held in fp32 in every run; the others in the run's precision
_NO_FRAMES = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderDC")
_RATIOS = {
    "AutoencoderKLWan": "scale_factor_spatial",
    "AutoencoderKLHunyuanVideo": "spatial_compression_ratio",
}
_HALVINGS = {
    "AutoencoderDC": ("decoder_block_out_channels", 6, 1),
    "AutoencoderKLQwenImage": ("temperal_downsample", 3, 0),
}


def vae_stride(vae_class: str, config: Mapping[str, Any]) -> int:
    """Pixels a latent, each way: the ratio or the number of halvings the configuration names; mostly 8 without."""
    if vae_class in _RATIOS:
        return int(config.get(_RATIOS[vae_class]) or 8)
    name, usual, outer = _HALVINGS.get(vae_class, ("block_out_channels", 4, 1))
    levels = config.get(name)
    return int(2 ** ((usual if levels is None else len(levels)) - outer))


def vae_latents(vae_class: str, config: Config, size: Size) -> Tensor:
    """What the autoencoder decodes for one row."""
    channels = config.latent_channels if "latent_channels" in config else config.z_dim
    frames = () if vae_class in _NO_FRAMES else ((size.num_frames - 1) // 4 + 1,)
    return _empty(1, channels, *frames, *size.latents, dtype=torch.float32)
