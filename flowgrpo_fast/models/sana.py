"""SANA and SANA 1.5. Latents `[C, H/32, W/32]` as the deep-compression autoencoder makes them."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import SanaPipeline
from torch import Tensor

from flowgrpo_fast.models.network import Network
from flowgrpo_fast.models.pipeline import PipelineModel
from flowgrpo_fast.models.text_cache import Embedding
from flowgrpo_fast.types import Conditioning

_CALL = inspect.signature(SanaPipeline.__call__).parameters


class Sana(PipelineModel):
    """`SanaPipeline`: a Gemma that is told to enhance the prompt, linear attention, convolutions in place of MLPs.

    Text stands under a mask; the negative prompt goes without the instruction.
    """

    pipeline_class = SanaPipeline
    blocks = ("SanaTransformerBlock",)
    streams = ("hidden_states",)  # every block reads the text as it was
    full_streams = ("hidden_states", "encoder_hidden_states", "timestep")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    sensitive = (r"^patch_embed", r"^time_embed", r"^caption_projection", r"norm", r"^proj_out")
    max_sequence_length = 300
    varying_length = True

    def lay_out(self, network: Network) -> None:
        """One token is a patch of latents, in the published ones a single latent."""
        config, scale = self.pipe.transformer.config, self.pipe.vae_scale_factor
        height, width = network.height // scale, network.width // scale
        self.latent_shape = (config.in_channels, height, width)
        self.image_seq_len = height * width // config.patch_size**2

    @property
    def _text_identity(self) -> str:  # type: ignore[override]  # the negative prompt is encoded in another way
        base = super()._text_identity
        return f"{base} {self.network.negative_prompt}" if base else ""

    def encode_prompt(self, pipe: Any, prompt: str, max_sequence_length: int) -> Embedding:
        """`prompt_embeds [l, C]`, the instruction's tokens cut off and no padding."""
        negative = prompt == self.network.negative_prompt
        embeds, mask, _, _ = pipe.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=max_sequence_length,
            complex_human_instruction=None if negative else _CALL["complex_human_instruction"].default,
        )
        return {"prompt_embeds": embeds[0, mask[0].bool()]}

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity `[B, C, H/32, W/32]`."""
        velocity: Tensor = self.transformer(
            latents,
            timestep=sigma * 1000 * self.pipe.transformer.config.timestep_scale,
            encoder_hidden_states=conditioning.prompt_embeds,
            encoder_attention_mask=conditioning.extra.get("mask"),
            return_dict=False,
        )[0]
        return velocity[:, : latents.shape[1]]  # a learned variance, where there is one, comes after it

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels `[B, 3, H, W]` in [-1, 1]."""
        vae = self.pipe.vae
        images: Tensor = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return images


load = Sana.load
