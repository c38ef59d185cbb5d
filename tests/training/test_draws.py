from __future__ import annotations

import torch
from flowgrpo_fast.training.sample import draw

from flowgrpo_fast.data.draws import draw_eval, draw_step_positions

CPU = torch.device("cpu")


def test_every_epoch_shows_every_prompt_once(toy_recipe) -> None:
    recipe = toy_recipe(num_prompts=4)
    seen = torch.cat([draw(recipe, 10, step, CPU).prompt_index for step in range(5)])
    for epoch in seen.view(2, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_seeds_never_repeat_and_depend_on_step_and_seed(toy_recipe) -> None:
    seeds = [draw(toy_recipe(seed=s), 2, step, CPU).seed for s in range(3) for step in range(20)]
    assert torch.cat(seeds).unique().numel() == 3 * 20 * 32
    assert torch.equal(seeds[0], draw(toy_recipe(), 2, 0, CPU).seed)
    evaluation = draw_eval(2, 64, CPU)
    assert not torch.isin(evaluation.seed, torch.cat(seeds)).any()


def test_step_positions_are_permutations() -> None:
    def positions(num_trained: int, step: int) -> torch.Tensor:
        return draw_step_positions(step=step, seed=0, num_rows=400, num_kept=5, num_trained=num_trained)

    all_steps = positions(5, 0)
    assert torch.equal(all_steps, torch.arange(5).expand(400, 5))
    some = positions(3, 0)
    assert some.shape == (400, 3)
    assert all(len(set(row)) == 3 for row in some.tolist())
    counts = torch.bincount(some.flatten(), minlength=5)
    assert (counts > 180).all()  # 240 each on average
    assert not torch.equal(some, positions(3, 1))
