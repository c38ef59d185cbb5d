"""FLUX.2 klein. Latents packed as the transformer takes them: `[H/16 * W/16, 4 * C]`, a token a row."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor

from flowgrpo_fast.models.network import Network
from flowgrpo_fast.models.pipeline import PipelineModel
from flowgrpo_fast.models.text_cache import Embedding
from flowgrpo_fast.types import Conditioning

_MOST_BLOCKS = 48  # one-stream blocks of the largest FLUX.2


class Flux2Klein(PipelineModel):
    """`Flux2KleinPipeline`: three layers of a Qwen3 side by side, padding included, and no embedded guidance."""

    pipeline_class = Flux2KleinPipeline
    blocks = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    full_streams = ("hidden_states", "encoder_hidden_states", "temb_mod_img", "temb_mod_txt", "temb_mod")
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        "attn.to_qkv_mlp_proj",
        *(f"single_transformer_blocks.{index}.attn.to_out" for index in range(_MOST_BLOCKS)),
    )
    sensitive = (
        *(r"^x_embedder", r"^context_embedder", r"^time_guidance_embed", r"_modulation"),
        *(r"norm", r"^proj_out"),
    )
    max_sequence_length = 512

    def multiple(self) -> int:
        """Two by two latents make a token."""
        return int(self.pipe.vae_scale_factor) * 2

    def lay_out(self, network: Network) -> None:
        """Positions of the image's tokens and of the text's, whose number is fixed."""
        self.rows, self.columns = network.height // self.multiple(), network.width // self.multiple()
        self.latent_grid = (self.rows, self.columns)
        self.image_seq_len = self.rows * self.columns
        self.latent_shape = (self.image_seq_len, self.pipe.transformer.config.in_channels)
        grid, words = torch.empty(1, 1, self.rows, self.columns), torch.empty(1, self._text_length, 1)
        self.image_ids = self.pipe._prepare_latent_ids(grid)[0].to(self.device)
        self.text_ids = self.pipe._prepare_text_ids(words)[0].to(self.device)

    def encode_prompt(self, pipe: Any, prompt: str, max_sequence_length: int) -> Embedding:
        """`prompt_embeds [L, 3 * C]`."""
        embeds, _ = pipe.encode_prompt(prompt, device=self.device, max_sequence_length=max_sequence_length)
        return {"prompt_embeds": embeds[0]}

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity `[B, L, 4 * C]`."""
        velocity: Tensor = self.transformer(
            hidden_states=latents,
            timestep=sigma,  # the transformer multiplies by 1000
            guidance=None,
            encoder_hidden_states=conditioning.prompt_embeds,
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        return velocity

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels `[B, 3, H, W]` in [-1, 1]. The autoencoder keeps mean and variance of its latents, 2 x 2 at a time."""
        vae = self.pipe.vae
        grid = latents.transpose(1, 2).unflatten(2, (self.rows, self.columns))
        mean, variance = (
            value.view(1, -1, 1, 1).to(latents.dtype) for value in (vae.bn.running_mean, vae.bn.running_var)
        )
        scaled = grid * torch.sqrt(variance + vae.config.batch_norm_eps) + mean
        images: Tensor = vae.decode(self.pipe._unpatchify_latents(scaled), return_dict=False)[0]
        return images


load = Flux2Klein.load
