"""The run files of `examples/`: each loads, is of the published size, and holds together without its checkpoint."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from flowgrpo_fast.data.prompts import Prompts
from flowgrpo_fast.names import resolve
from flowgrpo_fast.recipe import FlowSDE, FullFineTuning, LoRA
from flowgrpo_fast.recipe_io import load_recipe, save_recipe
from flowgrpo_fast.recipes import RECIPES

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "examples").glob("*.json"))

# family, height x width x frames, steps, stochastic ones, group, prompts, guidance, image tokens
PUBLISHED = {
    "sd3_5_medium_flow_grpo": ("sd3", 512, 512, 1, 10, 9, 24, 48, 4.5, 1024),
    "sd3_5_medium_flow_cps": ("sd3", 512, 512, 1, 10, 3, 24, 48, 1.0, 1024),
    "sd3_5_large_flow_grpo": ("sd3", 512, 512, 1, 10, 9, 24, 48, 4.5, 1024),
    "flux_mix_grpo": ("flux", 720, 720, 1, 25, 4, 12, 32, 1.0, 2025),
    "flux_dance_grpo_full": ("flux", 720, 720, 1, 16, 15, 12, 16, 1.0, 2025),
    "flux_mix_grpo_full": ("flux", 720, 720, 1, 25, 4, 12, 32, 1.0, 2025),
    "flux_kontext_flow_grpo": ("flux_kontext", 512, 512, 1, 6, 5, 21, 48, 1.0, 1024),
    "qwen_image_flow_grpo": ("qwen_image", 512, 512, 1, 10, 2, 16, 32, 4.0, 1024),
    "wan2_1_1_3b_flow_grpo": ("wan", 240, 416, 33, 20, 19, 4, 16, 4.5, 9 * 15 * 26),
    "wan2_2_a14b_flow_grpo": ("wan", 240, 416, 33, 20, 19, 4, 16, 4.5, 9 * 15 * 26),
    "flux2_klein_flow_grpo": ("flux2_klein", 384, 384, 1, 8, 1, 16, 48, 4.0, 576),
    "z_image_turbo_flow_grpo": ("z_image", 512, 512, 1, 6, 1, 16, 48, 1.0, 1024),
    "sana_1_6b_flow_grpo": ("sana", 512, 512, 1, 10, 9, 24, 48, 4.5, 256),
    "hunyuan_video15_flow_grpo": ("hunyuan_video15", 480, 848, 33, 20, 19, 4, 16, 6.0, 9 * 30 * 53),
}


def test_there_is_one_for_each_of_them() -> None:
    assert {path.stem for path in FILES} == set(PUBLISHED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_run_file_has_the_published_size(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    network, plan = recipe.network, recipe.plan(0, seq_len=PUBLISHED[path.stem][-1])
    size = (network.height, network.width, network.num_frames)
    steps = (len(plan.steps), len(plan.kept), recipe.group_size, recipe.num_prompts)
    assert (recipe.task.model, *size, *steps, recipe.guidance_scale) == PUBLISHED[path.stem][:-1]
    assert isinstance(network.train, FullFineTuning if path.stem.endswith("_full") else LoRA)
    assert recipe.machine.precision == "bf16"
    if path.stem != "flux_dance_grpo_full":  # whose updates take 64 samples, four of each group
        assert recipe.machine.rows_per_forward % recipe.group_size == 0  # a forward holds whole groups
    module = import_module(f"flowgrpo_fast.models.{recipe.task.model}")
    assert network.path
    assert module.load.__self__.family() == recipe.task.model
    assert all(callable(resolve(term.function)) for term in recipe.task.rewards)
    prompts = Prompts(path=str(ROOT / recipe.data.path)).load().prompts
    assert len(set(prompts)) == len(prompts) >= 5
    save_recipe(recipe, tmp_path / "recipe.json")
    assert load_recipe(tmp_path) == recipe


@pytest.mark.parametrize(
    ("name", "scheduler", "last"),
    [
        ("flux2_klein_flow_grpo", {"shift": 3.0, "use_dynamic_shifting": True}, 1 / 8),
        ("z_image_turbo_flow_grpo", {"shift": 3.0}, 1 / 6),
        ("hunyuan_video15_flow_grpo", {"shift": 5.0}, 1 / 20),
    ],
)
def test_the_noise_schedule_is_the_pipelines(name: str, scheduler: dict, last: float) -> None:
    """The published scheduler as the pipeline sets it; FLUX.2 shifts by tokens and steps."""
    tokens, steps = PUBLISHED[name][-1], PUBLISHED[name][4]
    theirs = FlowMatchEulerDiscreteScheduler(**scheduler)
    mu = compute_empirical_mu(tokens, steps)
    theirs.set_timesteps(sigmas=np.linspace(1.0, last, steps), mu=mu)
    ours = load_recipe(ROOT / f"examples/{name}.json").plan(0, seq_len=tokens).sigmas
    torch.testing.assert_close(ours, theirs.sigmas, rtol=2e-6, atol=0)


def test_where_they_follow_a_paper_they_are_its_recipe() -> None:
    ours = load_recipe(ROOT / "examples/sd3_5_medium_flow_grpo.json")
    paper = RECIPES["flow_grpo"].make()
    for part in ("sigmas", "dynamics", "topology", "credit", "objective", "optimizer", "guidance_scale"):
        assert getattr(ours, part) == getattr(paper, part)
    mixed = load_recipe(ROOT / "examples/flux_mix_grpo.json")
    assert mixed.topology == RECIPES["mix_grpo"].make().topology
    assert mixed.dynamics == FlowSDE(noise_level=0.7)
