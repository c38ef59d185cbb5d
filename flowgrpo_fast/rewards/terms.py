"""TEMPORARY."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from flowgrpo_fast.names import resolve


class Reward(Protocol):
    label: str
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTerm:
    """One."""

    function: str
    weight: float = 1.0
    where: Literal["here", "thread", "process"] = "here"
    differentiable: bool = False

    @property
    def label(self) -> str:
        return self.function.rpartition(":")[2]

    def resolve(self) -> Any:
        return resolve(self.function)
