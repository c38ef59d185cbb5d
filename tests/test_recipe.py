from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flowgrpo_fast import recipe as parts
from flowgrpo_fast.recipe_io import from_dict, load_recipe, override, save_recipe, to_dict
from flowgrpo_fast.recipes import RECIPES, digits
from flowgrpo_fast.recipes.trajectory import mix_grpo, pro_grpo_flash


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("fit", [lambda r: r, digits], ids=["paper", "digits"])
def test_every_recipe_survives_the_round_trip_through_json(name, fit, tmp_path: Path) -> None:
    recipe = fit(RECIPES[name].make())
    assert recipe.name == name
    save_recipe(recipe, tmp_path / "recipe.json")
    assert load_recipe(tmp_path / "recipe.json") == recipe
    assert load_recipe(tmp_path) == recipe


def test_published_numbers() -> None:
    # algorithms-1.md, 1.1, 1.2, 1.3, 2, 3
    flow, fast, cps = (RECIPES[n].make() for n in ("flow_grpo", "flow_grpo_fast", "flow_cps"))
    dance, mix, flash = (RECIPES[n].make() for n in ("dance_grpo", "mix_grpo", "mix_grpo_flash"))
    assert (flow.sigmas.num_inference_steps, flow.group_size, flow.num_prompts) == (10, 24, 48)
    (to_start,) = flow.objective.regularizers
    assert (flow.guidance_scale, flow.objective.trust.range, to_start.beta) == (4.5, 1e-4, 0.04)
    assert (to_start.to, to_start.rule) == ("start", parts.Frozen())
    assert (flow.optimizer.lr, flow.optimizer.weight_decay, flow.optimizer.num_updates) == (3e-4, 1e-4, 2)
    assert (flow.dynamics, flow.credit[0].std) == (parts.FlowSDE(noise_level=0.7), "batch")
    assert (fast.topology.at.size, fast.dynamics.noise_level, fast.objective.trust.range) == (2, 0.8, 1e-5)
    assert (cps.topology.at.size, cps.dynamics, cps.guidance_scale) == (3, parts.CPS(noise_level=0.8), 1.0)
    assert (dance.sigmas.num_inference_steps, dance.dynamics.noise_level, dance.topology.at.fraction) == (
        16,
        0.3,
        0.6,
    )
    assert dance.topology.shares_start
    assert dance.credit[0].eps == 1e-8
    slides = mix.topology.at
    assert (mix.sigmas.num_inference_steps, slides.size, slides.every, slides.stride) == (25, 4, 25, 1)
    assert (mix.group_size, mix.objective.trust.range, mix.optimizer.lr) == (12, 1e-4, 1e-5)
    assert mix.objective.penalties == ()
    assert (flash.solver.keep, flash.topology.at.every) == (0.4, 20)


def test_overrides_reach_nested_fields_and_swap_parts() -> None:
    recipe = override(
        mix_grpo(),
        [
            "group_size=8",
            "topology.at.size=2",
            "dynamics=CPS",
            "dynamics.noise_level=0.5",
            "optimizer.lr=1",
            "sigmas.shift=DynamicShift",
            "data.path=a.txt",
            'task.rewards=[{"is": "RewardTerm", "function": "a.b:c", "weight": 2.0}]',
            "optimizer.betas=[0.9, 0.95]",
        ],
    )
    assert recipe.group_size == 8
    assert recipe.topology.at.size == 2
    assert recipe.dynamics == parts.CPS(noise_level=0.5)
    assert recipe.optimizer.lr == 1.0
    assert isinstance(recipe.optimizer.lr, float)
    assert recipe.sigmas.shift == parts.DynamicShift()
    assert recipe.data.path == "a.txt"
    assert recipe.task.rewards == (parts.RewardTerm(function="a.b:c", weight=2.0),)
    assert recipe.optimizer.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("group_sze=2", "Recipe has no field 'group_sze'; did you mean 'group_size'?"),
        ("topology.at.sise=2", "SlidingWindow has no field 'sise'; did you mean 'size'?"),
        ("topology.at=SlidingWindw", "did you mean 'SlidingWindow'?"),
        ("group_size", "not an assignment"),
        ("group_size=many", "must be a value of type int"),
        ("group_size=2.5", "must be a value of type int"),
        ("machine.graphs=True", "machine.graphs is 'True'; it must be a value of type bool, such as false"),
        ("optimizer.betas=[0.9]", "must be a value of type [float, float], such as [0.9, 0.999]"),
        ("optimizer.betas=[0.9, 1.5]", "Optimizer.betas is (0.9, 1.5); it must be two numbers in [0, 1)"),
        ("optimizer.weight_decay=-1", "Optimizer.weight_decay is -1.0; it must be at least 0"),
        (
            "topology.at=FlowSDE",
            "topology.at is a FlowSDE, which has no method 'steps', no method 'latest_start' and no method "
            "'earliest_end'; a window is one of Deterministic, RandomPair, AllSteps",
        ),
        ("sigmas.shift=abc", "must be a value of type float or DynamicShift"),
        ("task.rewards=[1]", "must be a value of type [Reward, ...]"),
        ('task.rewards=[{"function": "a:f"}]', '{"function": "a:f"} has no "is" that names its part'),
        ('task.rewards=[{"is": "RewardTerm"}]', "RewardTerm needs a value for 'function'"),
        ("seed=-1", "Recipe.seed is -1; it must be at least 0"),
        ("group_size.x=2", "goes into a plain value"),
        ("group_size=1", "Recipe.group_size is 1; an advantage needs at least 2"),
        ("sigmas.num_inference_steps=1", "Sigmas.num_inference_steps is 1; it must be at least 2"),
        ("sigmas.spacing=log", "must be 'linear', 'diffusers', 'unipc' or 'dpm'"),
        ("objective.trust.range=0", "Clip.range is 0.0; it must be above 0"),
        ('objective.regularizers=[{"is": "TransitionKL", "beta": -1}]', "must be at least 0"),
        ("optimizer.num_updates=5", "it must divide num_prompts * group_size = 384"),
        ("machine.rows_per_forward=7", "Machine.rows_per_forward is 7; it must divide 96"),
        ("dynamics.noise_level=0", "FlowSDE.noise_level is 0.0; it must be above 0"),
        ("machine.precision=fp8", "must be 'fp32' or 'bf16'"),
        ("task.rewards=[]", "Task.rewards is empty"),
        (
            'task.rewards=[{"is": "RewardTerm", "function": "a:f"}, {"is": "RewardTerm", "function": "b:f"}]',
            "Task.rewards names 'f' twice",
        ),
        ("credit.0.std=global", "must be 'group' or 'batch'"),
    ],
)
def test_a_bad_override_is_one_line_that_names_value_and_remedy(assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        override(mix_grpo(), [assignment])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda: parts.RandomWindow(size=4, low=1, high=3), "must be at least low + size = 5"),
        (lambda: parts.RandomWindow(low=-1), "low is -1"),
        (lambda: parts.FrozenWindow(start=-1), "start is -1"),
        (lambda: parts.CPS(noise_level=1.5), "must be in (0, 1]"),
        (lambda: parts.DPMSolver2M(keep=0), "must be in (0, 1]"),
        (lambda: parts.DPMSolver2M(variant="euler"), "'midpoint' or 'heun'"),
        (lambda: parts.DynamicShift(max_seq_len=10), "must be above base_seq_len"),
        (lambda: parts.SlidingWindow(pace="slow"), "'progressive', 'decay' or 'exp_decay'"),
        (lambda: parts.Optimizer(ema_decay=1.0), "must be in [0, 1)"),
    ],
)
def test_parts_refuse_impossible_values(part, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        part()
    assert message in str(caught.value)


def test_loading_names_what_is_wrong_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no recipe at"):
        load_recipe(tmp_path / "missing")
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="is not a JSON recipe"):
        load_recipe(tmp_path)
    values = to_dict(mix_grpo())
    values["topolgy"] = 1
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="Recipe has no field 'topolgy'; did you mean 'topology'"):
        load_recipe(tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(parts.CPS())))
    with pytest.raises(ValueError, match="holds a CPS, not a Recipe"):
        load_recipe(tmp_path)
    with pytest.raises(ValueError, match="unknown recipe part 'Flowsde'; did you mean 'FlowSDE'"):
        from_dict({"is": "Flowsde"})
    values = {**to_dict(mix_grpo()), "group_size": "12"}
    with pytest.raises(ValueError, match=r'Recipe.group_size is "12"; it must be a value of type int'):
        from_dict(values)
    values = to_dict(mix_grpo())
    values["topology"]["at"] = to_dict(parts.CPS())
    with pytest.raises(
        ValueError, match=r"Recipe.topology.at is a CPS, .* is one of Deterministic, RandomPair, AllS"
    ):
        from_dict(values)
    with pytest.raises(ValueError, match=r"RandomWindow.high is 2.5; it must be a value of type int or null"):
        from_dict({"is": "RandomWindow", "high": 2.5})


def test_rows_of_a_forward_follow_the_geometry() -> None:
    recipe = replace(mix_grpo(), machine=parts.Machine(rows_per_forward=0))
    assert recipe.rows_per_update == 32 * 12 // 4
    assert recipe.rollout_rows == recipe.rows_per_update
    assert replace(recipe, machine=parts.Machine(rows_per_forward=12)).rollout_rows == 12


def test_a_forward_divides_the_candidates_of_every_stage() -> None:
    recipe = pro_grpo_flash()
    assert recipe.rows_per_update == 288
    assert recipe.rollout_rows == 96  # 48 prompts x (24, 16, 12): 1152, 768, 576
    assert replace(recipe, machine=parts.Machine(rows_per_forward=32)).rollout_rows == 32
    message = r"rows_per_forward is 288; it must divide 768, the candidates of 16 a prompt, so that rollout and replay"
    with pytest.raises(ValueError, match=message):
        replace(recipe, machine=parts.Machine(rows_per_forward=288))
    with pytest.raises(
        ValueError, match=r"prompts_per_chunk is 2: 48 samples, which must be whole forwards of 96"
    ):
        replace(recipe, machine=parts.Machine(prompts_per_chunk=2))
    chunked = parts.Machine(prompts_per_chunk=2, rows_per_forward=8)
    assert replace(recipe, machine=chunked).rollout_rows == 8


@pytest.mark.parametrize("name", RECIPES)
def test_published_rollouts_are_whole_forwards(name: str) -> None:
    recipe = RECIPES[name].make()
    sizes = (*recipe.topology.stages, recipe.group_size)
    assert all(recipe.num_prompts * n % recipe.rollout_rows == 0 for n in sizes)
