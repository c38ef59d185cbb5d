"""HunyuanVideo 1.5, text to video. Latents `[C, F', H/16, W/16]` as the autoencoder makes them."""

from __future__ import annotations

from typing import Any

from diffusers import HunyuanVideo15Pipeline
from torch import Tensor
from torch.nn import functional

from flowgrpo_fast.models.network import Network
from flowgrpo_fast.models.pipeline import PipelineModel, check_frame_groups
from flowgrpo_fast.models.text_cache import Embedding
from flowgrpo_fast.types import Conditioning


class HunyuanVideo15(PipelineModel):
    """`HunyuanVideo15Pipeline`: a Qwen2.5-VL reads the prompt, a ByT5 what stands in quotes; no image comes in.

    What the pipeline pads and masks out is left out: `extra["glyphs"] [P, G, C]` is as long as the longest quote.
    """

    pipeline_class = HunyuanVideo15Pipeline
    blocks = ("HunyuanVideo15TransformerBlock",)
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    sensitive = (
        *(r"^x_embedder", r"^image_embedder", r"^context_embedder", r"^time_embed"),
        *(r"norm", r"^proj_out"),
    )
    max_sequence_length = 1000
    text_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    text_pipeline_reads = ("vae",)  # its number of channels
    varying_length = True

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
        self.latent_shape = (self.pipe.vae.config.latent_channels, frames, height, width)
        self.image_seq_len = frames * height * width // (config.patch_size_t * config.patch_size**2)

    def encode_prompt(self, pipe: Any, prompt: str, max_sequence_length: int) -> Embedding:
        """`prompt_embeds [l, C]`; `glyphs [g, C']` and `glyph_mask [g, 1]`, none where nothing is quoted."""
        pipe.tokenizer_max_length = max_sequence_length
        embeds, mask, glyphs, glyph_mask = pipe.encode_prompt(prompt, device=self.device)
        there = glyph_mask[0].bool()
        return {
            "prompt_embeds": embeds[0, mask[0].bool()],
            "glyphs": glyphs[0, there],
            "glyph_mask": there[there, None],
        }

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity `[B, C, F', H/16, W/16]`."""
        embeds, extra, config = conditioning.prompt_embeds, conditioning.extra, self.pipe.transformer.config
        mask = extra.get("mask")
        without_image = (0, 0, 0, 0, 0, 0, 0, config.in_channels - latents.shape[1])
        velocity: Tensor = self.transformer(
            hidden_states=functional.pad(latents, without_image),
            timestep=(sigma * 1000).to(latents.dtype),
            encoder_hidden_states=embeds,
            encoder_attention_mask=embeds.new_ones(embeds.shape[:2]) if mask is None else mask,
            encoder_hidden_states_2=extra["glyphs"],
            encoder_attention_mask_2=extra["glyph_mask"][..., 0],
            image_embeds=embeds.new_zeros(len(embeds), 0, config.image_embed_dim),
            return_dict=False,
        )[0]
        return velocity

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels `[B, F, 3, H, W]` in [-1, 1]."""
        vae = self.pipe.vae
        vae.use_slicing = True  # its mask over frames is for one video at a time
        video: Tensor = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return video.transpose(1, 2)


load = HunyuanVideo15.load
