"""A reward part of one's own: what the protocol asks for, and a function at hand instead of a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from flowgrpo_fast.rewards.terms import Returned, Seen


@dataclass(frozen=True)
class OwnReward:
    function: Callable[..., Any]
    objective: str = "own"
    label: str = "own"
    weight: float = 1.0
    where: Literal["here", "thread", "process"] = "here"
    group_wise: bool = False
    differentiable: bool = False
    whole: bool = False  # the function takes the whole record

    def resolve(self) -> Callable[..., Any]:
        return self.function

    def score(self, seen: Seen) -> Returned:
        return self.function(seen) if self.whole else self.function(seen.images, seen.prompts)

    def with_gradient(self, seen: Seen) -> Tensor:
        return self.score(seen)
