"""What a reward sees, what it may return, and the part of a recipe that names one."""

from __future__ import annotations

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
      prompt file's whole line, its prompt included, and `info` is not read;
    - "record": `(seen) -> [B] or Scores`, where `seen` also tells groups, source images and latents.

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

    def __post_init__(self) -> None:
        """A known place and signature, and a gradient only where there can be one."""
        one_of(self, ("here", "thread", "process"), where=self.where)
        one_of(self, ("prompts", "metadata", "record"), takes=self.takes)
        finite(self, weight=self.weight)
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
        """What the function returns for B samples, flow_grpo's `info` left out."""
        function = self.resolve()
        if self.takes == "record":
            return function(seen)
        if self.takes == "prompts":
            return function(seen.images, seen.prompts)
        lines = [{"prompt": p, **entry} for p, entry in zip(seen.prompts, seen.metadata, strict=True)]
        answer: Any = function(seen.images, seen.prompts, lines)
        # Two samples' scores are a tuple of two as well, but the second of them is no mapping.
        pair = isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping)
        return answer[0] if pair else answer

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
    """One reward's scores, in fp32, of the right shapes. Raises ValueError as `as_scores`, or as the reward does."""
    num_samples = len(seen)  # before the reward, which may change even the list of prompts
    return as_scores(term.score(seen), num_samples, term.label)


def as_scores(returned: object, num_samples: int, label: str) -> Scores:
    """What a reward returned, as a record of fp32 tensors that share no memory with it.

    Of named scores "avg" is the total (flow_grpo's sum of several), a single one is as well; the others are signals.

    Raises:
        ValueError: no numbers, another shape than `[num_samples]`, or no total.
    """
    if isinstance(returned, Scores):
        valid = None if returned.valid is None else returned.valid.to(torch.bool)
        if valid is not None and valid.shape != (num_samples,):
            raise ValueError(_shape_error(f"{label}: valid", valid.shape, num_samples))
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


def _each(values: object, num_samples: int, label: str) -> Tensor:
    """One number a sample, `[B]` fp32."""
    numbers = _numbers(values, num_samples, label)
    if numbers.ndim != 1:
        raise ValueError(_shape_error(label, numbers.shape, num_samples))
    return numbers


def _numbers(values: object, num_samples: int, label: str) -> Tensor:
    """Numbers `[B, ...]` fp32 out of a tensor, an array, or a sequence of numbers, arrays or tensors."""
    if isinstance(values, list | tuple) and values and all(isinstance(v, Tensor) for v in values):
        values = torch.stack(list(values)) if len({v.shape for v in values}) == 1 else None
    if isinstance(values, np.ndarray | list | tuple):
        try:
            array = np.asarray(values)
        except ValueError:  # of lists of several lengths
            array = np.empty(0, dtype=object)
        numeric = array.dtype.kind in "biuf"
        values = torch.from_numpy(np.array(array, dtype=np.float32)) if numeric else values
    if not isinstance(values, Tensor):
        raise ValueError(
            f"reward {label!r} returned a {type(values).__name__} for {num_samples} images; "
            f"it must return {num_samples} numbers, as a tensor, an array or a list"
        )
    if values.shape[:1] != (num_samples,):
        raise ValueError(_shape_error(label, values.shape, num_samples))
    # A copy: a reward may return the memory that it writes its next scores to.
    return values.to(torch.float32, copy=True)


def _shape_error(label: str, shape: torch.Size, num_samples: int) -> str:
    return (
        f"reward {label!r} returned shape {tuple(shape)} for {num_samples} images; "
        f"it must return {(num_samples,)}"
    )
