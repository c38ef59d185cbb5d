"""Qwen-Image. Latents packed as the transformer takes them: `[H/16 * W/16, 4 * C]`, a token a row."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImagePipeline
from torch import Tensor

from flowgrpo_fast.models.network import Network
from flowgrpo_fast.models.pipeline import PipelineModel, denormalised
from flowgrpo_fast.models.text_cache import Embedding
from flowgrpo_fast.types import Conditioning


class QwenImage(PipelineModel):
    """`QwenImagePipeline`: prompts as long as they are, under a mask; guidance that keeps the norm of each token."""

    pipeline_class = QwenImagePipeline
    blocks = ("QwenImageTransformerBlock",)
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )
    sensitive = (
        *(r"^img_in", r"^txt_in", r"^time_text_embed", r"norm", r"^proj_out"),
        *(r"(img|txt)_mod\.", r"img_mlp\.net\.2"),
    )
    max_sequence_length = 1024
    varying_length = True
    mixes_guidance = True

    def multiple(self) -> int:
        """Two by two latents make a token."""
        return int(self.pipe.vae_scale_factor) * 2

    def lay_out(self, network: Network) -> None:
        """The grid of tokens."""
        rows, columns = network.height // self.multiple(), network.width // self.multiple()
        self.grid, self.latent_grid = (1, rows, columns), (rows, columns)
        self.image_seq_len = rows * columns
        self.latent_shape = (self.image_seq_len, self.pipe.transformer.config.in_channels)

    def encode_prompt(self, pipe: Any, prompt: str, max_sequence_length: int) -> Embedding:
        """`prompt_embeds [l, C]`, as many rows as the prompt has tokens."""
        embeds, _ = pipe.encode_prompt(prompt, device=self.device, max_sequence_length=max_sequence_length)
        return {"prompt_embeds": embeds[0]}

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity `[B, L, 4 * C]`."""
        velocity: Tensor = self.transformer(
            hidden_states=latents,
            timestep=sigma,  # the transformer multiplies by 1000
            encoder_hidden_states=conditioning.prompt_embeds,
            encoder_hidden_states_mask=conditioning.extra.get("mask"),
            img_shapes=[[self.grid]] * len(latents),
            return_dict=False,
        )[0]
        return velocity

    def guided(self, velocity: Tensor, negative: Tensor, scale: float) -> Tensor:
        """The two halves mixed, each token scaled back to the norm it had with the prompt alone."""
        mixed = negative + scale * (velocity - negative)
        norm, mixed_norm = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (velocity, mixed))
        return mixed * (norm / mixed_norm)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels `[B, 3, H, W]` in [-1, 1]."""
        unpacked = self.pipe._unpack_latents(
            latents, self.network.height, self.network.width, self.pipe.vae_scale_factor
        )
        images: Tensor = self.pipe.vae.decode(denormalised(unpacked, self.pipe.vae), return_dict=False)[0]
        return images[:, :, 0]


load = QwenImage.load
