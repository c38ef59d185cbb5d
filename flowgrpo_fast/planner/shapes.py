"""What each transformer and autoencoder of diffusers is called with, as meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

Config: TypeAlias = Any  # a diffusers FrozenDict: fields by attribute


@dataclass(frozen=True, slots=True)
class Size:
    """What one row is: pixels, frames, text tokens."""

    height: int = 512
    width: int = 512
    num_frames: int = 1
    tokens: int = 0

    def __str__(self) -> str:
        """As tables show it."""
        frames = f"x{self.num_frames}" if self.num_frames > 1 else ""
        return f"{self.height}x{self.width}{frames}"


@dataclass(frozen=True, slots=True)
class Calling:
    """How one transformer class is called."""

    inputs: Callable[[Config, Size], dict[str, Any]]
    multiple: int = 16  # of pixels, that height and width must be
    frame_stride: int = 1  # frames behind one latent frame, after the first


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def _sd3(config: Config, size: Size) -> dict[str, Any]:
    return {
        "hidden_states": _empty(1, config.in_channels, size.height // 8, size.width // 8),
        "encoder_hidden_states": _empty(1, size.tokens, config.joint_attention_dim),
        "pooled_projections": _empty(1, config.pooled_projection_dim),
        "timestep": _empty(1, dtype=torch.float32),
    }


def _flux(config: Config, size: Size) -> dict[str, Any]:
    positions = (size.height // 16) * (size.width // 16)
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
    positions = (size.height // 16) * (size.width // 16)
    return {
        "hidden_states": _empty(1, positions, config.in_channels),
        "encoder_hidden_states": _empty(1, size.tokens, config.joint_attention_dim),
        "timestep": _empty(1),
        "guidance": _empty(1, dtype=torch.float32) if config.guidance_embeds else None,
        "img_ids": _empty(1, positions, 4),
        "txt_ids": _empty(1, size.tokens, 4),
    }


def _qwen(config: Config, size: Size) -> dict[str, Any]:
    grid = (1, size.height // 16, size.width // 16)
    return {
        "hidden_states": _empty(1, grid[1] * grid[2], config.in_channels),
        "encoder_hidden_states": _empty(1, size.tokens, config.joint_attention_dim),
        "timestep": _empty(1),
        "img_shapes": [[grid]],
    }


def _video(config: Config, size: Size) -> Tensor:
    frames = (size.num_frames - 1) // 4 + 1
    return _empty(1, config.in_channels, frames, size.height // 8, size.width // 8)


def _wan(config: Config, size: Size) -> dict[str, Any]:
    return {
        "hidden_states": _video(config, size),
        "timestep": _empty(1, dtype=torch.float32),
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
        "x": [_empty(config.in_channels, 1, size.height // 8, size.width // 8)],
        "t": _empty(1),
        "cap_feats": [_empty(size.tokens, config.cap_feat_dim)],
    }


def _sana(config: Config, size: Size) -> dict[str, Any]:
    return {
        "hidden_states": _empty(1, config.in_channels, size.height // 32, size.width // 32),
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
    "SanaTransformer2DModel": Calling(_sana, multiple=32),
}


def vae_latents(vae_class: str, config: Config, size: Size) -> Tensor:
    """What the autoencoder decodes for one row, with the channels and strides of its class."""
    channels = config.latent_channels if "latent_channels" in config else config.z_dim
    frames: tuple[int, ...] = ((size.num_frames - 1) // 4 + 1,)
    stride = 8
    if vae_class == "AutoencoderDC":
        frames, stride = (), 2 ** (len(config.decoder_block_out_channels) - 1)
    elif vae_class in ("AutoencoderKL", "AutoencoderKLFlux2"):
        frames, stride = (), 2 ** (len(config.block_out_channels) - 1)
    return _empty(1, channels, *frames, size.height // stride, size.width // stride, dtype=torch.float32)
