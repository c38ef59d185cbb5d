"""FLUX.1 Kontext: editing. The source image's latents are further tokens beside those that are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import FluxKontextPipeline
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from flowgrpo_fast.models.flux import Flux
from flowgrpo_fast.models.images import as_seen
from flowgrpo_fast.models.network import Network
from flowgrpo_fast.types import Conditioning


class FluxKontext(Flux):
    """`FluxKontextPipeline`: FLUX.1 with `extra["image_latents"] [P, L, 4 * C]`, a source image for each prompt."""

    pipeline_class = FluxKontextPipeline
    takes_images = True

    def lay_out(self, network: Network) -> None:
        """The source has the positions of the image, one image further."""
        super().lay_out(network)
        source = self._ids()
        source[:, 0] = 1
        self.image_ids = torch.cat([self.image_ids, source])

    def encode(self, prompts: Sequence[str], images: Sequence[Path] = ()) -> Conditioning:
        """One row per prompt and its source image, which is scaled to the run's height and width.

        Raises:
            ValueError: no images, or one that cannot be read.
        """
        if not images:
            raise ValueError(
                "flux_kontext edits images; set data.images to a text file, the path of each prompt's image a line"
            )
        latents = torch.cat([self._encode_image(path) for path in images])
        conditioning = super().encode(prompts)
        return replace(conditioning, extra={**conditioning.extra, "image_latents": latents})

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity `[B, L, 4 * C]` of the tokens that are made."""
        source = conditioning.extra["image_latents"].to(latents.dtype)
        velocity = super().predict(torch.cat([latents, source], dim=1), sigma, conditioning)
        return velocity[:, : latents.shape[1]]

    def _encode_image(self, path: Path) -> Tensor:
        """`[1, L, 4 * C]`."""
        size = (self.network.height, self.network.width)
        try:
            with Image.open(path) as image:
                pixels = self.pipe.image_processor.preprocess(as_seen(image), *size)
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"cannot read the image {str(path)!r} of data.images: {error}") from None
        vae = self.pipe.vae
        with torch.no_grad():
            encoded = self.pipe._encode_vae_image(pixels.to(self.device, vae.dtype), generator=None)
        packed: Tensor = self.pipe._pack_latents(encoded, 1, *encoded.shape[1:])
        return packed


load = FluxKontext.load
