from __future__ import annotations

import numpy as np
import torch

from flowgrpo_fast.data.draws import draw_eval
from flowgrpo_fast.types import Choices
from tests.training.steps import CPU, drawn


def test_every_epoch_shows_every_prompt_once(toy_recipe) -> None:
    recipe = toy_recipe(num_prompts=4)
    seen = torch.cat([drawn(recipe, step, 10).prompt_index for step in range(5)])
    for epoch in seen.view(2, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_seeds_never_repeat_and_depend_on_step_and_seed(toy_recipe) -> None:
    seeds = [drawn(toy_recipe(seed=s), step).seed for s in range(3) for step in range(20)]
    assert torch.cat(seeds).unique().numel() == 3 * 20 * 32
    assert torch.equal(seeds[0], drawn(toy_recipe()).seed)
    evaluation = draw_eval(2, 64, CPU)
    assert not torch.isin(evaluation.seed, torch.cat(seeds)).any()


def choices(step: int, rows: slice = slice(0, 400)) -> Choices:
    return Choices(seed=0, step=step, rows=rows, num_samples=400)


def test_step_positions_are_permutations() -> None:
    all_steps = choices(0).taken(5, 5)
    assert np.array_equal(all_steps, np.tile(np.arange(5), (400, 1)))
    some = choices(0).taken(5, 3)
    assert some.shape == (400, 3)
    assert all(len(set(row)) == 3 for row in some.tolist())
    counts = np.bincount(some.ravel(), minlength=5)
    assert (counts > 180).all()  # 240 each on average
    assert not np.array_equal(some, choices(1).taken(5, 3))


def test_choices_are_the_same_however_they_are_shared_out() -> None:
    whole = choices(2)
    part = whole.of_samples(slice(100, 200)).of_samples(slice(50, 60))
    assert np.array_equal(part.taken(5, 3), whole.taken(5, 3)[150:160])
    assert np.array_equal(part.uniform(2), whole.uniform(2)[150:160])
    assert whole.uniform(2).min() >= 0
    assert whole.uniform(2).max() < 1
