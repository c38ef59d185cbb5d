"""Stable Diffusion 3 and 3.5. Latents `[C, H/8, W/8]` as the autoencoder makes them."""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from flowgrpo_fast.models.network import Network
from flowgrpo_fast.models.pipeline import PipelineModel
from flowgrpo_fast.models.text_cache import Embedding
from flowgrpo_fast.types import Conditioning


class SD3(PipelineModel):
    """`StableDiffusion3Pipeline`: two CLIPs and a T5 side by side, an MM-DiT on 2 x 2 patches."""

    pipeline_class = StableDiffusion3Pipeline
    blocks = ("JointTransformerBlock",)
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    sensitive = (r"^pos_embed", r"^time_text_embed", r"^context_embedder", r"norm", r"^proj_out")
    published = (r"\.ff\.net\.",)  # the image tokens' feed-forward
    max_sequence_length = 128  # of the T5, as Flow-GRPO trains; the CLIPs add 77
    text_parts = (
        *("text_encoder", "text_encoder_2", "text_encoder_3"),
        *("tokenizer", "tokenizer_2", "tokenizer_3"),
    )

    def lay_out(self, network: Network) -> None:
        """One token is a patch of latents."""
        config, scale = self.pipe.transformer.config, self.pipe.vae_scale_factor
        height, width = network.height // scale, network.width // scale
        largest = config.pos_embed_max_size * config.patch_size
        if max(height, width) > largest:
            raise ValueError(
                f"Network.height x width is {network.height} x {network.width}; this checkpoint's positions end "
                f"at {largest * scale} pixels"
            )
        self.latent_shape = (config.in_channels, height, width)
        self.image_seq_len = height * width // config.patch_size**2

    def encode_prompt(self, pipe: Any, prompt: str, max_sequence_length: int) -> Embedding:
        """`prompt_embeds [77 + L, C]` and `pooled_prompt_embeds [C']`."""
        if pipe.text_encoder_3 is None:
            pipe.transformer = self.transformer  # whose width the zeros in its place have
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompt,
            prompt,
            prompt,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        return {"prompt_embeds": embeds[0], "pooled_prompt_embeds": pooled[0]}

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity `[B, C, H/8, W/8]`."""
        velocity: Tensor = self.transformer(
            hidden_states=latents,
            timestep=sigma * 1000,
            encoder_hidden_states=conditioning.prompt_embeds,
            pooled_projections=conditioning.pooled_prompt_embeds,
            return_dict=False,
        )[0]
        return velocity

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels `[B, 3, H, W]` in [-1, 1]."""
        vae = self.pipe.vae
        images: Tensor = vae.decode(
            latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False
        )[0]
        return images


load = SD3.load
