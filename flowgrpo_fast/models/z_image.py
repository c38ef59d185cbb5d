"""Z-Image and Z-Image-Turbo. Latents `[C, H/8, W/8]` as the autoencoder makes them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import Tensor

from flowgrpo_fast.models.network import Network
from flowgrpo_fast.models.pipeline import PipelineModel
from flowgrpo_fast.models.text_cache import Embedding
from flowgrpo_fast.types import Conditioning


class ZImage(PipelineModel):
    """`ZImagePipeline`: one stream of image and text; time runs from noise, and the velocity towards the image.

    The pipeline counts guidance from 0, as the original paper does: its scale is the recipe's less 1.
    """

    pipeline_class = ZImagePipeline
    blocks = ("ZImageTransformerBlock",)
    streams = ("x",)
    full_streams = ("x", "adaln_input")
    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    sensitive = (r"^all_x_embedder", r"^t_embedder", r"^cap_embedder", r"adaLN", r"norm", r"^all_final_layer")
    max_sequence_length = 512
    varying_length = True

    def multiple(self) -> int:
        """Two by two latents make a token."""
        return int(self.pipe.vae_scale_factor) * 2

    def lay_out(self, network: Network) -> None:
        """One token is a patch of latents."""
        scale = self.pipe.vae_scale_factor
        height, width = network.height // scale, network.width // scale
        self.latent_shape = (self.pipe.transformer.config.in_channels, height, width)
        self.image_seq_len = height * width // 4

    def encode_prompt(self, pipe: Any, prompt: str, max_sequence_length: int) -> Embedding:
        """`prompt_embeds [l, C]`, as many rows as the prompt has tokens."""
        (embeds,), _ = pipe.encode_prompt(
            prompt,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        return {"prompt_embeds": embeds}

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity `[B, C, H/8, W/8]`. The transformer takes lists, and pads each caption as it was trained."""
        captions: list[Tensor] = list(conditioning.prompt_embeds)
        mask = conditioning.extra.get("mask")
        if mask is not None:  # lengths are shapes to it: the host has to know them
            lengths = mask.sum(dim=1).tolist()
            captions = [caption[:length] for caption, length in zip(captions, lengths, strict=True)]
        parts = self.transformer(
            list(latents.unsqueeze(2)),
            (1000 - sigma * 1000) / 1000,  # in the pipeline's order: times 1000 again, every bit tells
            captions,
            return_dict=False,
        )[0]
        return -torch.stack(parts).squeeze(2)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels `[B, 3, H, W]` in [-1, 1]."""
        vae = self.pipe.vae
        images: Tensor = vae.decode(
            latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False
        )[0]
        return images


load = ZImage.load
