"""The records that flow through a training step, one way: conditioning -> trajectory -> scores -> credit -> batch.

Dimensions: P prompts, B samples, T steps, K kept steps, *S latent shape, L tokens, C channels; of one kept step, H rows
before it and E edges after it, `fan = E // H` children of each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias

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


@dataclass(frozen=True, slots=True, eq=False)
class ChosenRows:
    """Conditioning of some samples: gathered where a forward asks for it, not before."""

    conditioning: Conditioning
    index: Tensor  # [B'] int64

    def rows(self, index: Tensor | slice) -> Conditioning:
        """As of `Conditioning`."""
        return self.conditioning.rows(self.index[index])


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

    def part(self, rows: slice | NDArray[np.int64]) -> PromptSet:
        """Some of them: neighbours, or by their numbers on the host."""
        if isinstance(rows, slice):
            return PromptSet(self.prompts[rows], self.metadata[rows], self.images[rows])
        places = rows.tolist()
        return PromptSet(
            prompts=tuple(self.prompts[i] for i in places),
            metadata=tuple(self.metadata[i] for i in places),
            images=tuple(self.images[i] for i in places) if self.images else (),
        )

    def rows(self, index: Tensor) -> PromptSet:
        """Entries `index [B]` (int64), to repeat prompts over their group. Waits for the index's device."""
        return self.part(index.cpu().numpy())


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
    """One kept step: H rows before it, E edges after it. Edges of a row are neighbours.

    Of the samples of one optimiser step it holds no latents of its own but says which it means (`of_chosen`): `heads`
    gathers those of a micro-batch. Such a part may take some of a row's edges only.
    """

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
    fan: int = 1  # E // H; of rows of which some edges are left out, with them
    place: int = 0  # of the step in the plan
    rows: int = 0  # of the forwards that measured it, which the update repeats
    # What is meant of the latents above: [H] rows of `latents` and `unconditional`, [E] of `next_latents`. None = all.
    head_index: Tensor | None = None
    edge_index: Tensor | None = None
    # [E] ascending, the edges there are among the H * fan; None = all of them. On the device and on the host.
    taken: Tensor | None = None
    taken_host: NDArray[np.int64] | None = None
    # [H] -> B host: whose conditioning each row reads; None = that of the first sample behind its first edge.
    owner: NDArray[np.int64] | None = None

    @property
    def num_heads(self) -> int:
        """H."""
        return len(self.sigma)

    @property
    def owners(self) -> NDArray[np.int64]:
        """`[H]` host: the sample whose conditioning each row reads."""
        return self.samples_host[:: self.fan, 0] if self.owner is None else self.owner

    def spread(self, values: Tensor) -> Tensor:
        """What is of rows `[H, ...]` for each of their edges `[E, ...]`; a row's gradient is the sum of its edges'."""
        wide = spread(values, self.fan)
        return wide if self.taken is None else wide.index_select(0, self.taken)

    def spread_guidance(self, guidance: Guidance | None) -> Guidance | None:
        """The same for the unconditional half."""
        return None if guidance is None else Guidance(self.spread(guidance.negative_velocity), guidance.scale)

    @property
    def parent(self) -> Tensor:
        """`[E]` int64 -> H."""
        return self.spread(torch.arange(self.num_heads, device=self.row.device))

    def states(self) -> Transitions:
        """The same without what the edges lead to."""
        return replace(self, next_latents=self.next_latents.new_empty(len(self.next_latents), 0))

    def edges(self, rows: slice) -> slice:
        """The edges of some rows."""
        first, last = rows.start * self.fan, rows.stop * self.fan
        if self.taken_host is None:
            return slice(first, last)
        first, last = np.searchsorted(self.taken_host, [first, last]).tolist()
        return slice(first, last)

    def heads(self, rows: slice) -> Transitions:
        """Some rows with all their edges: views, or copies where rows are `head_index`'s.

        What they say of samples and prompts is unchanged.
        """
        edges = self.edges(rows)
        taken, taken_host = self.taken, self.taken_host
        if taken is not None and taken_host is not None:
            taken = taken[edges] - rows.start * self.fan
            taken_host = taken_host[edges] - rows.start * self.fan

        def of_rows(values: Tensor) -> Tensor:
            return values[rows] if self.head_index is None else values.index_select(0, self.head_index[rows])

        return replace(
            self,
            row=self.row[edges],
            latents=of_rows(self.latents),
            next_latents=self.next_latents[edges]
            if self.edge_index is None
            else self.next_latents.index_select(0, self.edge_index[edges]),
            log_prob=self.log_prob[edges],
            samples=self.samples[edges],
            samples_host=self.samples_host[edges],
            sigma=self.sigma[rows],
            unconditional=None if self.unconditional is None else of_rows(self.unconditional),
            head_index=None,
            edge_index=None,
            taken=taken,
            taken_host=taken_host,
            owner=None if self.owner is None else self.owner[rows],
        )

    def filled(self, num_rows: int) -> Transitions:
        """Of a micro-batch: its last row again and again, until a forward has as many as the rollout's.

        The same shapes give the same bits, whoever the other rows are. What is measured of the edges after the first E
        says nothing new.
        """
        more = num_rows - self.num_heads
        if more <= 0:
            return self
        assert self.head_index is None, "what is filled up has been gathered"

        def longer(values: Tensor, count: int) -> Tensor:
            return torch.cat([values, *[values[-count:]] * more]) if count else values

        # A row of which some edges are left out comes again without any.
        fan = self.fan if self.taken is None else 0
        edges: dict[str, Any] = {
            name: longer(getattr(self, name), fan) for name in ("row", "next_latents", "log_prob", "samples")
        }
        return replace(
            self,
            **edges,
            samples_host=np.concatenate([self.samples_host, *[self.samples_host[-fan:]] * more])
            if fan
            else self.samples_host,
            latents=longer(self.latents, 1),
            sigma=longer(self.sigma, 1),
            unconditional=None if self.unconditional is None else longer(self.unconditional, 1),
            owner=np.concatenate([self.owners, np.repeat(self.owners[-1:], more)]),
        )

    def of_chosen(self, chosen: NDArray[np.int64], num_samples: int) -> Transitions:
        """The part of some samples, ascending on the host, of `num_samples` in all; counted from 0, in that order.

        Rows with one edge each come one a sample. Rows that members of a group share all come, with those of their
        edges that lead to these samples: the forwards are then those of the rollout, whoever is chosen.
        """
        device, fan = self.row.device, self.fan
        number = np.full(num_samples, -1)
        number[chosen] = np.arange(len(chosen))
        samples = number[self.samples_host]
        here = samples[:, 0] >= 0
        assert ((samples >= 0) == here[:, None]).all(), "an edge's samples are of one optimiser step"
        edges = np.flatnonzero(here)
        samples = samples[edges]

        def uploaded(index: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(index)).to(device, non_blocking=True)

        edge_index = uploaded(edges)
        part: dict[str, Any] = {
            "row": self.row[edge_index],
            "log_prob": self.log_prob[edge_index],
            "samples": uploaded(samples),
            "samples_host": samples,
            "edge_index": edge_index,
        }
        if fan == 1:
            part |= {"sigma": self.sigma[edge_index], "head_index": edge_index}
            return replace(self, offsets=np.array([0, len(edges)]), **part)
        # A row without an edge here reads whatever is at hand: nothing is taken of it.
        owner = np.zeros(self.num_heads, dtype=np.int64)
        owner[edges[::-1] // fan] = samples[::-1, 0]
        own = np.bincount(edges // fan, minlength=self.num_heads)
        if (own == own[0]).all() and own[0] > 0:
            part |= {"fan": int(own[0])}
        else:
            part |= {"taken": edge_index, "taken_host": edges, "owner": owner}
        return replace(self, offsets=np.array([0, self.num_heads]), **part)

    def of_samples(self, rows: slice, num_samples: int) -> Transitions:
        """The part of some neighbouring samples, counted from 0 again; of `num_samples` in all.

        Samples are whole groups, or, where rows are not shared, any neighbours.
        """
        assert self.head_index is None, "a part of a part"
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
        filled: dict[str, Any] = {}
        for name in names:
            values = getattr(self, name)
            filled[name] = values.new_empty(len(choice), *values.shape[1:])
        for place, step in enumerate(own):
            index = torch.from_numpy(np.flatnonzero(choice == place)).to(self.row.device, non_blocking=True)
            meant = index if step.head_index is None else step.head_index[index]
            for name, values in filled.items():
                of_rows = name in ("latents", "next_latents", "unconditional")
                values.index_copy_(0, index, getattr(step, name).index_select(0, meant if of_rows else index))
        return replace(self, **filled, level=None, head_index=None, edge_index=None)


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

    @property
    def owners(self) -> NDArray[np.int64]:
        """As of `Transitions`."""
        return self.samples_host[:, 0]

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

    def of_chosen(self, chosen: NDArray[np.int64], index: Tensor) -> Trajectory:
        """The part of some samples, ascending on the host and on the device, counted from 0 in that order."""
        return replace(
            self,
            draws=self.draws.rows(index),
            x0=self.x0[index],
            transitions=tuple(t.of_chosen(chosen, len(self.x0)) for t in self.transitions),
            weight=None if self.weight is None else self.weight[index],
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
    idle: Tensor | None = None  # [B] bool: samples that teach nothing, where a step of the chain has looked
    # Whether optimiser steps are formed of the others, equal in number, and filled up with idle ones.
    refills: bool = False

    def of_samples(self, rows: slice | Tensor) -> Credit:
        """Some samples, neighbours or by their numbers."""
        return Credit(self.advantages[rows], self.weight[rows])


@dataclass(frozen=True, slots=True)
class Choices:
    """Random choices of a training step: pure functions of (seed, step, sample), the same however it is shared out."""

    seed: int
    step: int
    rows: slice | NDArray[np.int64]  # these of all samples
    num_samples: int

    def __len__(self) -> int:
        """Of the samples that are meant."""
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """A permutation of all samples `[num_samples]` on the host: the order in which an epoch of the update goes."""
        return np.random.default_rng([self.seed, _ORDER, self.step, epoch]).permutation(self.num_samples)

    def taken(self, num_choices: int, num_taken: int) -> NDArray[np.int64]:
        """`num_taken` of `num_choices` for each sample, in which order, `[rows, num_taken]` on the host.

        All of them in order, or a permutation's head for each sample.
        """
        if num_taken == num_choices:
            return np.tile(np.arange(num_choices), (len(self), 1))
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

    def of_samples(self, rows: slice | NDArray[np.int64]) -> Choices:
        """Those of some samples, neighbours or by their numbers."""
        assert isinstance(self.rows, slice), "a part of a part"
        first = self.rows.start
        if isinstance(rows, slice):
            return replace(self, rows=slice(first + rows.start, first + rows.stop))
        return replace(self, rows=first + rows)


# Streams of the run's seed that choices come from; data.draws has the others.
_STEPS, _UNIFORM, _WEIGHTED, _ORDER = 4, 5, 6, 7

# How the samples of a training step become the shares of its optimiser steps.
Partition: TypeAlias = Literal["groups", "across_groups", "shuffled"]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What an update learns from."""

    samples: Trajectory
    conditioning: Conditioning | ChosenRows  # one row per sample [B, ...]
    credit: Credit
    live: NDArray[np.bool_]  # [B] host: which samples carry a gradient
    choices: Choices
    prompts: PromptSet  # one for each sample, with what is known of it
    pairs: Tensor | None = None  # [N, 2] int64 -> B: the better and the worse of each pair
    # [B] host: which samples the mean counts; None = those that are live.
    counted: NDArray[np.bool_] | None = None
    # [B] host: which teach nothing, and whether optimiser steps are filled up with them: as of `Credit`.
    idle: NDArray[np.bool_] | None = None
    refills: bool = False
    # Of a part of a batch: the sum of the weights that its mean divides by, where it leaves out samples without a
    # gradient; None = the sum of its own.
    total_weight: Tensor | None = None
    whole_groups: bool = True

    def __len__(self) -> int:
        """B."""
        return len(self.live)

    @property
    def teaches(self) -> bool:
        """Whether an optimiser step on it is one: its mean is over something."""
        return bool((self.live if self.counted is None else self.counted).any())

    @property
    def idle_share(self) -> float:
        """Of the samples, how many teach nothing: of groups with equal rewards, or without a score."""
        counted = self.live if self.counted is None else self.counted
        return 1 - float((counted if self.idle is None else counted & ~self.idle).mean())

    def shares(
        self, num_shares: int, partition: Partition = "groups", epoch: int = 0
    ) -> list[slice | NDArray[np.int64]]:
        """The samples of each of `num_shares` optimiser steps: slices, or numbers on the host, ascending.

        "groups": neighbours, equal parts; whole groups where `num_shares` divides their number.
        "across_groups": share i takes members `i * n` to `(i + 1) * n` of every group of `num_shares * n`.
        "shuffled": equal parts of a permutation of all samples, a function of (seed, step, epoch); where it
        `refills`, of those that teach, and of as many idle ones as make the parts equal.
        """
        num_samples = len(self)
        if num_shares == 1:
            return [slice(0, num_samples)]
        if partition == "groups":
            size = num_samples // num_shares
            return [slice(first, first + size) for first in range(0, num_samples, size)]
        if partition == "across_groups":
            member = np.arange(num_samples) % self.samples.plan.group_size
            size = self.samples.plan.group_size // num_shares
            return [np.flatnonzero(member // size == place) for place in range(num_shares)]
        order = self.choices.order(epoch)
        if self.refills:
            assert self.idle is not None
            counted = self.live if self.counted is None else self.counted
            missing = -int(counted.sum()) % num_shares
            fills = order[self.idle[order]][:missing]
            order = order[counted[order] | np.isin(order, fills)]
            order = order[: len(order) - len(order) % num_shares]  # samples without a score fill nothing
        return [np.sort(share) for share in np.split(order, num_shares)]

    def of_samples(self, rows: slice | NDArray[np.int64]) -> Batch:
        """The part of some samples, neighbours or by their numbers (as `shares` gives them), counted from 0 again.

        By numbers, samples without a gradient are left out of it, though its mean may count them.
        """
        if isinstance(rows, slice):
            group_size = self.samples.plan.group_size
            return Batch(
                samples=self.samples.of_samples(rows),
                conditioning=self.conditioning.rows(rows),
                credit=self.credit.of_samples(rows),
                live=self.live[rows],
                choices=self.choices.of_samples(rows),
                prompts=self.prompts.part(rows),
                counted=None if self.counted is None else self.counted[rows],
                whole_groups=rows.start % group_size == 0 and rows.stop % group_size == 0,
            )
        assert isinstance(self.conditioning, Conditioning), "a part of a part"
        device, weight = self.credit.weight.device, self.credit.weight
        spare = np.zeros(len(rows), dtype=bool)
        if self.refills:  # those that fill up the update count as any other
            assert self.idle is not None
            spare = self.idle[rows]
            fills = torch.from_numpy(rows[spare]).to(device, non_blocking=True)
            weight = weight.index_fill(0, fills, 1.0)
        everyone = torch.from_numpy(rows).to(device, non_blocking=True)
        chosen = rows[self.live[rows] | spare]
        index = torch.from_numpy(chosen).to(device, non_blocking=True)
        return Batch(
            samples=self.samples.of_chosen(chosen, index),
            conditioning=ChosenRows(self.conditioning, index),
            credit=Credit(self.credit.advantages[index], weight[index]),
            live=np.ones(len(chosen), dtype=bool),
            choices=self.choices.of_samples(chosen),
            prompts=self.prompts.part(chosen),
            counted=None if self.counted is None else self.counted[rows] | spare,
            total_weight=weight[everyone].sum(),
            whole_groups=False,
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

    def sized(self, height: int, width: int, num_frames: int) -> FlowModel:
        """The same weights making another size, in pixels and frames: for evaluation.

        Raises:
            ValueError: the model has one size, or cannot make this one.
        """
        raise ValueError(
            f"{self.family()} makes one size; leave the evaluation's height, width and num_frames at 0"
        )

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
