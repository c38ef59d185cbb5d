"""FLUX.1 (dev, schnell). Latents packed as the transformer takes them: `[H/16 * W/16, 4 * C]`, a token a row."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline
from torch import Tensor

from flowgrpo_fast.models.network import Network
from flowgrpo_fast.models.pipeline import PipelineModel
from flowgrpo_fast.models.text_cache import Embedding
from flowgrpo_fast.types import Conditioning


class Flux(PipelineModel):
    """`FluxPipeline`: T5 tokens and a CLIP vector, guidance embedded in dev, none in schnell."""

    pipeline_class: ClassVar[type[Any]] = FluxPipeline
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    sensitive = (r"^x_embedder", r"^context_embedder", r"^time_text_embed", r"norm", r"^proj_out")
    published = (r"^transformer_blocks", r"^single_transformer_blocks", r"^proj_out")  # modulations too
    max_sequence_length = 512
    text_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    def multiple(self) -> int:
        """Two by two latents make a token."""
        return int(self.pipe.vae_scale_factor) * 2

    def lay_out(self, network: Network) -> None:
        """Positions of the image's tokens, and the scale that a distilled network is told."""
        config = self.pipe.transformer.config
        self.rows, self.columns = network.height // self.multiple(), network.width // self.multiple()
        self.latent_grid = (self.rows, self.columns)
        self.image_seq_len = self.rows * self.columns
        self.latent_shape = (self.image_seq_len, config.in_channels)
        self.image_ids = self._ids()
        self.guidance = (
            torch.full((1,), network.embedded_guidance, device=self.device)
            if config.guidance_embeds
            else None
        )

    def encode_prompt(self, pipe: Any, prompt: str, max_sequence_length: int) -> Embedding:
        """`prompt_embeds [L, C]` of the T5 and `pooled_prompt_embeds [C']` of the CLIP."""
        embeds, pooled, _ = pipe.encode_prompt(
            prompt, device=self.device, max_sequence_length=max_sequence_length
        )
        return {"prompt_embeds": embeds[0], "pooled_prompt_embeds": pooled[0]}

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity `[B, L, 4 * C]`."""
        embeds = conditioning.prompt_embeds
        velocity: Tensor = self.transformer(
            hidden_states=latents,
            timestep=sigma,  # the transformer multiplies by 1000
            guidance=None if self.guidance is None else self.guidance.expand(len(latents)),
            pooled_projections=conditioning.pooled_prompt_embeds,
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3, dtype=torch.float32),
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        return velocity

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels `[B, 3, H, W]` in [-1, 1]."""
        vae = self.pipe.vae
        unpacked = self.pipe._unpack_latents(
            latents, self.network.height, self.network.width, self.pipe.vae_scale_factor
        )
        images: Tensor = vae.decode(
            unpacked / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False
        )[0]
        return images

    def _ids(self) -> Tensor:
        """Which image, row and column each token is: `[L, 3]`."""
        ids: Tensor = self.pipe._prepare_latent_image_ids(
            1, self.rows, self.columns, self.device, torch.float32
        )
        return ids


load = Flux.load
