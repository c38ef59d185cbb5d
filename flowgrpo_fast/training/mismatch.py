"""How far the replay's log-probs lie from the rollout's, step by step, before any weight has changed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Mismatch:
    """Gathers |log_prob - old_log_prob| of first replays; all of it stays on the device until `values`."""

    positions: list[Tensor] = field(default_factory=list)  # [R] int64, of the K kept steps
    deltas: list[Tensor] = field(default_factory=list)  # [R] fp32

    def add(self, position: Tensor, log_ratio: Tensor) -> None:
        """One micro-batch."""
        self.positions.append(position)
        self.deltas.append(log_ratio.abs())

    def values(self, step_index: Tensor) -> dict[str, Tensor]:
        """Maximum and mean by step of the schedule, `step_index [K]` on the host; 0 where nothing was replayed."""
        if not self.deltas:
            return {}
        position, delta = torch.cat(self.positions), torch.cat(self.deltas)
        zeros = delta.new_zeros(len(step_index))
        largest = zeros.scatter_reduce(0, position, delta, "amax")
        count = zeros.index_add(0, position, torch.ones_like(delta))
        mean = zeros.index_add(0, position, delta) / count.clamp(min=1)
        steps = step_index.tolist()
        named = {f"delta_log_prob_max/step_{step}": largest[i] for i, step in enumerate(steps)}
        named |= {f"delta_log_prob_mean/step_{step}": mean[i] for i, step in enumerate(steps)}
        return {"delta_log_prob_max": delta.max(), "delta_log_prob_mean": delta.mean(), **named}
