"""The digits model: a small SD3 transformer on 8x8 handwritten digits, with its prompts and its shipped weights.

The latents are the pixels, scaled from [0, 1] to [-1, 1]; there is no autoencoder. The architecture is diffusers'
`SD3Transformer2DModel` in a configuration of 0.4 M parameters, so what trains here in minutes on a CPU is what
trains in the large.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flowgrpo_fast.models.digits_text import DIGIT_WORDS, PHRASINGS, VOCABULARY, empty_tokens, tokenize
from flowgrpo_fast.models.network import ModelSetup
from flowgrpo_fast.types import Conditioning, FlowModel

IMAGE_SIZE = 8


@dataclass(frozen=True, slots=True)
class DigitsConfig:
    """The shape of the network; written into the weights file and read back from it."""

    num_layers: int = 3
    num_attention_heads: int = 2
    attention_head_dim: int = 32
    patch_size: int = 2
    word_dim: int = 32


class DigitsNetwork(nn.Module):
    """A word table (the text encoder, frozen after pretraining) and an SD3 transformer."""

    def __init__(self, config: DigitsConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_attention_heads * config.attention_head_dim
        self.words = nn.Embedding(len(VOCABULARY), config.word_dim)
        self.transformer: Any = SD3Transformer2DModel(
            sample_size=IMAGE_SIZE,
            patch_size=config.patch_size,
            in_channels=1,
            out_channels=1,
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            joint_attention_dim=config.word_dim,
            caption_projection_dim=width,
            pooled_projection_dim=config.word_dim,
            pos_embed_max_size=IMAGE_SIZE // config.patch_size,
        )

    def embed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Prompt embeddings `[P, L, C]` and their mean over tokens `[P, C]`, for tokens `[P, L]` int64."""
        embeds: Tensor = self.words(tokens)
        return embeds, embeds.mean(dim=1)

    def forward(self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, pooled: Tensor) -> Tensor:
        """Velocity `[B, 1, 8, 8]` at latents `[B, 1, 8, 8]` and sigma `[B]`."""
        velocity: Tensor = self.transformer(
            hidden_states=latents,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled,
            timestep=sigma * 1000.0,
            return_dict=False,
        )[0]
        return velocity


class DigitsModel(FlowModel):
    """The digits generator."""

    module: DigitsNetwork
    latent_shape = (1, IMAGE_SIZE, IMAGE_SIZE)
    sensitive = ("time_text_embed", "context_embedder", "norm", "proj_out")

    def __init__(self, module: DigitsNetwork) -> None:
        self.module = module

    @classmethod
    def family(cls) -> str:
        """The name a recipe calls it by."""
        return "digits"

    @property
    def transformer(self) -> nn.Module:
        """What low precision may quantise."""
        transformer: nn.Module = self.module.transformer
        return transformer

    def encode(self, prompts: Sequence[str], images: Sequence[Path] = ()) -> Conditioning:
        """One row per prompt, with the empty prompt as the negative; no gradient reaches the word table.

        Raises ValueError, one line, for a word outside the vocabulary, no digit word, two, or images.
        """
        self.check_images(images)
        device = self.module.words.weight.device
        with torch.no_grad():
            embeds, pooled = self.module.embed(tokenize(prompts).to(device))
            negative, negative_pooled = self.module.embed(empty_tokens(len(prompts)).to(device))
        return Conditioning(embeds, pooled, negative, negative_pooled)

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """d latents / d sigma `[B, 1, 8, 8]` at sigma `[B]` or `[]` fp32; conditioning has B rows.

        In the dtype of the module, or of autocast where it is on. Raises ValueError when the shapes disagree.
        """
        batch = latents.shape[0]
        if latents.shape[1:] != self.latent_shape:
            raise ValueError(f"latents must be [B, 1, 8, 8], got {list(latents.shape)}")
        if sigma.shape not in ((), (batch,)):
            raise ValueError(f"sigma must be [] or [{batch}], got {list(sigma.shape)}")
        embeds, pooled = conditioning.prompt_embeds, conditioning.pooled_prompt_embeds
        if pooled is None or embeds.shape[0] != batch:
            raise ValueError(
                f"conditioning must hold {batch} pooled rows, one per sample, got {embeds.shape[0]}"
            )
        result: Tensor = self.module(latents, sigma.expand(batch), embeds, pooled)
        return result

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, 1, 8, 8]` fp32 in [0, 1], 1 = ink: `clamp((latents + 1) / 2)`."""
        return self.decode_with_grad(latents)

    def decode_with_grad(self, latents: Tensor) -> Tensor:
        """The same with its gradient: 1/2 inside, 0 where the clamp holds. There is nothing to compute again."""
        return (latents.float() * 0.5 + 0.5).clamp(0.0, 1.0)

    def own_prompts(self) -> list[str]:
        """The training prompts."""
        return prompts()


def prompts() -> list[str]:
    """The training prompts: "a handwritten zero" to "a handwritten nine"."""
    return [PHRASINGS[0].format(word) for word in DIGIT_WORDS]


def load(device: torch.device, setup: ModelSetup) -> DigitsModel:
    """The shipped pretrained start, fp32, in eval mode, the word table frozen; whatever the setup, all else learns."""
    return shipped(device)


def shipped(device: torch.device | str = "cpu") -> DigitsModel:
    """As `load`, for those who have no recipe."""
    with as_file(files("flowgrpo_fast.models") / "digits.safetensors") as path:
        return from_pretrained(path, device)


def from_pretrained(path: Path | str, device: torch.device | str = "cpu") -> DigitsModel:
    """A model saved by `save_pretrained`, fp32, in eval mode, the word table frozen.

    Raises ValueError naming the file when it is missing, is not safetensors, or does not hold a digits model.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read digits weights from {path}: {error}") from None
    try:
        config = DigitsConfig(**json.loads(metadata["config"]))
        network = DigitsNetwork(config)
        network.load_state_dict(weights)
    except (KeyError, TypeError, json.JSONDecodeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} does not hold a digits model: {reason}") from None
    network.words.requires_grad_(False)
    return DigitsModel(network.eval().to(device))


def save_pretrained(network: DigitsNetwork, path: Path | str) -> None:
    """Writes weights and configuration into one safetensors file."""
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    save_file(weights, path, metadata={"config": json.dumps(asdict(network.config))})
