"""What an objective is: it names points at which the network is asked, measures there, and turns that into a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowgrpo_fast.objectives.snapshots import SnapshotRule
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.types import Batch, Predicted

# name -> [E] or [E, *region], fp32. What carries a gradient is what the loss is differentiated by.
Stats: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Requires:
    """What a part needs from the others; one check at the start compares it with what they give."""

    log_probs: bool = False  # stored transitions, which only stochastic steps have
    states: bool = False  # stored states of a walk, at the steps its window keeps, stochastic or not
    snapshots: Mapping[str, SnapshotRule] = field(default_factory=dict)
    sampled_by: str = ""  # the snapshot that training samples come from; empty = the trained policy
    reward_gradient: bool = False
    pairs: bool = False
    all_steps: bool = False  # every kept step of a sample: none left to chance, none lost
    no_guidance: bool = False  # samples and trains at guidance_scale 1
    whole_groups: bool = False  # an optimiser step sees all members of a group or none: the loss joins them
    # Optimiser steps that are formed of the samples that teach, equal in number: of a permutation, which splits groups.
    equal_updates: bool = False
    # Of an objective: whether a sample of advantage 0 has no gradient, and need not be asked about.
    silent_at_zero: bool = False
    signals: frozenset[str] = frozenset()  # of the rewards, besides their scores
    metadata: Mapping[str, Sequence[str]] = field(
        default_factory=dict
    )  # of each prompt: name -> values it may have
    incomplete: str = ""  # what a run has to say that a recipe cannot know, one line with the remedy

    def joined(self, other: Requires) -> Requires:
        """The needs of two parts together."""
        return Requires(
            log_probs=self.log_probs or other.log_probs,
            states=self.states or other.states,
            snapshots={**self.snapshots, **other.snapshots},
            sampled_by=self.sampled_by or other.sampled_by,
            reward_gradient=self.reward_gradient or other.reward_gradient,
            pairs=self.pairs or other.pairs,
            all_steps=self.all_steps or other.all_steps,
            no_guidance=self.no_guidance or other.no_guidance,
            whole_groups=self.whole_groups or other.whole_groups,
            equal_updates=self.equal_updates or other.equal_updates,
            silent_at_zero=self.silent_at_zero and other.silent_at_zero,
            signals=self.signals | other.signals,
            metadata={**self.metadata, **other.metadata},
            incomplete=self.incomplete or other.incomplete,
        )


class Point(Protocol):
    """A place where the network is asked: H rows, each with `fan` edges that a loss is taken of."""

    fan: int
    rows: int  # that go through the network at once; 0 = as many as samples do by default
    row: Tensor | None  # [E] int64, rows of the plan's table, of stored transitions
    samples: Tensor  # [E, m] int64 -> B, the samples behind an edge
    samples_host: NDArray[np.int64]
    level: Tensor | None  # host: the sigma of all rows; None where they differ

    @property
    def num_heads(self) -> int:
        """H."""
        ...

    @property
    def owners(self) -> NDArray[np.int64]:
        """`[H]` host: the sample whose conditioning each row reads."""
        ...

    def heads(self, rows: slice) -> Any:
        """Some rows with their edges."""
        ...

    def filled(self, num_rows: int) -> Any:
        """Its last row again and again, up to so many; asked of stored transitions alone."""
        ...

    @staticmethod
    def side_by_side(steps: Sequence[Any]) -> Any:
        """The same rows at several points as the rows of one forward."""
        ...


class Points(Sequence[Any]):
    """Points made one at a time, when they are looked at: a list of them would hold all their latents."""

    def __init__(self, count: int, make: Callable[[int], Any], per_sample: int | None = None) -> None:
        self._make, self._count = make, count
        self.per_sample = count if per_sample is None else per_sample  # edges on a sample's way

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        if not -self._count <= place < self._count:
            raise IndexError(place)
        return self._make(place % self._count)

    def __iter__(self) -> Iterator[Any]:
        return (self._make(place) for place in range(self._count))


class Evaluator(Protocol):
    """The networks at the rows of one point, their conditioning bound."""

    coeffs: Tensor  # [N, 8] fp32, the plan's table
    interval: Tensor  # [N] fp32, sigma before minus sigma after each row

    def trained(self, latents: Tensor, sigma: Tensor, unconditional: Tensor | None = None) -> Predicted:
        """With gradient, where the caller's mode has one; `unconditional`: that half, if it is known already."""
        ...

    def frozen(self, name: str, latents: Tensor, sigma: Tensor) -> Predicted:
        """A snapshot, without gradient."""
        ...

    def routed(self, names: Sequence[str], latents: Tensor, sigma: Tensor) -> Predicted:
        """Each row by the snapshot that `names` has for it, without gradient."""
        ...

    @property
    def metadata(self) -> Sequence[Mapping[str, Any]]:
        """What is known of the prompt of each row, besides its text."""
        ...

    def pull_back(
        self, name: str, latents: Tensor, sigma: Tensor, cotangent: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A snapshot's velocity, and the gradient of `<velocity, cotangent>` by the latents, both detached."""
        ...

    def reward(self, x0: Tensor) -> Tensor:
        """Rewards `[R]` with gradient to x0: decoded and scored, the decode checkpointed."""
        ...


class Terms(NamedTuple):
    """A loss and what is worth showing of it."""

    loss: Tensor  # [E], [E, *region]; [B] of a coupled objective
    shown: dict[str, Tensor]  # name -> [E], averaged
    worst: dict[str, Tensor]  # name -> [E], of which the largest is shown


class Costs(NamedTuple):
    """What an objective asks of the networks in one training step, counted before anything is sampled."""

    rows: int  # of all its points
    trained: int = 1  # velocities of the trained weights at each row, with gradient
    frozen: int = 0  # velocities of snapshots at each row
    rewarded: int = 0  # finished samples that are decoded and rewarded with gradient


class Objective(Protocol):
    """The common ground of clipped ratios, forward processes, preferences, reward gradients and distillation."""

    @property
    def requires(self) -> Requires:
        """What it needs."""
        ...

    @property
    def couples(self) -> bool:
        """Whether the loss joins a sample's steps, or a group: it is then linearised, see `training.update`."""
        ...

    def check(self, plan: Plan) -> None:
        """Raises ValueError for a plan whose walks it cannot learn from."""
        ...

    def costs(self, plan: Plan, num_prompts: int) -> Costs:
        """What its measurements cost on walks along a plan, all optimiser steps of a training step together."""
        ...

    def points(self, batch: Batch) -> Points:
        """Where the network is asked, for the samples of one optimiser step."""
        ...

    def measure(self, point: Any, evaluator: Evaluator) -> Stats:
        """Statistics of the edges of a point."""
        ...

    def loss(self, stats: Stats, advantages: Tensor) -> Terms:
        """The loss of each edge, elementwise; of each sample from `[B, N]` tables where it couples."""
        ...

    @property
    def ratio_range(self) -> float:
        """How far off 1 a first ratio may be before a run is refused; see `training.self_test`."""
        ...

    def log_ratio(self, stats: Stats) -> Tensor | None:
        """`[E]` of stored transitions: 0 before any update, exactly. None where there is no ratio."""
        ...
