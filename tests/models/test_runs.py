"""Whole runs of tiny pipelines from a run file, as the command line does them."""

from __future__ import annotations

import json
from dataclasses import replace

import diffusers
import pytest
import torch
from PIL import Image

from flowgrpo_fast.cli import main
from flowgrpo_fast.recipe import Clip, Optimizer, PolicyGradient, TransitionKL
from flowgrpo_fast.recipe_io import save_recipe
from flowgrpo_fast.types import Conditioning
from tests.models.families import SD3, WAN


@pytest.mark.parametrize("family", [SD3, WAN], ids=str)
def test_train_from_a_run_file_resume_and_sample(family, tiny_recipe, tmp_path, tiny_path) -> None:
    recipe = tiny_recipe(
        family,
        num_steps=2,
        text_cache=str(tmp_path / "text"),
        objective=PolicyGradient(trust=Clip(range=0.05), regularizers=(TransitionKL(beta=0.01),)),
        optimizer=Optimizer(lr=1e-2, ema_decay=0.9),
    )
    reward = replace(recipe.task.rewards[0], function="flowgrpo_fast.rewards.rules:ink_contrast")
    save_recipe(replace(recipe, task=replace(recipe.task, rewards=(reward,))), tmp_path / "run.json")
    folder = tmp_path / "run"
    main(["train", "--from", str(tmp_path / "run.json"), "--out", str(folder), "--device", "cpu"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[1]["ratio_self_test"] == 0.0
    assert (folder / "report.html").stat().st_size > 1000
    checkpoint = folder / "checkpoints" / "step_000002"
    files = {path.name for path in checkpoint.iterdir()}
    assert files == {
        "pytorch_lora_weights.safetensors",
        "average.safetensors",
        "optimizer.pt",
        "state.json",
    }
    main(["train", "num_steps=3", "--resume", str(folder), "--device", "cpu"])
    assert (folder / "checkpoints" / "step_000003").is_dir()
    main(["sample", str(folder), "--out", str(tmp_path / "samples.png"), "--num-samples", "3"])
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.size[0] == 3 * (96 + 8) + 8  # three pictures of 32 pixels, shown as 96
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(tiny_path(family)))
    for name in ("pytorch_lora_weights.safetensors", "average.safetensors"):
        pipe.load_lora_weights(str(checkpoint), weight_name=name)
        assert (
            pipe.transformer.peft_config[
                "default_0" if name.startswith("pytorch") else "default_1"
            ].lora_alpha
            == 4
        )


def test_a_negative_that_all_prompts_share_is_held_once() -> None:
    """`rows` keeps a stride of 0, and the unconditional half sees its own extras."""
    shared = torch.randn(1, 5, 3).expand(4, -1, -1)
    mask = torch.arange(4)[:, None] > 1
    conditioning = Conditioning(
        torch.randn(4, 2, 3),
        negative_prompt_embeds=shared,
        extra={"mask": mask, "negative_mask": ~mask, "image": torch.arange(4)},
    )
    part = conditioning.rows(torch.tensor([3, 0, 3]))
    assert part.negative_prompt_embeds.untyped_storage().nbytes() == 5 * 3 * 4
    assert torch.equal(part.negative_prompt_embeds, shared[:3])
    assert torch.equal(part.prompt_embeds, conditioning.prompt_embeds[[3, 0, 3]])
    view = conditioning.rows(slice(1, 3))
    assert view.prompt_embeds.data_ptr() == conditioning.prompt_embeds[1:].data_ptr()
    assert torch.equal(view.extra["mask"], mask[1:3])
    negative = part.negative()
    assert torch.equal(negative.extra["mask"], ~mask[[3, 0, 3]])
    assert torch.equal(negative.extra["image"], torch.tensor([3, 0, 3]))
    assert torch.equal(negative.prompt_embeds, part.negative_prompt_embeds)
