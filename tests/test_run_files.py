"""The run files of `examples/`: each loads, is of the published size, and holds together without its checkpoint."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from flowgrpo_fast import recipes
from flowgrpo_fast.recipe import FlowSDE, LoRA
from flowgrpo_fast.recipe_io import load_recipe, save_recipe
from flowgrpo_fast.sampling.schedule import resolve_schedule
from flowgrpo_fast.training.engine import resolve

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "examples").glob("*.json"))

# family, height x width x frames, steps, stochastic ones, group, prompts, guidance, image tokens
PUBLISHED = {
    "sd3_5_medium_flow_grpo": ("sd3", 512, 512, 1, 10, 9, 24, 48, 4.5, 1024),
    "sd3_5_medium_flow_cps": ("sd3", 512, 512, 1, 10, 3, 24, 48, 1.0, 1024),
    "flux_mix_grpo": ("flux", 720, 720, 1, 25, 4, 12, 32, 1.0, 2025),
    "flux_kontext_flow_grpo": ("flux_kontext", 512, 512, 1, 6, 5, 21, 48, 1.0, 1024),
    "qwen_image_flow_grpo": ("qwen_image", 512, 512, 1, 10, 2, 16, 32, 4.0, 1024),
    "wan2_1_1_3b_flow_grpo": ("wan", 240, 416, 33, 20, 19, 4, 16, 4.5, 9 * 15 * 26),
}


def test_there_is_one_for_each_of_them() -> None:
    assert {path.stem for path in FILES} == set(PUBLISHED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_run_file_has_the_published_size(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    network, schedule = recipe.network, resolve_schedule(recipe, 0, seq_len=PUBLISHED[path.stem][-1])
    size = (network.height, network.width, network.num_frames)
    steps = (schedule.num_steps, len(schedule.kept), recipe.group_size, recipe.num_prompts)
    assert (recipe.task.model, *size, *steps, recipe.guidance_scale) == PUBLISHED[path.stem][:-1]
    assert isinstance(network.train, LoRA)
    assert recipe.precision == "bf16"
    assert recipe.rows_per_forward % recipe.group_size == 0  # a forward holds whole groups
    module = import_module(f"flowgrpo_fast.models.{recipe.task.model}")
    assert network.path
    assert module.load.__self__.family() == recipe.task.model
    assert all(callable(resolve(term.function)) for term in recipe.task.rewards)
    prompts = (ROOT / recipe.task.prompts).read_text().splitlines()
    assert len(set(prompts)) == len(prompts) >= 5
    save_recipe(recipe, tmp_path / "recipe.json")
    assert load_recipe(tmp_path) == recipe


def test_where_they_follow_a_paper_they_are_its_recipe() -> None:
    ours = load_recipe(ROOT / "examples/sd3_5_medium_flow_grpo.json")
    paper = recipes.flow_grpo()
    for part in ("sigmas", "dynamics", "window", "credit", "loss", "optimizer", "guidance_scale"):
        assert getattr(ours, part) == getattr(paper, part)
    mixed = load_recipe(ROOT / "examples/flux_mix_grpo.json")
    assert mixed.window == recipes.mix_grpo().window
    assert mixed.dynamics == FlowSDE(noise_level=0.7)
