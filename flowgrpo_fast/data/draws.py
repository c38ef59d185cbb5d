"""What each training step starts from: pure functions of (seed, step), so that a resume changes nothing."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrpo_fast.types import Draws

_PROMPTS, _TRAIN, _EVAL = 1, 2, 3  # separate streams of the run's seed; `types.Choices` has the fourth


def draw_prompts(*, step: int, seed: int, num_prompts: int, set_size: int) -> NDArray[np.int64]:
    """Which prompts of the set a step takes, `[num_prompts]`, in epochs: each a fresh permutation of the set."""
    positions = np.arange(step * num_prompts, (step + 1) * num_prompts)
    prompt_index = np.empty(num_prompts, dtype=np.int64)
    for epoch in np.unique(positions // set_size):
        order = np.random.default_rng([seed, _PROMPTS, int(epoch)]).permutation(set_size)
        here = positions // set_size == epoch
        prompt_index[here] = order[positions[here] % set_size]
    return prompt_index


def draw(
    prompt_index: NDArray[np.int64],
    *,
    step: int,
    seed: int,
    num_drawn: int,
    share_start: bool,
    device: torch.device,
) -> Draws:
    """Noise seeds of one training step, those of scouts and of pruned candidates included.

    Args:
        prompt_index: `[P]`, the prompts that the step takes of the set, as `Prompts.draw` gives them.
        step: finished training steps.
        seed: the run's.
        num_drawn: seeds a prompt.
        share_start: one start noise for each group.
        device: where the draws go.
    """
    num_prompts = len(prompt_index)
    seeds = _seeds([seed, _TRAIN, step], num_prompts * num_drawn)
    group_id = torch.arange(num_prompts).repeat_interleave(num_drawn)
    # A shared start is the first member's: one seed for the group.
    start = seeds.view(num_prompts, -1)[:, 0][group_id] if share_start else seeds
    return Draws(
        prompt_index=torch.from_numpy(prompt_index).to(device),
        group_id=group_id.to(device),
        seed=seeds.to(device),
        start_seed=start.to(device),
    )


def draw_eval(num_prompts: int, num_samples: int, device: torch.device, seed: int | None = None) -> Draws:
    """The evaluation's draws: the same noise at every step of every run, prompts in turn. A seed gives other noise."""
    seeds = _seeds([_EVAL] if seed is None else [_EVAL, seed], num_samples).to(device)
    prompt_index = (torch.arange(num_samples) % num_prompts).to(device)
    return Draws(
        prompt_index=prompt_index,
        group_id=torch.arange(num_samples, device=device),
        seed=seeds,
        start_seed=seeds,
    )


def _seeds(entropy: list[int], count: int) -> Tensor:
    state = np.random.SeedSequence(entropy).generate_state(count, np.uint64)
    return torch.from_numpy(state.view(np.int64))
