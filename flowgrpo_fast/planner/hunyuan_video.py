"""HunyuanVideo 1.0: its pipeline as the planner counts it. Nobody trains it here, so its text is never encoded."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HunyuanVideoPipeline
from torch import Tensor

from flowgrpo_fast.models.network import Network
from flowgrpo_fast.models.pipeline import PipelineModel, check_frame_groups
from flowgrpo_fast.models.text_cache import Embedding
from flowgrpo_fast.types import Conditioning


class HunyuanVideo(PipelineModel):
    """`HunyuanVideoPipeline`. Latents `[C, F', H/8, W/8]` as the autoencoder makes them."""

    pipeline_class = HunyuanVideoPipeline
    blocks = ("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock")
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    max_sequence_length = 256
    text_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    def multiple(self) -> int:
        """Pixels a latent times latents a token."""
        return int(self.pipe.vae_scale_factor_spatial) * int(self.pipe.transformer.config.patch_size)

    def check_frames(self, network: Network) -> None:
        """The first frame stands alone, the others come in groups."""
        check_frame_groups(network, self.pipe.vae_scale_factor_temporal, self.family())

    def lay_out(self, network: Network) -> None:
        """One token is a patch of latents."""
        config, scale = self.pipe.transformer.config, self.pipe.vae_scale_factor_spatial
        frames = (network.num_frames - 1) // self.pipe.vae_scale_factor_temporal + 1
        height, width = network.height // scale, network.width // scale
        self.latent_shape = (config.in_channels, frames, height, width)
        self.image_seq_len = frames * height * width // config.patch_size**2

    def encode_prompt(self, pipe: Any, prompt: str, max_sequence_length: int) -> Embedding:
        """There is none."""
        raise ValueError(f"{self.family()} is planned, not trained; choose another model")

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity `[B, C, F', H/8, W/8]`."""
        embeds = conditioning.prompt_embeds
        velocity: Tensor = self.transformer(
            hidden_states=latents,
            timestep=sigma.to(latents.dtype) * 1000,
            encoder_hidden_states=embeds,
            encoder_attention_mask=embeds.new_ones(embeds.shape[:2]),
            pooled_projections=conditioning.pooled_prompt_embeds,
            guidance=torch.full_like(sigma, self.network.embedded_guidance * 1000),
            return_dict=False,
        )[0]
        return velocity

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels `[B, F, 3, H, W]` in [-1, 1]."""
        vae = self.pipe.vae
        video: Tensor = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return video.transpose(1, 2)
