"""The fold of credit steps: each takes what is credited so far and gives it on, shaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from flowgrpo_fast.objectives.objective import Requires
from flowgrpo_fast.types import Credit, Scored


class CreditStep(Protocol):
    """One step of a recipe's `credit`."""

    @property
    def requires(self) -> Requires:
        """What it needs, such as signals of the rewards."""
        ...

    def __call__(self, credit: Credit, scored: Scored) -> Credit:
        """The credit after this step. Waits for no device."""
        ...


def assign(chain: Sequence[CreditStep], scored: Scored) -> Credit:
    """Advantages and weights of B samples: the rewards' weighted totals, taken through every step of the chain."""
    total = scored.scores.total
    valid = scored.scores.valid  # None: every sample has its score
    weight = torch.ones_like(total) if valid is None else valid.to(total.dtype)
    credit = Credit(advantages=total, weight=weight)
    for step in chain:
        credit = step(credit, scored)
    return credit
