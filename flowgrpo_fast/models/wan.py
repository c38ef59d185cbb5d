"""Wan 2.1 and 2.2, text to video. Latents `[C, F', H/8, W/8]` as the autoencoder makes them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor, nn

from flowgrpo_fast.models.network import Network
from flowgrpo_fast.models.pipeline import PipelineModel, check_frame_groups, denormalised
from flowgrpo_fast.models.text_cache import Embedding
from flowgrpo_fast.types import Conditioning


class Wan(PipelineModel):
    """`WanPipeline`: 2.1, 2.2-5B with a timestep per token, and 2.2-A14B with one expert above a noise level.

    Where all samples are at one step, `expert` is asked beforehand and one of the two runs. Where they may not be, both
    run and the sigma of each sample picks: which it is never leaves the device.
    """

    pipeline_class = WanPipeline
    blocks = ("WanTransformerBlock",)
    streams = ("hidden_states",)  # every block reads the text as it was
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    sensitive = (r"(^|\.)patch_embedding", r"(^|\.)condition_embedder", r"norm", r"(^|\.)proj_out")
    max_sequence_length = 512
    transformer_parts = ("transformer", "transformer_2")
    vae_in_fp32 = True
    _alone = ""  # the expert that runs; empty = all there are

    def multiple(self) -> int:
        """Pixels a latent times latents a token."""
        patch: tuple[int, int, int] = self.pipe.transformer.config.patch_size
        return int(self.pipe.vae_scale_factor_spatial) * patch[1]

    def check_frames(self, network: Network) -> None:
        """The first frame stands alone, the others come in groups."""
        check_frame_groups(network, self.pipe.vae_scale_factor_temporal, self.family())

    def lay_out(self, network: Network) -> None:
        """One token is a patch of latents."""
        self._views: dict[tuple[nn.Module, str], Wan] = {}
        config, scale = self.pipe.transformer.config, self.pipe.vae_scale_factor_spatial
        frames = (network.num_frames - 1) // self.pipe.vae_scale_factor_temporal + 1
        self.latent_shape = (config.in_channels, frames, network.height // scale, network.width // scale)
        _, rows, columns = config.patch_size
        self.image_seq_len = frames * (network.height // scale // rows) * (network.width // scale // columns)

    def encode_prompt(self, pipe: Any, prompt: str, max_sequence_length: int) -> Embedding:
        """`prompt_embeds [L, C]`, zeros after the prompt's own tokens."""
        embeds, _ = pipe.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
            device=self.device,
        )
        return {"prompt_embeds": embeds[0]}

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity `[B, C, F', H/8, W/8]`."""
        high, *experts = [
            self._velocity(transformer, latents, sigma, conditioning)
            for name, transformer in self.transformers.items()
            if self._alone in ("", name)
        ]
        if not experts:
            return high
        (low,) = experts
        is_high = sigma >= self.pipe.config.boundary_ratio
        return torch.where(is_high.view(-1, 1, 1, 1, 1), high, low)

    def expert(self, sigma: Tensor) -> Wan:
        """This model with the one transformer that serves `sigma`, 0-d on the host; the same view every time."""
        if self._alone or len(self.transformers) == 1:
            return self
        name = "transformer" if sigma >= self.pipe.config.boundary_ratio else "transformer_2"
        key = self.module, name  # a copy in low precision has another module
        if key not in self._views:
            self._views[key] = copy.copy(self)
            self._views[key]._alone = name
        return self._views[key]

    def _velocity(
        self, transformer: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> Tensor:
        timestep = sigma * 1000
        if self.pipe.config.expand_timesteps:
            timestep = timestep[:, None].expand(-1, self.image_seq_len)
        velocity: Tensor = transformer(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=conditioning.prompt_embeds,
            return_dict=False,
        )[0]
        return velocity

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels `[B, F, 3, H, W]` in [-1, 1]."""
        video: Tensor = self.pipe.vae.decode(denormalised(latents, self.pipe.vae), return_dict=False)[0]
        return video.transpose(1, 2)


load = Wan.load
