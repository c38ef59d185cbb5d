"""What all families share: a diffusers pipeline as a `FlowModel`.

A family is one small file: the pipeline's class, the names of its layers, and four methods that say how its prompts
are embedded, how its latents are laid out, how its transformer is called and how its autoencoder decodes.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from flowgrpo_fast.models.execution import check_kernel, prepare
from flowgrpo_fast.models.loading import freeze, load_parts, pipeline_folder
from flowgrpo_fast.models.network import ModelSetup, Network
from flowgrpo_fast.models.text_cache import Embedding, Encoder, Progress, embed, fill, fingerprint
from flowgrpo_fast.types import Conditioning, FlowModel, PromptRows

DECODED_PIXELS = 1 << 22  # at once: 16 images of 512 x 512
# With gradient one of them, whose backward holds every activation of the decoder.
_DIFFERENTIATED_PIXELS = 1 << 18
MOST_EMBEDDINGS = 1 << 31  # bytes; more are read from the text cache as they are needed
_FIELDS = ("prompt_embeds", "pooled_prompt_embeds")  # of an embedding; other names go to `Conditioning.extra`


class PipelineModel(FlowModel, ABC):
    """A `FlowModel` over the parts of a diffusers pipeline. Families are subclasses; `load` makes one."""

    pipeline_class: ClassVar[type[Any]]
    blocks: ClassVar[tuple[str, ...]]  # class names of the repeated blocks: what is compiled
    streams: ClassVar[tuple[str, ...]] = ("hidden_states", "encoder_hidden_states")  # that a block passes on
    full_streams: ClassVar[tuple[str, ...]] = (*streams, "temb")  # whose gradient the embedders need as well
    lora_targets: ClassVar[tuple[str, ...]]  # ends of layer names, as published recipes choose them
    max_sequence_length: ClassVar[int]  # text tokens, where the recipe names none
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    text_pipeline_reads: ClassVar[tuple[str, ...]] = ()  # further parts without which it cannot be made
    transformer_parts: ClassVar[tuple[str, ...]] = ("transformer",)
    varying_length: ClassVar[bool] = False  # prompts are as long as they are, under a mask
    vae_in_fp32: ClassVar[bool] = False  # an autoencoder that bf16 would damage

    image_seq_len: int

    def __init__(self, folder: Path, pipe: Any, setup: ModelSetup) -> None:
        self.folder, self.pipe, self.network = folder, pipe, setup.network
        self.dtype = setup.dtype
        self.progress = setup.progress
        self.device = torch.device("cpu")
        parts = {name: getattr(pipe, name) for name in self.transformer_parts if getattr(pipe, name, None)}
        # One transformer is trained as it stands; several by their names.
        self.module: nn.Module = parts["transformer"] if len(parts) == 1 else nn.ModuleDict(parts)
        self.check_size(self.network)
        self.lay_out(self.network)

    @classmethod
    def family(cls) -> str:
        """The name a recipe calls it by: its module's."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def load(cls, device: torch.device, setup: ModelSetup) -> PipelineModel:
        """The family's model as `setup.network` describes it, ready to train on `device`.

        Frozen weights are held in the run's precision, trained ones in fp32.

        Raises:
            ValueError: a path, size, target or backend that cannot be; one line with the value and the remedy.
        """
        network = setup.network
        folder = pipeline_folder(network.path, cls.pipeline_class, cls.family())
        check_kernel(network.attention, device, setup.dtype)
        dtypes = {"default": setup.dtype}
        dtypes |= dict.fromkeys(cls.transformer_parts, network.train.held_dtype(setup.dtype))
        if cls.vae_in_fp32:
            dtypes["vae"] = torch.float32
        model = cls(folder, load_parts(folder, cls.pipeline_class, cls.text_parts, dtypes), setup)
        freeze(model.pipe.vae)
        model.prepare_training(setup)
        return model.to(device)

    def prepare_training(self, setup: ModelSetup) -> None:
        """Adapters or all weights, checkpointing, attention and compilation, of every transformer."""
        train = setup.network.train
        streams = self.full_streams if train.trains_every_weight else self.streams
        for index, (name, transformer) in enumerate(self.transformers.items()):
            transformer.eval()
            train.prepare(transformer, self.lora_targets, setup.seed + index, name)
            prepare(transformer, setup.network, self.blocks, streams)

    def to(self, device: torch.device) -> PipelineModel:
        """Moves everything."""
        self.device = device
        self.module.to(device)
        self.pipe.vae.to(device)
        self.lay_out(self.network)
        return self

    @property
    def transformer(self) -> Any:
        """What is called, and what low precision applies to. A copy of the model with another `module` calls that."""
        return self.module

    @property
    def transformers(self) -> dict[str, Any]:
        """Each transformer by the name of its folder."""
        if isinstance(self.module, nn.ModuleDict):
            return dict(self.module.items())
        return {"transformer": self.module}

    # ------------------------------------------------------------------------------- what a family says

    @abstractmethod
    def lay_out(self, network: Network) -> None:
        """Sets `latent_shape`, `image_seq_len` and constants on `self.device`."""

    @abstractmethod
    def encode_prompt(self, pipe: Any, prompt: str, max_sequence_length: int) -> Embedding:
        """One prompt's embeddings under the names of `Conditioning`'s fields or others, without a batch axis."""

    @abstractmethod
    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's velocity; sigma is `[B]`."""

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """The autoencoder's pixels in [-1, 1]."""

    def sized(self, height: int, width: int, num_frames: int) -> PipelineModel:
        """The same parts, laid out for another size.

        Raises:
            ValueError: as `check_size`.
        """
        other = copy.copy(self)
        other.network = replace(self.network, height=height, width=width, num_frames=num_frames)
        other.check_size(other.network)
        other.lay_out(other.network)
        return other

    def multiple(self) -> int:
        """What height and width must be a multiple of: pixels a latent times latents a token."""
        patch: int = self.pipe.transformer.config.patch_size
        return int(self.pipe.vae_scale_factor) * patch

    def check_size(self, network: Network) -> None:
        """Raises ValueError for a resolution that does not divide into tokens, or frames of an image model."""
        step = self.multiple()
        for name in ("height", "width"):
            value = getattr(network, name)
            if value % step:
                below = value // step * step
                near = f"{below} or {below + step}" if below else str(step)
                raise ValueError(
                    f"Network.{name} is {value}; {self.family()} needs a multiple of {step}, such as {near}"
                )
        self.check_frames(network)

    def check_frames(self, network: Network) -> None:
        """An image has one."""
        if network.num_frames != 1:
            raise ValueError(
                f"Network.num_frames is {network.num_frames}; {self.family()} makes images: set 1"
            )

    # ------------------------------------------------------------------------------------- the protocol

    def encode(self, prompts: Sequence[str], images: Sequence[Path] = ()) -> Conditioning:
        """One row per prompt and the recipe's negative prompt for all; the text encoders are gone afterwards.

        Raises:
            ValueError: images for a family that takes none, or a cache that cannot be written.
        """
        self.check_images(images)
        wanted = [*prompts, self.network.negative_prompt]
        *rows, negative = embed(wanted, *self._text_cache)
        return self._assemble(rows, negative)

    def prompt_rows(self, prompts: Sequence[str], images: Sequence[Path] = ()) -> PromptRows:
        """The prompts' rows, read from the text cache step by step where they do not fit into memory.

        Raises:
            ValueError: as `encode`.
        """
        self.check_images(images)
        if self.network.text_cache:
            fill([*prompts, self.network.negative_prompt], *self._text_cache)
            (first,) = embed(prompts[:1], *self._text_cache)
            if len(prompts) * sum(value.nbytes for value in first.values()) > MOST_EMBEDDINGS:
                return StoredPrompts(self, list(prompts), list(images))
        return self.encode(prompts, images)

    @property
    def _text_cache(self) -> tuple[Callable[[], Encoder], str, str, Progress | None]:
        """What `embed` and `fill` are given besides prompts."""
        return self._load_encoder, self.network.text_cache, self._text_identity, self.progress

    def _load_encoder(self) -> Encoder:
        parts = ("vae", *self.transformer_parts)
        leave_out = [name for name in parts if name not in self.text_pipeline_reads]
        pipe = load_parts(self.folder, self.pipeline_class, leave_out, {"default": self.dtype})
        for name in self.text_parts:
            if isinstance(part := getattr(pipe, name, None), nn.Module):
                freeze(part.to(self.device))
        return lambda prompt: self.encode_prompt(pipe, prompt, self._text_length)

    @property
    def _text_length(self) -> int:
        return self.network.max_sequence_length or self.max_sequence_length

    @cached_property
    def _text_identity(self) -> str:
        """What an embedding depends on, besides its prompt."""
        if not self.network.text_cache:
            return ""
        folders = [self.folder / name for name in self.text_parts]
        return fingerprint(folders, self.family(), self._text_length, self.dtype)

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """d latents / d sigma `[B, *S]` at sigma `[B]` or `[]` fp32; conditioning has B rows.

        In the dtype of the module, or of autocast where it is on. Raises ValueError when the shapes disagree.
        """
        batch = latents.shape[0]
        if tuple(latents.shape[1:]) != self.latent_shape:
            shape = ", ".join(map(str, self.latent_shape))
            raise ValueError(f"latents must be [B, {shape}], got {list(latents.shape)}")
        if sigma.shape not in ((), (batch,)):
            raise ValueError(f"sigma must be [] or [{batch}], got {list(sigma.shape)}")
        rows = conditioning.prompt_embeds.shape[0]
        if rows != batch:
            raise ValueError(f"conditioning must hold {batch} rows, one per sample, got {rows}")
        return self.predict(latents, sigma.expand(batch), conditioning)

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]`, or videos `[B, F, 3, H, W]`, fp32 in [0, 1]; a few at a time, without gradient."""
        with torch.no_grad():
            parts = [self.decode_latents(part) for part in self._decoded_together(latents, DECODED_PIXELS)]
        return torch.cat([(part.float() / 2 + 0.5).clamp(0, 1) for part in parts])

    def decode_with_grad(self, latents: Tensor) -> Tensor:
        """The same pixels with a gradient to the latents; the backward computes each part's decoding again."""
        parts = [
            # There is no dropout, so there is no random state to put back.
            checkpoint(self.decode_latents, part, use_reentrant=False, preserve_rng_state=False)
            for part in self._decoded_together(latents, _DIFFERENTIATED_PIXELS)
        ]
        return torch.cat([(part.float() / 2 + 0.5).clamp(0, 1) for part in parts])

    def _decoded_together(self, latents: Tensor, most_pixels: int) -> Sequence[Tensor]:
        """The latents in the autoencoder's dtype, split so that a part makes at most so many pixels, or one sample."""
        pixels = self.network.height * self.network.width * self.network.num_frames
        return latents.to(self.pipe.vae.dtype).split(max(1, most_pixels // pixels))

    def _assemble(self, rows: list[Embedding], negative: Embedding) -> Conditioning:
        """Stacks the prompts; where lengths differ, zeros fill up and `extra["mask"]` tells the words from them.

        To the recipe's `max_sequence_length` where it names one: shapes then never change. Else to the longest.
        """
        fields: dict[str, Tensor] = {}
        extra: dict[str, Tensor] = {}
        lengths = torch.tensor([len(row["prompt_embeds"]) for row in rows])
        for name in rows[0]:
            values = [row[name].to(self.device) for row in rows]
            part = fields if name in _FIELDS else extra
            part[name] = pad_sequence(values, batch_first=True) if values[0].ndim > 1 else torch.stack(values)
            other = negative[name].to(self.device)
            part[f"negative_{name}"] = other.expand(len(rows), *other.shape)
        longest = int(lengths.max())
        if self.varying_length:
            longest = self.network.max_sequence_length or longest
            embeds = fields["prompt_embeds"]
            fields["prompt_embeds"] = functional.pad(embeds, (0, 0, 0, longest - embeds.shape[1]))
        if int(lengths.min()) < longest:
            extra["mask"] = (torch.arange(longest) < lengths[:, None]).to(self.device)
            everywhere = torch.ones(len(negative["prompt_embeds"]), dtype=torch.bool, device=self.device)
            extra["negative_mask"] = everywhere.expand(len(rows), -1)
        return Conditioning(**fields, extra=extra)


class StoredPrompts:
    """Conditioning rows of a set of prompts that is too large for memory."""

    def __init__(self, model: PipelineModel, prompts: list[str], images: list[Path]) -> None:
        self._model, self._prompts, self._images = model, prompts, images

    def rows(self, index: Tensor) -> Conditioning:
        """Rows `index [B]` (int64) on the model's device; each prompt is read once."""
        wanted, place = torch.unique(index.cpu(), return_inverse=True)
        prompts = [self._prompts[i] for i in wanted.tolist()]
        images = [self._images[i] for i in wanted.tolist()] if self._images else []
        return self._model.encode(prompts, images).rows(place.to(index.device))


def check_frame_groups(network: Network, group: int, family: str) -> None:
    """Raises ValueError unless a video is one frame and then groups of `group`."""
    frames = network.num_frames
    if (frames - 1) % group:
        below = (frames - 1) // group * group + 1
        raise ValueError(
            f"Network.num_frames is {frames}; {family} needs a multiple of {group} plus 1, such as {below} "
            f"or {below + group}"
        )


def denormalised(latents: Tensor, vae: Any) -> Tensor:
    """Latents `[B, C, F, H, W]` on the autoencoder's own scale: its configuration holds a mean and std a channel."""
    mean, std = (
        torch.tensor(values, dtype=latents.dtype).view(1, -1, 1, 1, 1).to(latents.device, non_blocking=True)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return latents * std + mean
