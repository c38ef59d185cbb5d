"""Credit that differs from step to step of a sample's walk: advantages `[B, K]`, a column a kept step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flowgrpo_fast.objectives.objective import Requires
from flowgrpo_fast.types import Credit, Scored


@dataclass(frozen=True, slots=True, kw_only=True)
class AtLastStep:
    """The whole advantage at the last kept step, none at the others: a sparse reward beside a dense signal."""

    # Where each sample trains on some of its steps, the last may not be among them.
    requires = Requires(log_probs=True, all_steps=True)

    def __call__(self, credit: Credit, scored: Scored) -> Credit:
        """As of `CreditStep`; advantages `[B]` become `[B, K]`."""
        num_kept = len(scored.samples.transitions)
        advantages = credit.advantages.new_zeros(len(credit.advantages), num_kept)
        advantages[:, -1] = credit.advantages
        return replace(credit, advantages=advantages)
