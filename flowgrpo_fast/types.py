"""The records that flow through a training step, one way: conditioning -> trajectory -> scores -> batch.

Dimensions: B samples, P prompts, G group, T steps, K kept steps, *S latent shape, L tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
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
class PromptSet:
    """Prompts and what comes with each: those of a run, or, after `rows`, one for each of some samples."""

    prompts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...]  # one each; what the prompt file says of it besides
    images: tuple[
        Path, ...
    ] = ()  # one each, or none at all: the source images that an editing model starts from

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Tensor) -> PromptSet:
        """Entries `index [B]` (int64), to repeat prompts over their group. Waits for the index's device."""
        places = index.tolist()
        return PromptSet(
            prompts=tuple(self.prompts[i] for i in places),
            metadata=tuple(self.metadata[i] for i in places),
            images=tuple(self.images[i] for i in places) if self.images else (),
        )


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
class Scores:
    """What B samples are worth. `total` is what credit is computed on unless it works per objective."""

    total: Tensor  # [B] fp32
    objectives: dict[str, Tensor] = field(default_factory=dict)  # name -> [B] fp32, unweighted
    # What rewards say besides: name -> [B], [B, D], [B, F] of frames or [B, *region], fp32
    signals: dict[str, Tensor] = field(default_factory=dict)
    # [B] bool: False where a sample got no score, whose numbers are 0 and mean nothing. None = every sample has one,
    # which nobody has to ask the device for.
    valid: Tensor | None = None

    @staticmethod
    def joined(parts: Sequence[Scores]) -> Scores:
        """Those of several batches, one after another."""
        if len(parts) == 1:
            return parts[0]
        everyone = [torch.ones_like(p.total, dtype=torch.bool) if p.valid is None else p.valid for p in parts]
        return Scores(
            total=torch.cat([p.total for p in parts]),
            objectives={name: torch.cat([p.objectives[name] for p in parts]) for name in parts[0].objectives},
            signals={name: torch.cat([p.signals[name] for p in parts]) for name in parts[0].signals},
            valid=None if all(p.valid is None for p in parts) else torch.cat(everyone),
        )


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


class FlowModel(Protocol):
    """One family of generators: three methods and the module that is trained."""

    latent_shape: tuple[int, ...]  # *S of one sample
    module: nn.Module  # what is trained and checkpointed

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """One conditioning row per prompt, on the module's device."""
        ...

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """d latents / d sigma `[B, *S]` of latents `[B, *S]` at sigma `[B]` fp32 (1 = noise)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, C, H, W]`, or videos `[B, F, C, H, W]`, fp32 in [0, 1]."""
        ...


def at_step(model: FlowModel, sigmas: Tensor, step: int | Tensor) -> FlowModel:
    """What of a model runs where all samples are at one step: of experts for parts of the schedule, the one for it.

    A model that has some says so by a method `expert(sigma)`, with sigma a 0-d tensor on the host.
    """
    expert: Callable[[Tensor], FlowModel] | None = getattr(model, "expert", None)
    return model if expert is None else expert(sigmas[step])


# Scores unfinished samples: x0 predictions [B, *S] of equal groups, neighbours in the batch -> [B] fp32.
PreviewScore: TypeAlias = Callable[[Tensor], Tensor]
