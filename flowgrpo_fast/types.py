"""The records that flow through a training step, one way: conditioning -> trajectory -> rewards -> batch.

Dimensions: B samples, P prompts, G group, T steps, K kept steps, *S latent shape, L tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Protocol, TypeAlias

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the model is fed, one row per prompt (or per sample after `rows`)."""

    prompt_embeds: Tensor  # [P, L, C]
    pooled_prompt_embeds: Tensor | None = None  # [P, C']
    negative_prompt_embeds: Tensor | None = None  # [P, L, C]
    negative_pooled_prompt_embeds: Tensor | None = None  # [P, C']
    # name -> [P, ...]: image, mask, ...; `negative_<name>` is what the unconditional half sees as `<name>`
    extra: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, index: Tensor | slice) -> Conditioning:
        """Rows `index [B]` (int64) of every field, to repeat prompts over their group; a slice gives views."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return replace(
            self,
            **{k: _rows(v, index) for k, v in tensors.items() if v is not None},
            extra={k: _rows(v, index) for k, v in self.extra.items()},
        )

    def negative(self) -> Conditioning:
        """The unconditional half of classifier-free guidance."""
        if self.negative_prompt_embeds is None:
            raise ValueError("guidance_scale > 1 needs negative_prompt_embeds; the model's encode gave none")
        return replace(
            self,
            prompt_embeds=self.negative_prompt_embeds,
            pooled_prompt_embeds=self.negative_pooled_prompt_embeds,
            extra={k: self.extra.get(f"negative_{k}", v) for k, v in self.extra.items()},
        )


def _rows(values: Tensor, index: Tensor | slice) -> Tensor:
    """Rows of one field; a row that stands for all of them (stride 0) is not copied."""
    if isinstance(index, slice):
        return values[index]
    if values.stride(0) == 0:
        return values[:1].expand(len(index), *values.shape[1:])
    return values.index_select(0, index)


@dataclass(frozen=True, slots=True)
class Draws:
    """What a rollout starts from. Group members are adjacent rows and live on one rank."""

    prompt_index: Tensor  # [P] int64, which prompts of the set
    group_id: Tensor  # [B] int64, 0..P-1
    seed: Tensor  # [B] int64, noise of the stochastic steps
    start_seed: Tensor  # [B] int64, start noise; equal within a group that shares it
    shares_start: bool = False  # every group does, and all have one size

    def rows(self, index: Tensor | slice) -> Draws:
        """Some of the samples, in that order."""
        return replace(
            self,
            group_id=self.group_id[index].contiguous(),
            seed=self.seed[index].contiguous(),
            start_seed=self.start_seed[index].contiguous(),
        )


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One rollout. Kept steps are the stochastic ones: they carry a log-prob and can be replayed.

    After pruning it holds the survivors, and `draws` theirs.
    """

    sigmas: Tensor  # [T+1] fp32, host: 1 = noise, last = 0
    coeffs: Tensor  # [T, 8] fp32, device
    step_index: Tensor  # [K] int64, host: which of the T steps were kept
    latents: Tensor  # [B, K, *S] before each kept step, storage dtype
    next_latents: Tensor  # [B, K, *S] after it, as stored
    log_prob: Tensor  # [B, K] fp32, mean over latent elements
    draws: Draws
    x0: Tensor  # [B, *S] the finished samples
    evaluations: int = 0  # network evaluations spent: rows times forwards, pruned candidates included
    # [B, K, *S] of guidance at the kept steps, where the update takes it from here instead of computing it again
    unconditional: Tensor | None = None
    shares_first: bool = False  # one velocity served each group at the first kept step, and will in a replay


@dataclass(frozen=True, slots=True)
class RewardOutput:
    """Rewards of B samples. `total` is what credit is computed on unless it works per objective."""

    total: Tensor  # [B] fp32
    objectives: dict[str, Tensor] = field(default_factory=dict)  # name -> [B], unweighted


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """A trajectory with its credit."""

    trajectory: Trajectory
    conditioning: Conditioning  # one row per sample [B, ...]
    advantages: Tensor  # [B] fp32
    weight: Tensor  # [B] fp32: 0 drops a sample from the loss, else 1
    # [B, N] int64: which of the K kept steps (NFT: of the T sigmas) each sample trains on
    step_position: Tensor
    live: tuple[bool, ...] = ()  # [B] on the host: which weights are above 0; empty = all


class PromptRows(Protocol):
    """Conditioning of a set of prompts: a `Conditioning`, or what reads one from disk."""

    def rows(self, index: Tensor) -> Conditioning:
        """Rows `index [B]` (int64), on the index's device."""
        ...


class FlowModel:
    """One family of generators. Ours and a user's own are subclasses; a loader makes one (`models.loading`).

    A subclass sets `latent_shape` and `module` and defines `encode`, `velocity` and `decode`. Everything else has a
    default, which it replaces where it can do more. Models are told apart by identity (captured steps and views are
    kept for each), so a dataclass that is one says `eq=False`.
    """

    latent_shape: tuple[int, ...]  # *S of one sample
    module: nn.Module  # what is trained and checkpointed
    latent_grid: tuple[int, ...] | None = (
        None  # height and width of packed latents, whose shape does not show them
    )
    image_seq_len: int | None = None  # image tokens of one sample: a dynamic shift grows with them
    sensitive: tuple[str, ...] = ()  # regular expressions over the transformer's layer names: never quantised
    takes_images: bool = False  # `encode` reads a source image for each prompt
    mixes_guidance: bool = False  # the halves of guidance are mixed by `guided`, not by the plain formula

    @classmethod
    def family(cls) -> str:
        """What messages call it."""
        return cls.__name__

    @property
    def transformer(self) -> nn.Module:
        """The part of `module` that low precision may quantise."""
        return self.module

    def encode(self, prompts: Sequence[str], images: Sequence[Path] = ()) -> Conditioning:
        """One conditioning row per prompt, on the module's device.

        Args:
            images: one source image for each prompt, where the model `takes_images`; else there are none.

        Raises:
            ValueError: a prompt or an image that the model cannot read.
        """
        raise self._lacks("encode")

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """d latents / d sigma `[B, *S]` of latents `[B, *S]` at sigma `[B]` fp32 (1 = noise)."""
        raise self._lacks("velocity")

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, C, H, W]`, or videos `[B, F, C, H, W]`, fp32 in [0, 1], without gradient."""
        raise self._lacks("decode")

    def decode_with_grad(self, latents: Tensor) -> Tensor:
        """As `decode`, with the gradient to the latents that a differentiable reward needs.

        Raises:
            ValueError: the model has no such decoder.
        """
        raise ValueError(
            f"{self.family()} decodes without gradient, which a differentiable reward needs; define its "
            "decode_with_grad, or choose a method that needs rewards alone"
        )

    def guided(self, velocity: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Both halves `[B, *S]` of classifier-free guidance as one velocity; only asked where `mixes_guidance`."""
        return negative + scale * (velocity - negative)

    def expert(self, sigma: Tensor) -> FlowModel:
        """What runs where all samples are at `sigma`, 0-d on the host; the same object for the same part of it."""
        return self

    def own_prompts(self) -> list[str]:
        """What a task without a file of prompts trains on; empty: the model brings none."""
        return []

    def prompt_rows(self, prompts: Sequence[str], images: Sequence[Path] = ()) -> PromptRows:
        """Conditioning of a run's prompts, in memory unless the model keeps it elsewhere.

        Raises:
            ValueError: as `encode`, or images for a model that takes none.
        """
        self.check_images(images)
        return self.encode(prompts, images)

    def check_images(self, images: Sequence[Path]) -> None:
        """Refuses source images for a model that takes none."""
        if images and not self.takes_images:
            raise ValueError(f"task.images is set; {self.family()} makes images from text alone")

    def _lacks(self, method: str) -> ValueError:
        return ValueError(f"{self.family()} has no {method}; a FlowModel defines encode, velocity and decode")


def at_step(model: FlowModel, sigmas: Tensor, step: int | Tensor) -> FlowModel:
    """What of a model runs where all samples are at one step: of experts for parts of the schedule, the one for it."""
    return model.expert(sigmas[step])


# Scores unfinished samples: x0 predictions [B, *S] of equal groups, neighbours in the batch -> [B] fp32.
PreviewScore: TypeAlias = Callable[[Tensor], Tensor]

# A reward: images [B, C, H, W] fp32 in [0, 1] and their B prompts -> [B] fp32.
RewardFunction: TypeAlias = Callable[[Tensor, list[str]], Tensor]
