"""What a reward sees, what it may return, and the part of a recipe that names one."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrpo_fast.checks import finite, one_of, require
from flowgrpo_fast.names import resolve
from flowgrpo_fast.rewards.calls import RewardFailed, limited
from flowgrpo_fast.types import Scores


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """B samples as a reward sees them. It may change whatever lies in here: every reward gets its own."""

    images: Tensor  # [B, C, H, W], or videos [B, F, C, H, W], fp32 in [0, 1]
    prompts: list[str]
    metadata: list[dict[str, Any]]  # what the prompt file says of each prompt besides
    source_images: list[Path] | None  # of editing models
    group: Tensor  # [B] int64: samples of one prompt have one number, below `num_groups`
    latents: Tensor | None  # [B, *S] the finished samples before they were decoded
    num_groups: int

    def __len__(self) -> int:
        return len(self.prompts)


# Scores as functions return them: [B] numbers in any container; named ones, of which "avg" is the total; or all.
Returned: TypeAlias = Tensor | NDArray[Any] | Sequence[Any] | Mapping[str, Any] | Scores


class Reward(Protocol):
    """One reward of a recipe: `RewardTerm`, or any frozen dataclass that has these (a process must import it)."""

    @property
    def objective(self) -> str:
        """What its objective and metrics are called; no two of a recipe are called alike."""
        ...

    @property
    def label(self) -> str:
        """What messages call it. One call runs at a time in threads of rewards with equal labels."""
        ...

    @property
    def weight(self) -> float:
        """Of its total in the sum of all rewards."""
        ...

    @property
    def where(self) -> Literal["here", "thread", "process"]:
        """Where it runs, see `RewardTerm`."""
        ...

    @property
    def group_wise(self) -> bool:
        """Whether it compares the samples of a prompt, and so must see whole groups."""
        ...

    @property
    def differentiable(self) -> bool:
        """Whether `with_gradient` may be called."""
        ...

    def resolve(self) -> object:
        """Finds what it calls, before anything is sampled. Raises ValueError where that is not there."""
        ...

    def score(self, seen: Seen) -> Returned:
        """Scores of B samples."""
        ...

    def with_gradient(self, seen: Seen) -> Tensor:
        """Scores `[B]` fp32 with their gradient to `seen.images`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTerm:
    """One reward: a function `package.module:function` and its weight.

    `takes` says how the function is called:

    - "prompts": `(images, prompts) -> [B]`;
    - "metadata": flow_grpo's signature `(images, prompts, metadata) -> (scores, info)`; an entry of `metadata` is the
      prompt file's whole line, its prompt included;
    - "record": `(seen) -> [B] or Scores`, where `seen` also tells groups, source images and latents.

    In each of them `(scores, info)` may come back as well, of which `info` is not read.

    `where` it runs: "here", after the rollout; "thread" or "process", while the next prompts are rolled out (see
    `Machine.prompts_per_chunk`). A thread suits what waits, say for a remote server, or runs on the device; a process
    what computes on the host. Its function is imported there and gets images on the host.
    """

    function: str
    weight: float = 1.0
    where: Literal["here", "thread", "process"] = "here"
    takes: Literal["prompts", "metadata", "record"] = "prompts"
    group_wise: bool = False  # it compares the samples of a prompt: each call holds all of them
    differentiable: bool = False  # it may be asked for its gradient to the images
    name: str = ""  # of its objective and metrics; empty = the function's
    # Seconds that one call may take, wherever it runs; 0 = no limit, and a call "here" is in the main thread
    timeout: float = 600.0

    def __post_init__(self) -> None:
        """A known place and signature, and a gradient only where there can be one."""
        one_of(self, ("here", "thread", "process"), where=self.where)
        one_of(self, ("prompts", "metadata", "record"), takes=self.takes)
        finite(self, weight=self.weight)
        require(
            0.0 <= self.timeout <= threading.TIMEOUT_MAX,
            f"RewardTerm.timeout is {self.timeout}; it must be seconds, or 0 for no limit",
        )
        require(
            "/" not in self.name,
            f"RewardTerm.name is {self.name!r}; a slash sets apart what a reward names itself, so use none",
        )
        require(
            not self.differentiable or self.where == "here",
            f"RewardTerm.differentiable is true and where is {self.where!r}, which no gradient comes back from; "
            "use 'here'",
        )

    @property
    def objective(self) -> str:
        """What its objective and metrics are called."""
        return self.name or self.function.rpartition(":")[2]

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.function

    def resolve(self) -> Callable[..., Returned]:
        """The function. Raises ValueError where there is none of that name."""
        found: Callable[..., Returned] = resolve(self.function)
        if not callable(found):
            raise ValueError(f"reward {self.function!r} is a {type(found).__name__}, which cannot be called")
        return found

    def score(self, seen: Seen) -> Returned:
        """What the function returns for B samples.

        Raises:
            RewardTimedOut: after `timeout` seconds.
        """

        def call() -> Returned:
            function = self.resolve()  # in a process, an import that may hang as well
            if self.takes == "record":
                return function(seen)
            if self.takes == "prompts":
                return function(seen.images, seen.prompts)
            lines = [{"prompt": p, **entry} for p, entry in zip(seen.prompts, seen.metadata, strict=True)]
            return function(seen.images, seen.prompts, lines)

        return limited(call, self.timeout, self.label)

    def with_gradient(self, seen: Seen) -> Tensor:
        """Scores `[B]` fp32 with their gradient to `seen.images`.

        Raises:
            ValueError: the recipe does not say that there is one, or the scores carry none.
        """
        require(
            self.differentiable,
            f"reward {self.function!r} is asked for its gradient; set RewardTerm.differentiable, if it has one",
        )
        total = scored(self, seen).total
        require(
            total.requires_grad,
            f"reward {self.function!r} is differentiable by its RewardTerm, but its scores carry no gradient; "
            "compute them in torch, without no_grad, detach and numpy",
        )
        return total


def scored(term: Reward, seen: Seen) -> Scores:
    """One reward's scores, in fp32, of the right shapes.

    Raises:
        RewardFailed: the reward raised anything, an exit included.
        ValueError: as `as_scores`.
    """
    num_samples = len(seen)  # before the reward, which may change even the list of prompts
    try:
        returned = term.score(seen)
    except (KeyboardInterrupt, RewardFailed):
        raise
    except BaseException as error:  # SystemExit of a library must not end a run as if all were well
        raise RewardFailed.by(term.label, error) from error
    return as_scores(returned, num_samples, term.label)


def as_scores(returned: object, num_samples: int, label: str) -> Scores:
    """What a reward returned, as a record of fp32 tensors that share no memory with it.

    Of `(scores, info)`, where `info` is a mapping, a list of them or None, the scores count. Of named scores "avg" is
    the total (flow_grpo's sum of several), a single one is as well; the others are signals.

    Raises:
        ValueError: no numbers, another shape than `[num_samples]`, or no total.
    """
    if isinstance(returned, tuple) and len(returned) == 2 and _is_info(returned[1]):
        return as_scores(returned[0], num_samples, label)
    if isinstance(returned, Scores):
        given = returned.valid
        valid = None if given is None else _each(given, num_samples, f"{label}: valid").to(torch.bool)
        return Scores(
            total=_each(returned.total, num_samples, label),
            objectives={k: _each(v, num_samples, f"{label}: {k}") for k, v in returned.objectives.items()},
            signals={k: _numbers(v, num_samples, f"{label}: {k}") for k, v in returned.signals.items()},
            valid=valid,
        )
    if isinstance(returned, Mapping):
        total = "avg" if "avg" in returned else next(iter(returned), "")
        if not returned or (total != "avg" and len(returned) > 1):
            raise ValueError(
                f"reward {label!r} returned scores named {', '.join(map(repr, returned)) or 'nothing'}; "
                "one of several must be 'avg', the total"
            )
        return Scores(
            total=_each(returned[total], num_samples, label),
            signals={k: _numbers(v, num_samples, f"{label}: {k}") for k, v in returned.items() if k != total},
        )
    return Scores(total=_each(returned, num_samples, label))


def _is_info(value: object) -> bool:
    """What stands beside scores. The second of two samples' scores is a number, or a list of numbers."""
    maps = isinstance(value, list) and bool(value) and all(isinstance(entry, Mapping) for entry in value)
    return value is None or maps or isinstance(value, Mapping)


def _each(values: object, num_samples: int, label: str) -> Tensor:
    """One number a sample, `[B]` fp32; networks with one output return `[B, 1]`."""
    numbers = _numbers(values, num_samples, label)
    if numbers.shape == (num_samples, 1):
        numbers = numbers[:, 0]
    if numbers.ndim != 1:
        raise ValueError(_shape_error(label, numbers.shape, num_samples))
    return numbers


def _numbers(values: object, num_samples: int, label: str) -> Tensor:
    """Numbers `[B, ...]` fp32 out of a tensor, an array, or a sequence of numbers, arrays or tensors."""
    tensor = _as_tensor(values)
    if tensor is None or tensor.is_complex() or tensor.is_quantized or tensor.is_meta:
        of = " of complex numbers" if tensor is not None and tensor.is_complex() else ""
        raise ValueError(
            f"reward {label!r} returned a {type(values).__name__}{of} for {num_samples} images; "
            f"it must return {num_samples} numbers, as a tensor, an array or a list"
        )
    if tensor.shape[:1] != (num_samples,):
        raise ValueError(_shape_error(label, tensor.shape, num_samples))
    # A copy: a reward may return the memory that it writes its next scores to.
    return tensor.to(torch.float32, copy=True)


def _as_tensor(values: object) -> Tensor | None:
    """The numbers in any container, with their gradient where they have one; None where there are none."""
    if isinstance(values, Tensor):
        return values.to_dense() if values.layout is not torch.strided else values
    if isinstance(values, list | tuple) and any(isinstance(v, Tensor) for v in values):
        device = next(v.device for v in values if isinstance(v, Tensor))
        each = [_as_tensor(v) if isinstance(v, Tensor) else _as_tensor(np.asarray(v)) for v in values]
        found = [v for v in each if v is not None]
        same = len(found) == len(values) and len({v.shape for v in found}) == 1
        if not same or any(v.is_quantized for v in found):
            return None
        # Tensors of one kind stay what they are; numbers among them are fp64, which is rounded to fp32 but once.
        kind = functools.reduce(torch.promote_types, (v.dtype for v in found))
        return torch.stack([v.to(device, kind) for v in found])
    if not isinstance(values, np.ndarray | list | tuple):
        return None
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError):  # of lists of several lengths, say
        return None
    if array.dtype.kind not in "biufc":
        return None
    return torch.from_numpy(np.array(array, dtype=np.complex64 if array.dtype.kind == "c" else np.float32))


def _shape_error(label: str, shape: torch.Size, num_samples: int) -> str:
    return (
        f"reward {label!r} returned shape {tuple(shape)} for {num_samples} images; "
        f"it must return {(num_samples,)}"
    )
