"""Transformers of published and of small sizes with random weights, as families of the engine.

Each is made on the device from its configuration: no files, no network. Text encoders are left out, a prompt's
embedding is seeded noise: both loops encode a prompt once, before what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from flowgrpo_fast.models.flux import Flux
from flowgrpo_fast.models.loading import freeze
from flowgrpo_fast.models.network import ModelSetup
from flowgrpo_fast.models.pipeline import PipelineModel
from flowgrpo_fast.models.sd3 import SD3
from flowgrpo_fast.planner.published import PUBLISHED, Part
from flowgrpo_fast.types import Conditioning

PROMPTS = ["a red cat", "two blue dogs"]


def _vae(*channels: int, latents: int = 16) -> Part:
    return (
        "AutoencoderKL",
        {
            "down_block_types": ["DownEncoderBlock2D"] * len(channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(channels),
            "block_out_channels": list(channels),
            "layers_per_block": 1,
            "norm_num_groups": min(channels),
            "latent_channels": latents,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    )


def _sd3(layers: int, heads: int, head_dim: int, side: int, **more: Any) -> Part:
    return (
        "SD3Transformer2DModel",
        {
            "sample_size": side,
            "num_layers": layers,
            "num_attention_heads": heads,
            "attention_head_dim": head_dim,
            "caption_projection_dim": heads * head_dim,
            "joint_attention_dim": 256,
            "pooled_projection_dim": 128,
            "pos_embed_max_size": 2 * side,
            "qk_norm": "rms_norm",
            **more,
        },
    )


_TINY_FLUX: Part = (
    "FluxTransformer2DModel",
    {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    },
)


@dataclass(frozen=True)
class Scale:
    """A transformer and an autoencoder as configurations, and the size of a sample."""

    family: type[PipelineModel]
    transformer: Part
    vae: Part
    tokens: int  # of text
    pixels: int  # of a side

    @property
    def stride(self) -> int:
        """Pixels a latent, each way."""
        return int(2 ** (len(self.vae[1]["block_out_channels"]) - 1))

    @property
    def image_tokens(self) -> int:
        """Tokens of a sample's latents, two by two pixels of them each."""
        return (self.pixels // self.stride // 2) ** 2


def _published(name: str, family: type[PipelineModel], pixels: int) -> Scale:
    entry = PUBLISHED[name]
    return Scale(family, entry["transformer"], entry["vae"], entry["tokens"], pixels)


SCALES = {
    # SD3.5-M's first half in small: dual attention in half of its blocks, latents of 16 x 32 x 32
    "small_sd3": Scale(SD3, _sd3(4, 4, 64, 32, dual_attention_layers=(0, 1)), _vae(16, 32, 32, 32), 64, 256),
    # a quarter of its tokens, for slow machines
    "smaller_sd3": Scale(
        SD3, _sd3(4, 4, 64, 16, dual_attention_layers=(0, 1)), _vae(16, 32, 32, 32), 64, 128
    ),
    "sd35_medium": _published("sd3.5-medium", SD3, 512),
    "flux": _published("flux.1-dev", Flux, 512),
    "tiny_sd3": Scale(SD3, _sd3(2, 2, 16, 4, dual_attention_layers=(0,)), _vae(8, 8, latents=16), 6, 8),
    "tiny_flux": Scale(Flux, _TINY_FLUX, _vae(8, 8, latents=4), 6, 8),
}


def load(device: torch.device, setup: ModelSetup, scale: Scale) -> PipelineModel:
    """The family's own model over random weights, adapters and compilation as the setup says."""
    dtype = setup.dtype
    pipe = SimpleNamespace(
        transformer=_random(scale.transformer, device, dtype, seed=1),
        vae=_random(scale.vae, device, dtype, seed=2),
        vae_scale_factor=scale.stride,
        _prepare_latent_image_ids=diffusers.FluxPipeline._prepare_latent_image_ids,
        _unpack_latents=diffusers.FluxPipeline._unpack_latents,
    )
    freeze(pipe.vae)
    network = replace(setup.network, height=scale.pixels, width=scale.pixels)
    model = _without_text(scale)(Path(), pipe, replace(setup, network=network))
    model.prepare_training(setup)
    return model.to(device)


small_sd3 = partial(load, scale=SCALES["small_sd3"])
smaller_sd3 = partial(load, scale=SCALES["smaller_sd3"])
sd35_medium = partial(load, scale=SCALES["sd35_medium"])
flux = partial(load, scale=SCALES["flux"])
tiny_sd3 = partial(load, scale=SCALES["tiny_sd3"])
tiny_flux = partial(load, scale=SCALES["tiny_flux"])


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward that costs nothing: the mean of the pixels, as the prompt's length weighs them."""
    weights = torch.tensor([len(prompt) for prompt in prompts], device=images.device)
    return images.float().mean(dim=(1, 2, 3)) * weights


def _without_text(scale: Scale) -> type[PipelineModel]:
    """The family with noise in the place of text embeddings."""

    class WithoutText(scale.family):  # type: ignore[misc, name-defined]
        def own_prompts(self) -> list[str]:
            return PROMPTS

        def encode(self, prompts: Sequence[str], images: Sequence[Path] = ()) -> Conditioning:
            config = self.pipe.transformer.config
            shapes = ((scale.tokens, config.joint_attention_dim), (config.pooled_projection_dim,))
            generator = torch.Generator().manual_seed(3)
            rows = [
                [torch.randn(shape, generator=generator).to(self.device, self.dtype) for shape in shapes]
                for _ in [*prompts, "negative"]
            ]
            embeds, pooled = (torch.stack(values) for values in zip(*rows, strict=True))
            return Conditioning(
                prompt_embeds=embeds[:-1],
                pooled_prompt_embeds=pooled[:-1],
                negative_prompt_embeds=embeds[-1].expand(len(prompts), -1, -1),
                negative_pooled_prompt_embeds=pooled[-1].expand(len(prompts), -1),
            )

    return WithoutText


def _random(part: Part, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """Made on the device in its dtype: 12 billion weights take no detour."""
    name, config = part
    if name == "AutoencoderKL":
        config = config | {"shift_factor": 0.06}  # SD3 and FLUX have one, the class does not ask for it
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
            torch.manual_seed(seed)
            module = getattr(diffusers, name).from_config(config)
            for (
                parameter
            ) in module.parameters():  # diffusers starts output layers at 0: velocities would be too
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.02)
    finally:
        torch.set_default_dtype(before)
    return nn.Module.to(module, dtype)  # diffusers' own warns
