from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from flowgrpo_fast.schedule.topology import ode_plan
from flowgrpo_fast.types import Draws, Scored, Scores, Trajectory, Transitions


@pytest.fixture
def scored() -> Callable[..., Scored]:
    """Finished samples of given rewards: a `total` `[B]`, or objectives with their weights, in given groups."""

    def make(
        total: Tensor,
        group_id: Tensor,
        objectives: Mapping[str, Tensor] | None = None,
        weights: Mapping[str, float] | None = None,
        valid: Tensor | None = None,
        transitions: tuple[Transitions, ...] = (),
        num_groups: int | None = None,
    ) -> Scored:
        num_groups = int(group_id.max()) + 1 if num_groups is None else num_groups
        seeds = torch.arange(len(group_id))
        draws = Draws(prompt_index=torch.arange(num_groups), group_id=group_id, seed=seeds, start_seed=seeds)
        plan = ode_plan(np.linspace(1, 0, 3))
        samples = Trajectory(
            plan=plan,
            draws=draws,
            x0=torch.zeros(len(group_id), 1),
            transitions=transitions,
            coeffs=plan.coeffs,
        )
        scores = Scores(total=total, objectives=dict(objectives or {}), valid=valid)
        return Scored(samples, scores, dict(weights or {}))

    return make
