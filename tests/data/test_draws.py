from __future__ import annotations

import numpy as np
import torch

from flowgrpo_fast.data.draws import draw as draw_seeds
from flowgrpo_fast.data.draws import draw_eval
from flowgrpo_fast.data.prompts import Prompts
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.types import Choices, Draws

CPU = torch.device("cpu")


def draw(recipe: Recipe, set_size: int, step: int, device: torch.device) -> Draws:
    chosen = recipe.data.draw(step, recipe.seed, recipe.num_prompts, set_size)
    return draw_seeds(
        chosen,
        step=step,
        seed=recipe.seed,
        num_drawn=recipe.num_drawn,
        share_start=recipe.topology.shares_start,
        device=device,
    )


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
        return torch.from_numpy(Choices(0, step, slice(0, 400), 400).taken(5, num_trained))

    all_steps = positions(5, 0)
    assert torch.equal(all_steps, torch.arange(5).expand(400, 5))
    some = positions(3, 0)
    assert some.shape == (400, 3)
    assert all(len(set(row)) == 3 for row in some.tolist())
    counts = torch.bincount(some.flatten(), minlength=5)
    assert (counts > 180).all()  # 240 each on average
    assert not torch.equal(some, positions(3, 1))
    # A share of the samples draws what it draws among all.
    share = Choices(0, 0, slice(0, 400), 400).of_samples(slice(100, 200))
    assert torch.equal(torch.from_numpy(share.taken(5, 3)), some[100:200])


def test_a_source_of_ones_own_may_choose_other_prompts() -> None:
    """The prompts are given; noise depends on the step and the run's seed alone."""
    chosen = np.array([7, 7, 2])
    arguments = {"step": 5, "seed": 3, "num_drawn": 4, "device": CPU}
    apart = draw_seeds(chosen, share_start=False, **arguments)
    assert apart.prompt_index.tolist() == [7, 7, 2]
    assert apart.group_id.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(apart.seed, apart.start_seed)
    words = np.random.SeedSequence([3, 2, 5]).generate_state(12, np.uint64).view(np.int64)
    assert apart.seed.tolist() == words.tolist()
    shared = draw_seeds(chosen, share_start=True, **arguments)
    assert torch.equal(shared.seed, apart.seed)
    assert shared.start_seed.tolist() == [int(words[4 * (i // 4)]) for i in range(12)]


def test_prompts_are_drawn_as_the_epochs_written_out() -> None:
    everything = np.concatenate([np.random.default_rng([9, 1, epoch]).permutation(5) for epoch in range(8)])
    drawn = np.concatenate([Prompts().draw(step, 9, 8, 5) for step in range(5)])
    assert drawn.dtype == np.int64
    assert drawn.tolist() == everything.tolist()
