"""The records that flow through a training step, one way: conditioning -> trajectory -> scores -> credit -> batch.

Dimensions: P prompts, B samples, T steps, K kept steps, *S latent shape, L tokens, C channels; of one kept step, H rows
before it and E edges after it, `fan = E // H` children of each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowgrpo_fast.ops import Guidance
from flowgrpo_fast.schedule.plan import Plan


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
        # Written out: a walk calls it for every micro-batch, and a look at the fields' names would cost as much again.
        return Conditioning(
            _rows(self.prompt_embeds, index),
            None if self.pooled_prompt_embeds is None else _rows(self.pooled_prompt_embeds, index),
            None if self.negative_prompt_embeds is None else _rows(self.negative_prompt_embeds, index),
            None
            if self.negative_pooled_prompt_embeds is None
            else _rows(self.negative_pooled_prompt_embeds, index),
            {name: _rows(values, index) for name, values in self.extra.items()},
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

    def part(self, rows: slice) -> PromptSet:
        """Some neighbours."""
        return PromptSet(self.prompts[rows], self.metadata[rows], self.images[rows])

    def rows(self, index: Tensor) -> PromptSet:
        """Entries `index [B]` (int64), to repeat prompts over their group. Waits for the index's device."""
        places = index.tolist()
        return PromptSet(
            prompts=tuple(self.prompts[i] for i in places),
            metadata=tuple(self.metadata[i] for i in places),
            images=tuple(self.images[i] for i in places) if self.images else (),
        )


class Predicted(NamedTuple):
    """A velocity, and the unconditional half where the policy guides; the kernels mix the two on their way."""

    velocity: Tensor  # [B, *S]
    guidance: Guidance | None = None

    @property
    def mixed(self) -> Tensor:
        """`negative + scale * (velocity - negative)`, for code that differentiates it in plain torch."""
        if self.guidance is None:
            return self.velocity
        negative, scale = self.guidance
        return negative + scale * (self.velocity - negative)


@dataclass(frozen=True, slots=True)
class Draws:
    """What a rollout starts from. Group members are adjacent rows and live on one rank."""

    prompt_index: Tensor  # [P] int64, which prompts of the set
    group_id: Tensor  # [B] int64, 0..P-1
    seed: Tensor  # [B] int64; an edge's noise is that of the first sample behind it
    start_seed: Tensor  # [B] int64, start noise; equal within a group that shares it

    def rows(self, index: Tensor | slice) -> Draws:
        """Some of the samples, in that order."""
        return replace(
            self,
            group_id=self.group_id[index].contiguous(),
            seed=self.seed[index].contiguous(),
            start_seed=self.start_seed[index].contiguous(),
        )

    def of_prompts(self, first: int, num_prompts: int) -> Draws:
        """The samples of some neighbouring prompts, whose groups count from 0 again."""
        group_size = len(self.group_id) // len(self.prompt_index)
        rows = self.rows(slice(first * group_size, (first + num_prompts) * group_size))
        return replace(
            rows,
            prompt_index=self.prompt_index[first : first + num_prompts],
            group_id=rows.group_id - first,
        )


def spread(values: Tensor, fan: int) -> Tensor:
    """Each row `fan` times, neighbours: rows before a step for the edges after it; a row's gradient is their sum."""
    if fan == 1:
        return values
    return values.unsqueeze(1).expand(-1, fan, *values.shape[1:]).flatten(0, 1).contiguous()


def spread_guidance(guidance: Guidance | None, fan: int) -> Guidance | None:
    """The same for the unconditional half."""
    return None if guidance is None else Guidance(spread(guidance.negative_velocity, fan), guidance.scale)


@dataclass(frozen=True, slots=True, eq=False)
class Transitions:
    """One kept step: H rows before it, E edges after it. Edges of a row are neighbours."""

    row: Tensor  # [E] int64, rows of the plan's table
    latents: Tensor  # [H, *S]
    next_latents: Tensor  # [E, *S] as stored; [E, 0] where states are kept alone
    log_prob: Tensor  # [E] fp32, of the policy that sampled; the mean over latent elements
    samples: Tensor  # [E, m] int64 -> B, the samples behind an edge; it reads the credit of the first
    samples_host: NDArray[np.int64]  # the same on the host
    sigma: Tensor  # [H] fp32
    offsets: NDArray[np.int64]  # [P+1] host: the rows of prompt p are offsets[p] to offsets[p+1]
    # Of the unconditional half of guidance, [H, *S], where the update takes it from here instead of asking again.
    unconditional: Tensor | None = None
    # Host: the sigma that all rows are at, which a model of several experts picks one by; None where they differ.
    level: Tensor | None = None
    fan: int = 1  # E // H
    place: int = 0  # of the step in the plan
    rows: int = 0  # of the forwards that measured it, which the update repeats

    @property
    def num_heads(self) -> int:
        """H."""
        return len(self.latents)

    @property
    def parent(self) -> Tensor:
        """`[E]` int64 -> H."""
        return torch.arange(self.num_heads, device=self.row.device).repeat_interleave(self.fan)

    def states(self) -> Transitions:
        """The same without what the edges lead to."""
        return replace(self, next_latents=self.next_latents.new_empty(len(self.next_latents), 0))

    def heads(self, rows: slice) -> Transitions:
        """Some rows with all their edges: views. What they say of samples and prompts is unchanged."""
        edges = slice(rows.start * self.fan, rows.stop * self.fan)
        return replace(
            self,
            row=self.row[edges],
            latents=self.latents[rows],
            next_latents=self.next_latents[edges],
            log_prob=self.log_prob[edges],
            samples=self.samples[edges],
            samples_host=self.samples_host[edges],
            sigma=self.sigma[rows],
            unconditional=None if self.unconditional is None else self.unconditional[rows],
        )

    def of_samples(self, rows: slice, num_samples: int) -> Transitions:
        """The part of some neighbouring samples, counted from 0 again; of `num_samples` in all.

        Samples are whole groups, or, where rows are not shared, any neighbours.
        """
        num_prompts = len(self.offsets) - 1
        group_size = num_samples // num_prompts
        if rows.start % group_size == 0 and rows.stop % group_size == 0:
            offsets = self.offsets[rows.start // group_size : rows.stop // group_size + 1]
        else:
            assert self.samples.shape == (self.num_heads, 1), (
                "members of a group share rows that an optimiser step splits"
            )
            offsets = np.searchsorted(self.samples_host[:, 0], [rows.start, rows.stop])
        part = self.heads(slice(int(offsets[0]), int(offsets[-1])))
        return replace(
            part,
            samples=part.samples - rows.start,
            samples_host=part.samples_host - rows.start,
            offsets=offsets - offsets[0],
        )

    @staticmethod
    def joined(parts: Sequence[Transitions | None], num_prompts: int, num_samples: int) -> Transitions:
        """The same kept step of several chunks, each of `num_prompts` prompts and `num_samples` samples.

        None stands for a chunk none of whose prompts has an edge there.
        """
        here = [(place, part) for place, part in enumerate(parts) if part is not None]
        if len(parts) == len(here) == 1:
            return here[0][1]
        tensors = ["row", "latents", "next_latents", "log_prob", "sigma"]
        tensors += ["unconditional"] if here[0][1].unconditional is not None else []
        counts = [np.zeros(num_prompts, int) if part is None else np.diff(part.offsets) for part in parts]
        joined: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for _, part in here]) for name in tensors
        }
        return replace(
            here[0][1],
            **joined,
            samples=torch.cat([part.samples + place * num_samples for place, part in here]),
            samples_host=np.concatenate([part.samples_host + place * num_samples for place, part in here]),
            offsets=np.cumsum([0, *np.concatenate(counts)]),
        )

    @staticmethod
    def side_by_side(steps: Sequence[Transitions]) -> Transitions:
        """The same rows at several steps as the rows of one forward; none of them branches."""
        first = steps[0]
        tensors = ["row", "latents", "next_latents", "log_prob", "sigma", "samples"]
        tensors += ["unconditional"] if first.unconditional is not None else []
        joined: dict[str, Any] = {
            name: torch.cat([getattr(step, name) for step in steps]) for name in tensors
        }
        return replace(
            first,
            **joined,
            samples_host=np.concatenate([step.samples_host for step in steps]),
        )

    def picked(self, own: Sequence[Transitions], choice: NDArray[np.int64]) -> Transitions:
        """Of several steps of the same B rows, for each row that of step `choice[b]` (host)."""
        names = ["row", "latents", "next_latents", "log_prob", "sigma"]
        names += ["unconditional"] if self.unconditional is not None else []
        filled: dict[str, Any] = {name: torch.empty_like(getattr(self, name)) for name in names}
        for place, step in enumerate(own):
            index = torch.from_numpy(np.flatnonzero(choice == place)).to(self.row.device, non_blocking=True)
            for name, values in filled.items():
                values.index_copy_(0, index, getattr(step, name).index_select(0, index))
        return replace(self, **filled, level=None)


@dataclass(frozen=True, slots=True, eq=False)
class Noised:
    """Finished samples to be noised again; the noise is made where it is used, see `objectives.forward`."""

    row: ClassVar[None] = None  # of no table
    rows: ClassVar[int] = 0  # no rollout says how many go through the network at once

    sigma: Tensor  # [R] fp32
    step: Tensor  # [R] int64, sets apart a sample's several noises
    x0: Tensor  # [R, *S]
    seed: Tensor  # [R] int64
    samples: Tensor  # [R, 1] int64 -> B
    samples_host: NDArray[np.int64]
    fan: int = 1
    level: Tensor | None = None  # host: the sigma of all rows; None where they differ

    @property
    def num_heads(self) -> int:
        """R."""
        return len(self.sigma)

    def heads(self, rows: slice) -> Noised:
        """Some rows: views."""
        names = ("sigma", "step", "x0", "seed", "samples", "samples_host")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    @staticmethod
    def side_by_side(steps: Sequence[Noised]) -> Noised:
        """The same samples, noised several times, as the rows of one forward."""
        tensors = ("sigma", "step", "x0", "seed", "samples")
        joined: dict[str, Any] = {
            name: torch.cat([getattr(step, name) for step in steps]) for name in tensors
        }
        return replace(
            steps[0],
            **joined,
            samples_host=np.concatenate([step.samples_host for step in steps]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Imposed:
    """Walks that some samples repeat from the start, up to where their own begin: of a replay buffer, say."""

    samples: NDArray[np.int64]  # [N] host, ascending: which samples
    states: tuple[Tensor, ...]  # [N, *S] each: the start noise, the latents after step 0, after step 1, ...

    def of_samples(self, first: int, num_samples: int) -> Imposed | None:
        """Those of some neighbouring samples, counted from 0 again; None where there are none."""
        here = (self.samples >= first) & (self.samples < first + num_samples)
        if not here.any():
            return None
        places = np.flatnonzero(here)
        rows = slice(int(places[0]), int(places[-1]) + 1)
        return Imposed(self.samples[rows] - first, tuple(state[rows] for state in self.states))


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One rollout. After cuts it holds the survivors, and `draws` theirs."""

    plan: Plan
    draws: Draws
    x0: Tensor  # [B, *S] the finished samples
    transitions: tuple[Transitions, ...]  # one a kept step, in the order of the walk
    coeffs: Tensor  # [N, 8] fp32, the plan's table on the device
    evaluations: int = 0  # network evaluations spent: rows times forwards, cut candidates included
    # [B] fp32, weight of a sample's loss besides its credit: of one that another policy sampled. None = 1.
    weight: Tensor | None = None

    @property
    def num_prompts(self) -> int:
        """P."""
        return len(self.draws.prompt_index)

    def of_samples(self, rows: slice) -> Trajectory:
        """The part of some neighbouring samples, counted from 0 again."""
        num_samples = len(self.x0)
        group_size = num_samples // self.num_prompts
        whole = rows.start % group_size == 0 and rows.stop % group_size == 0
        draws = (
            self.draws.of_prompts(rows.start // group_size, (rows.stop - rows.start) // group_size)
            if whole
            else self.draws.rows(rows)
        )
        return replace(
            self,
            draws=draws,
            x0=self.x0[rows],
            transitions=tuple(t.of_samples(rows, num_samples) for t in self.transitions),
            weight=None if self.weight is None else self.weight[rows],
        )

    def without_unconditional(self) -> Trajectory:
        """What it stores of guidance left out: the weights are no longer those that gave it."""
        return replace(self, transitions=tuple(replace(t, unconditional=None) for t in self.transitions))


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

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values [B]` over the samples that have a score; 0 where none has."""
        if self.valid is None:
            return values.mean()
        return values.where(self.valid, 0.0).sum() / self.valid.sum().clamp(min=1)

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


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Finished samples and what they are worth to the rewards."""

    samples: Trajectory
    scores: Scores
    reward_weights: dict[str, float]  # of each objective, in its order


@dataclass(frozen=True, slots=True, eq=False)
class Credit:
    """What each sample is worth."""

    # [B] fp32, or [B, K], one a kept step; [B, Q] objectives before they are mixed; [B, K or 1, *region]
    advantages: Tensor
    weight: Tensor  # [B] fp32, or [B, K]: 0 drops, else 1

    def of_samples(self, rows: slice) -> Credit:
        """Some neighbouring samples."""
        return Credit(self.advantages[rows], self.weight[rows])


@dataclass(frozen=True, slots=True)
class Choices:
    """Random choices of a training step: pure functions of (seed, step, sample), the same however it is shared out."""

    seed: int
    step: int
    rows: slice  # these of all samples
    num_samples: int

    def taken(self, num_choices: int, num_taken: int) -> NDArray[np.int64]:
        """`num_taken` of `num_choices` for each sample, in which order, `[rows, num_taken]` on the host.

        All of them in order, or a permutation's head for each sample.
        """
        if num_taken == num_choices:
            return np.tile(np.arange(num_choices), (self.rows.stop - self.rows.start, 1))
        generator = np.random.default_rng([self.seed, _STEPS, self.step])
        order = generator.permuted(np.tile(np.arange(num_choices), (self.num_samples, 1)), axis=1)
        return np.ascontiguousarray(order[self.rows, :num_taken])

    def uniform(self, num: int) -> NDArray[np.float64]:
        """`num` numbers in [0, 1) for each sample, `[rows, num]` on the host."""
        generator = np.random.default_rng([self.seed, _UNIFORM, self.step])
        return generator.random((self.num_samples, num))[self.rows]

    def weighted(self, weights: Sequence[float], num_taken: int) -> list[int]:
        """`num_taken` places, ascending, the same for all samples; drawn one after another by weight, none twice."""
        generator = np.random.default_rng([self.seed, _WEIGHTED, self.step])
        shares = np.asarray(weights, dtype=np.float64)
        return sorted(
            generator.choice(len(shares), num_taken, replace=False, p=shares / shares.sum()).tolist()
        )

    def of_samples(self, rows: slice) -> Choices:
        """Those of some neighbouring samples."""
        first = self.rows.start
        return replace(self, rows=slice(first + rows.start, first + rows.stop))


_STEPS, _UNIFORM, _WEIGHTED = (
    4,
    5,
    6,
)  # streams of the run's seed that choices come from; data.draws has the others


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What an update learns from."""

    samples: Trajectory
    conditioning: Conditioning  # one row per sample [B, ...]
    credit: Credit
    live: NDArray[np.bool_]  # [B] host: which samples carry weight
    choices: Choices
    prompts: PromptSet  # one for each sample, with what is known of it
    pairs: Tensor | None = None  # [N, 2] int64 -> B: the better and the worse of each pair

    def __len__(self) -> int:
        """B."""
        return len(self.live)

    def shares(self, num_shares: int) -> list[slice]:
        """The samples of each of `num_shares` optimiser steps: neighbours, equal parts."""
        size = len(self) // num_shares
        return [slice(first, first + size) for first in range(0, len(self), size)]

    def of_samples(self, rows: slice) -> Batch:
        """The part of some neighbouring samples, counted from 0 again."""
        return Batch(
            samples=self.samples.of_samples(rows),
            conditioning=self.conditioning.rows(rows),
            credit=self.credit.of_samples(rows),
            live=self.live[rows],
            choices=self.choices.of_samples(rows),
            prompts=self.prompts.part(rows),
        )

    def without_unconditional(self) -> Batch:
        """As of `Trajectory`."""
        return replace(self, samples=self.samples.without_unconditional())


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
    published: tuple[
        str, ...
    ] = ()  # the layers that Sol-RL quantises, by the same kind of expressions; () = unknown
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
            raise ValueError(f"data.images is set; {self.family()} makes images from text alone")

    def _lacks(self, method: str) -> ValueError:
        return ValueError(f"{self.family()} has no {method}; a FlowModel defines encode, velocity and decode")


# Scores unfinished samples: x0 predictions [B, *S] of equal groups, neighbours in the batch -> [B] fp32.
PreviewScore: TypeAlias = Callable[[Tensor], Tensor]
