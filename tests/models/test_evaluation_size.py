"""A look of another size than training's: the same weights, laid out anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowgrpo_fast.recipe import Evaluation
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.evaluate import evaluate
from tests.models.families import FLUX, SD3, WAN

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", [SD3, FLUX, WAN], ids=str)
def test_it_is_the_look_of_a_run_that_trains_in_that_size(family, tiny_recipe) -> None:
    recipe = tiny_recipe(family)
    task = replace(recipe.task, num_eval_samples=2, evaluation=Evaluation(height=16, guidance_scale=1.0))
    own = replace(recipe, task=task, optimizer=replace(recipe.optimizer, ema_decay=0.9))
    trained = replace(
        recipe,
        network=replace(recipe.network, height=16),
        task=replace(recipe.task, num_eval_samples=2),
        guidance_scale=1.0,
    )
    ours = build_engine(own, CPU)
    size = ours.model.latent_shape
    look, theirs = evaluate(ours), evaluate(build_engine(trained, CPU))
    assert look.images.shape[-2:] == (16, 32)
    assert torch.equal(look.images, theirs.images)
    assert ours.model.latent_shape == size != ours.exam.model.latent_shape


def test_a_size_that_does_not_divide_is_refused(tiny_recipe) -> None:
    recipe = tiny_recipe(SD3)
    task = replace(recipe.task, evaluation=Evaluation(width=17))
    with pytest.raises(ValueError, match=r"Network.width is 17; sd3 needs a multiple of \d+, such as"):
        build_engine(replace(recipe, task=task), CPU)
