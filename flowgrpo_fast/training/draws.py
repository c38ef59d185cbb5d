"""What each training step starts from: pure functions of (seed, step), so that a resume changes nothing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.types import Draws

_PROMPTS, _TRAIN, _EVAL, _STEPS = 1, 2, 3, 4  # separate streams of the run's seed


def draw(recipe: Recipe, num_prompts: int, step: int, device: torch.device) -> Draws:
    """Prompts and noise seeds of one training step, those of scouts and of pruned candidates included.

    Prompts come in epochs, each a fresh permutation of the set.
    """
    positions = np.arange(step * recipe.num_prompts, (step + 1) * recipe.num_prompts)
    prompt_index = np.empty(recipe.num_prompts, dtype=np.int64)
    for epoch in np.unique(positions // num_prompts):
        order = np.random.default_rng([recipe.seed, _PROMPTS, int(epoch)]).permutation(num_prompts)
        here = positions // num_prompts == epoch
        prompt_index[here] = order[positions[here] % num_prompts]
    seeds = _seeds([recipe.seed, _TRAIN, step], recipe.num_prompts * recipe.num_drawn)
    group_id = torch.arange(recipe.num_prompts).repeat_interleave(recipe.num_drawn)
    # A shared start is the first member's: one seed for the group.
    start = seeds.view(recipe.num_prompts, -1)[:, 0][group_id] if recipe.share_start_noise else seeds
    return Draws(
        prompt_index=torch.from_numpy(prompt_index).to(device),
        group_id=group_id.to(device),
        seed=seeds.to(device),
        start_seed=start.to(device),
        shares_start=recipe.share_start_noise,
    )


def draw_eval(num_prompts: int, num_samples: int, device: torch.device) -> Draws:
    """The evaluation's draws: the same noise at every step of every run, prompts in turn."""
    seeds = _seeds([_EVAL], num_samples).to(device)
    prompt_index = (torch.arange(num_samples) % num_prompts).to(device)
    return Draws(
        prompt_index=prompt_index,
        group_id=torch.arange(num_samples, device=device),
        seed=seeds,
        start_seed=seeds,
    )


def draw_step_positions(recipe: Recipe, num_kept: int, num_trained: int, step: int) -> Tensor:
    """Which kept steps each sample trains on, in which order, `[B, num_trained]` int64 on the host.

    All of them in time order, or a permutation's head for each sample (DanceGRPO; NFT: of the sigmas).
    """
    num_rows = recipe.num_prompts * recipe.group_size
    if num_trained == num_kept:
        return torch.arange(num_kept).expand(num_rows, -1)
    generator = np.random.default_rng([recipe.seed, _STEPS, step])
    order = generator.permuted(np.tile(np.arange(num_kept), (num_rows, 1)), axis=1)
    return torch.from_numpy(order[:, :num_trained].copy())


def _seeds(entropy: list[int], count: int) -> Tensor:
    state = np.random.SeedSequence(entropy).generate_state(count, np.uint64)
    return torch.from_numpy(state.view(np.int64))
