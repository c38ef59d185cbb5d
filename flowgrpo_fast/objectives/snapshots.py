"""Other weights of the trained model, by rule: the start, averages, the policy that samples, teachers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from flowgrpo_fast.checks import positive, require


class Moment(NamedTuple):
    """When a rule is asked."""

    step: int  # finished training steps, this one included
    num_updates: int  # finished optimiser steps
    ends_step: bool  # at the end of a training step; else after an optimiser step
    metrics: Mapping[str, float]  # of the step, at its end


class SnapshotRule(Protocol):
    """How a snapshot follows the trained weights."""

    @property
    def path(self) -> str:
        """An adapter or a checkpoint to read the weights from at the start; empty = the model's own at the start."""
        ...

    @property
    def moves(self) -> bool:
        """Whether it ever does: a checkpoint then holds it."""
        ...

    def keep(self, moment: Moment) -> float | None:
        """How much of the snapshot stays, `new = keep * old + (1 - keep) * trained`; None = nothing happens now."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """The weights at the start of the run."""

    path = ""  # the model's own
    moves = False  # it stays what it was

    def keep(self, moment: Moment) -> float | None:
        """Never moves."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class EMA:
    """A moving average over optimiser steps.

    With `warm_up` as in Flow-GRPO's code and those built on it: after update n, where `every` divides n + 1, the
    average keeps `min((1 + n) / (10 + n), decay)`, so that the start weights are soon forgotten. `calls` is how often
    that code averages there: once a micro-batch, so it is the micro-batches of an optimiser step on one of its devices.
    """

    decay: float = 0.9
    every: int = 1  # optimiser steps between two averages
    warm_up: bool = False
    calls: int = 1  # with the same weights, one after another: the average keeps that power
    path = ""  # the model's own
    moves = True  # it follows

    def __post_init__(self) -> None:
        """A decay below 1."""
        require(0 <= self.decay < 1, f"EMA.decay is {self.decay}; it must be in [0, 1)")
        positive(self, every=self.every, calls=self.calls)

    def keep(self, moment: Moment) -> float | None:
        """After every `every`-th optimiser step; with warm-up one step earlier, as published."""
        n = moment.num_updates
        if moment.ends_step or (n + self.warm_up) % self.every:
            return None
        kept = min((1 + n) / (10 + n), self.decay) if self.warm_up else self.decay
        return kept if self.calls == 1 else kept**self.calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Ramp:
    """Follows after every training step n (from 1), more slowly as time goes on: `min(most, rate * max(0, n - start))`.

    DiffusionNFT's old policy; `most = 0` is the policy before the update.
    """

    start: int = 0
    rate: float = 0.001
    most: float = 0.5
    path = ""  # the model's own
    moves = True  # it follows

    def __post_init__(self) -> None:
        """Not negative; a decay below 1."""
        require(self.start >= 0, f"Ramp.start is {self.start}; it must be at least 0")
        require(self.rate >= 0, f"Ramp.rate is {self.rate}; it must be at least 0")
        require(0 <= self.most < 1, f"Ramp.most is {self.most}; it must be in [0, 1)")

    def keep(self, moment: Moment) -> float | None:
        """At the end of a training step."""
        return min(self.most, self.rate * max(0, moment.step - self.start)) if moment.ends_step else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetWhen:
    """Becomes the trained policy whenever a metric of the step is above a bound, or after so many steps (GARDO)."""

    metric: str = "kl"
    above: float = 3e-4
    every: int = 0  # training steps; 0 = only by the metric
    path = ""  # the model's own
    moves = True  # it follows

    def __post_init__(self) -> None:
        """A metric to look at, a count that is not negative."""
        require(bool(self.metric), "ResetWhen.metric is empty; name a metric of the update, such as 'kl'")
        require(self.every >= 0, f"ResetWhen.every is {self.every}; it must be at least 0")

    def keep(self, moment: Moment) -> float | None:
        """At the end of a training step."""
        if not moment.ends_step:
            return None
        due = self.every > 0 and moment.step % self.every == 0
        return 0.0 if due or moment.metrics.get(self.metric, 0.0) > self.above else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Other weights of the same kind, from a file or a checkpoint folder: a teacher."""

    path: str = ""
    moves = False  # it stays what it was

    def __post_init__(self) -> None:
        """There is something to load."""
        require(
            bool(self.path),
            "Loaded.path is empty; name a checkpoint folder, an adapter or a safetensors file",
        )

    def keep(self, moment: Moment) -> float | None:
        """Never moves."""
        return None
