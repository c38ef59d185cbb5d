"""Parts that do not go together are refused before anything is sampled: one line, with what is missing and a remedy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flowgrpo_fast.cli import main
from flowgrpo_fast.recipe_io import save_recipe
from flowgrpo_fast.recipes import RECIPES
from tests.training.own_parts import WideToy

HERE = "tests.training.own_parts"
TOY = ("group_size=8", "num_prompts=4", "num_steps=1", "task.judge=", "task.num_eval_samples=4")
MODEL = (
    f"task.model={HERE}:load_wide",
    f'task.rewards=[{{"is": "RewardTerm", "function": "{HERE}:bright"}}]',
)
DIFFERENTIABLE = f'task.rewards=[{{"is": "RewardTerm", "function": "{HERE}:bright", "differentiable": true}}]'
TEACHERS = 'objective.teachers={"ocr": {"is": "Loaded", "path": "no/such/folder"}}'
TENSOR = (
    "machine.rollout_precision=LowPrecision",
    "machine.rollout_precision.format=fp8_tensor",
    "machine.rollout_precision.mode=shared_base",
)

CASES = {
    "a log-prob loss on an ODE": (
        ("flow_grpo", "topology.at=Deterministic"),
        ("PolicyGradient needs log-probs", "Deterministic has no stochastic step", "choose one that has"),
    ),
    "a log-prob loss on states alone": (
        ("flow_grpo", "topology.at=RandomPair"),
        ("PolicyGradient needs log-probs", "RandomPair has no stochastic step", "choose one that has"),
    ),
    "a log-prob loss on scouts": (
        ("flow_grpo", "experience=Scouts", "experience.num_scouts=32", "experience.regenerate=false"),
        ("PolicyGradient needs log-probs", "samples of Scouts", "set its regenerate to true"),
    ),
    "a coupled loss on a part of the steps": (
        ("gcpo", "optimizer.num_updates=1", "topology.at=FractionOfSteps", "objective.sizes=[4, 5]"),
        ("ChunkRatio joins all stochastic steps", "FractionOfSteps trains 9 of 16", "choose a window"),
    ),
    "a coupled loss on cut samples": (
        (
            "gcpo",
            "optimizer.num_updates=1",
            "topology=Cuts",
            "topology.steps=[5]",
            "topology.sizes=[16]",
            "objective.sizes=[4, 12]",
        ),
        ("ChunkRatio joins all stochastic steps", "cuts lose some", "no Cuts"),
    ),
    "chunks of another number of steps": (
        ("gcpo", "optimizer.num_updates=1", "objective.sizes=[2, 3]"),
        ("ChunkRatio.sizes is (2, 3), 5 steps in all", "trains on 16", "name sizes that add up"),
    ),
    "a tree wider than the group": (
        ("tree_grpo", "topology.at.size=4"),
        ("2 children at 4 steps", "16 leaves a prompt; group_size is 8", "set group_size=16"),
    ),
    "a comb wider than the group": (
        ("flow_grpo", "topology=Comb", "topology.at.size=6", "topology.fan=2"),
        ("2 branches at 6 steps", "12 samples a prompt; group_size is 8", "set group_size=12"),
    ),
    "a penalty of transitions that nobody measures": (
        ("flow_grpo", "objective.surrogate=ForwardError", "objective.surrogate.times=3"),
        ("TransitionKL measures the means of stored transitions", "ForwardError does not", "use VelocityKL"),
    ),
    "a group-wise loss whose update splits groups": (
        ("flow_grpo", f"objective={HERE}:GroupCoupled"),
        (
            "GroupCoupled joins the samples of a group",
            "'shuffled' with num_updates=2 splits",
            "partition=groups",
        ),
    ),
    "a tree that an update would split": (
        ("flow_grpo", "topology=Tree", "topology.at.size=3", "group_size=8"),
        ("Tree: an optimiser step takes whole trees", "set optimizer.partition=groups"),
    ),
    "pairs without pairs": (
        ("flow_grpo", f"objective={HERE}:NeedsPairs"),
        ("NeedsPairs learns from pairs", "Prompts gives none", "use a source of pairs"),
    ),
    "no teacher": (
        ("flow_opd",),
        ("Distillation.teachers is empty", "name a teacher for each value", "objective.teachers="),
    ),
    "a teacher for another data set": (
        ("flow_opd", TEACHERS, f"data={HERE}:MySource"),
        ("has dataset = 'mine' in its metadata", "Distillation knows 'ocr'", "name one of them"),
    ),
    "a teacher for none": (
        ("flow_opd", TEACHERS),
        ("has dataset = '' in its metadata", "Distillation knows 'ocr'", "name one of them"),
    ),
    "a teacher whose file is missing": (
        ("flow_opd", TEACHERS, f"data={HERE}:MySource", "data.dataset=ocr"),
        ("Loaded.path is 'no/such/folder'", "there is no such file or folder"),
    ),
    "a gradient of a reward that has none": (
        ("leap_align", "group_size=1"),
        (
            "LeapAlign needs the gradient of every reward",
            "is not marked differentiable",
            "set differentiable=true",
        ),
    ),
    "a gradient of a reward that runs elsewhere": (
        ("leap_align", "group_size=1", DIFFERENTIABLE.replace("true", 'true, "where": "process"')),
        ("RewardTerm.differentiable is true and where is 'process'", "no gradient comes back", "use 'here'"),
    ),
    "a gradient that a reward tears off": (
        ("leap_align", "group_size=1", DIFFERENTIABLE.replace(":bright", ":torn_off")),
        (
            ":torn_off' is differentiable by its RewardTerm",
            "carry no gradient",
            "without no_grad, detach and numpy",
        ),
    ),
    "a gradient through a decoder without": (
        ("leap_align", "group_size=1", DIFFERENTIABLE, "task.model=tests.conftest:load"),
        ("ToyModel decodes without gradient", "define its decode_with_grad", "or choose a method"),
    ),
    "batch scales, some steps trained": (
        ("flow_grpo", *TENSOR, "topology.at=FractionOfSteps"),
        (
            "fp8_tensor scales activations by their whole batch",
            "replays other batches",
            "Use fp8_rows or fp8_blocks",
        ),
    ),
    "batch scales, other replay rows": (
        ("flow_grpo", *TENSOR, "machine.replay_rows=4"),
        (
            "fp8_tensor scales activations by their whole batch",
            "replays other batches",
            "Use fp8_rows or fp8_blocks",
        ),
    ),
    "batch scales, steps side by side": (
        ("flow_grpo", *TENSOR, "machine.steps_per_forward=2"),
        (
            "fp8_tensor scales activations by their whole batch",
            "replays other batches",
            "Use fp8_rows or fp8_blocks",
        ),
    ),
    "batch scales, cuts": (
        ("pro_grpo", *TENSOR, "topology.sizes=[32, 16]"),
        (
            "fp8_tensor scales activations by their whole batch",
            "replays other batches",
            "Use fp8_rows or fp8_blocks",
        ),
    ),
    "guidance for a loss without": (
        ("diffusion_nft", "guidance_scale=4.5"),
        ("Recipe.guidance_scale is 4.5", "NFT samples and trains without guidance", "at 1"),
    ),
    "one start for all of an ODE's samples": (
        ("diffusion_nft", "topology=SharedStart", "topology.at=Deterministic"),
        ("SharedStart shares start noise and no step is stochastic", "all be equal", "use Independent"),
    ),
}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["train", *words, "--device", "cpu"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_go_together(case, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (name, *words), fragments = CASES[case]

    def never(*arguments: object) -> None:
        raise AssertionError("something was sampled")

    monkeypatch.setattr("flowgrpo_fast.experience.experience.walk", never)
    monkeypatch.setattr("flowgrpo_fast.training.evaluate.walk", never)
    error = refused(capsys, name, *MODEL, *TOY, *words)
    for fragment in fragments:
        assert fragment in error, error
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_gradient_that_is_there_is_not_refused(tmp_path) -> None:
    """The same words as above, with a reward and a decoder that have one."""
    words = ["leap_align", *MODEL, *TOY, "group_size=1", DIFFERENTIABLE, "sigmas.num_inference_steps=6"]
    main(["train", *words, "--out", str(tmp_path / "run"), "--device", "cpu"])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["grad_norm"] > 0
    assert WideToy().decode_with_grad.__qualname__.startswith("WideToy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": {"is": "AllSteps"}}, "Recipe.window was replaced by topology.at"),
        ({"loss": {"is": "ClippedRatio"}}, "Recipe.loss was replaced by objective"),
        ({"credit": {"is": "Credit"}}, "Credit was replaced by a list of credit steps"),
        ({"prune": {"is": "KeepAll"}}, "Recipe.prune was replaced by topology"),
        ({"explore": {"is": "NoScouts"}}, "Recipe.explore was replaced by experience"),
        ({"precision": "bf16"}, "Recipe.precision was replaced by machine.precision"),
        ({"objective": {"is": "ClippedRatio"}}, "ClippedRatio was replaced by PolicyGradient"),
    ],
)
def test_a_run_file_of_the_first_edition(change, message, capsys, tmp_path: Path) -> None:
    save_recipe(replace(RECIPES["flow_grpo"].make()), tmp_path / "recipe.json")
    values = json.loads((tmp_path / "recipe.json").read_text())
    (tmp_path / "recipe.json").write_text(json.dumps({**values, **change}))
    error = refused(capsys, "--from", str(tmp_path))
    assert message in error
    assert "second edition" in error
