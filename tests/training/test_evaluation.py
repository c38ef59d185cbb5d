"""`task.evaluation`: a look with settings of its own is the look of a run that trains with these."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowgrpo_fast.recipe import EMA, Evaluation, Optimizer, Prompts, RewardTerm
from flowgrpo_fast.recipe_io import load_recipe, override, save_recipe
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.evaluate import evaluate, sampled
from flowgrpo_fast.types import PromptSet

CPU = torch.device("cpu")


def with_evaluation(recipe, **fields):
    return replace(recipe, task=replace(recipe.task, evaluation=Evaluation(**fields)))


def test_prompts_steps_guidance_and_rewards_of_its_own(toy_recipe, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("high\nlow\nhigh\n")
    recipe = toy_recipe()
    rewards = (RewardTerm(function="toy_job:brightness", weight=0.5), RewardTerm(function="toy_job:constant"))
    own = with_evaluation(
        recipe, prompts=str(file), num_inference_steps=9, guidance_scale=2.5, rewards=rewards
    )
    trained = replace(
        recipe,
        data=Prompts(path=str(file)),
        sigmas=replace(recipe.sigmas, num_inference_steps=9),
        guidance_scale=2.5,
        task=replace(recipe.task, rewards=rewards),
    )
    ours, theirs, plain = (evaluate(build_engine(one, CPU)) for one in (own, trained, recipe))
    assert ours.metrics == theirs.metrics
    assert torch.equal(ours.images, theirs.images)
    assert ours.prompts == theirs.prompts == [("high", "low", "high")[i % 3] for i in range(16)]
    assert ours.metrics["eval/constant"] == 0.25
    assert "eval/constant" not in plain.metrics
    assert ours.metrics != plain.metrics


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_inference_steps": 1}, "must be at least 2"),
        ({"num_inference_steps": -1}, "Evaluation.num_inference_steps is -1; it must be at least 0"),
        ({"height": 64}, "ToyModel makes one size; leave the evaluation's height, width and num_frames at 0"),
        ({"guidance_scale": float("inf")}, "Evaluation.guidance_scale is inf; it must be a finite number"),
        ({"prompts": "none.txt"}, "cannot read prompts from 'none.txt'"),
        ({"rewards": (RewardTerm(function="toy_job:nothing"),)}, "has no 'nothing'"),
        ({"rewards": (RewardTerm(function="a:b"),) * 2}, "Evaluation.rewards names 'b' twice"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(toy_recipe, fields, message) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        build_engine(with_evaluation(toy_recipe(), **fields), CPU)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_it_is_set_and_saved_like_any_part(toy_recipe, tmp_path: Path) -> None:
    words = [
        "task.evaluation.prompts=test.txt",
        "task.evaluation.rewards=toy_job:constant",
        "task.evaluation.height=8",
    ]
    recipe = override(toy_recipe(), words)
    assert recipe.task.evaluation.rewards == (RewardTerm(function="toy_job:constant"),)
    save_recipe(recipe, tmp_path / "recipe.json")
    assert load_recipe(tmp_path) == recipe


def test_sampling_needs_neither_rewards_nor_a_judge(toy_recipe) -> None:
    recipe = toy_recipe()
    task = replace(
        recipe.task, rewards=(RewardTerm(function="no_such_module:f"),), judge="no_such_module:Judge"
    )
    engine = build_engine(replace(recipe, task=task), CPU, scored=False)
    look = evaluate(build_engine(recipe, CPU))
    images, prompts = sampled(engine, None, 16)
    assert torch.equal(images, look.images)
    assert prompts == look.prompts
    given = PromptSet(("low",), ({},))
    first, again, other = (sampled(engine, given, 3, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, sampled(engine, given, 3)[0])


def test_the_average_is_what_is_looked_at(toy_recipe) -> None:
    """Through the exam's own guidance as well."""
    recipe = with_evaluation(toy_recipe(optimizer=Optimizer(lr=3e-3, ema_decay=0.9)), guidance_scale=2.0)
    assert recipe.snapshots["average"] == EMA(decay=0.9, every=1)
    engine = build_engine(recipe, CPU)
    before = evaluate(engine).metrics
    with torch.no_grad():
        for parameter in engine.model.module.parameters():
            parameter.zero_()
    assert evaluate(engine).metrics == before
