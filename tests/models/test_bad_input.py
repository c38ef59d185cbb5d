"""What a user can get wrong with a checkpoint: one line that names the value and the remedy."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowgrpo_fast.models.adapters import save_adapter
from flowgrpo_fast.models.loading import load_model, load_parts
from flowgrpo_fast.models.network import ModelSetup
from flowgrpo_fast.recipe import LoRA, Prompts
from flowgrpo_fast.training.engine import build_engine
from tests.models import tiny
from tests.models.families import (
    FLUX,
    FLUX2_KLEIN,
    HUNYUAN_VIDEO15,
    KONTEXT,
    SANA,
    SD3,
    WAN,
    Z_IMAGE,
    loaded,
    source_images,
)

CPU = torch.device("cpu")


def refused(recipe, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern) as caught:
        build_engine(recipe, CPU)
    assert "\n" not in str(caught.value)


def with_network(recipe, **changes):
    return replace(recipe, network=replace(recipe.network, **changes))


@pytest.fixture
def broken(tiny_path, tmp_path) -> Path:
    """A copy of the tiny SD3 to break."""
    return Path(shutil.copytree(tiny_path(SD3), tmp_path / "broken"))


def test_paths_that_are_no_pipeline(tiny_recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe = tiny_recipe(SD3)
    refused(with_network(recipe, path=""), "Network.path is empty; sd3 needs a StableDiffusion3Pipeline")
    refused(with_network(recipe, path=str(tmp_path)), "holds no readable model_index.json")
    refused(with_network(recipe, path="nobody/nothing"), "neither a folder nor a pipeline that the hub gives")


def test_a_checkpoint_of_another_family(tiny_recipe, tiny_path) -> None:
    recipe = with_network(tiny_recipe(SD3), path=str(tiny_path(FLUX)))
    refused(recipe, "holds a FluxPipeline; task.model 'sd3' takes a StableDiffusion3Pipeline")
    recipe = with_network(tiny_recipe(FLUX2_KLEIN), path=str(tiny_path(FLUX)))
    refused(recipe, "holds a FluxPipeline; task.model 'flux2_klein' takes a Flux2KleinPipeline")
    recipe = with_network(tiny_recipe(KONTEXT), path=str(tiny_path(FLUX)))
    refused(recipe, "holds a FluxPipeline; task.model 'flux_kontext' takes a FluxKontextPipeline")


def test_missing_folders_and_broken_parts(tiny_recipe, broken) -> None:
    recipe = with_network(tiny_recipe(SD3), path=str(broken))
    shutil.rmtree(broken / "text_encoder_2")
    shutil.rmtree(broken / "vae")
    refused(recipe, r"lacks vae/, text_encoder_2/|lacks text_encoder_2/, vae/")
    with pytest.raises(ValueError, match=r"which its model_index.json names; download"):
        loaded(recipe)


def test_weights_that_cannot_be_read(tiny_recipe, broken) -> None:
    recipe = with_network(tiny_recipe(SD3), path=str(broken))
    encoder = broken / "text_encoder" / "model.safetensors"  # by transformers, in words of their own
    whole = encoder.read_bytes()
    encoder.write_bytes(whole[:100])
    refused(recipe, "cannot be loaded: ")
    encoder.write_bytes(whole)
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"half a file")
    refused(recipe, "cannot be loaded: ")
    (broken / "model_index.json").write_text("[]")
    refused(recipe, "holds no readable model_index.json")


def test_a_transformer_of_another_shape(tiny_recipe, broken) -> None:
    config = json.loads((broken / "transformer" / "config.json").read_text())
    config["joint_attention_dim"] = 48
    (broken / "transformer" / "config.json").write_text(json.dumps(config))
    refused(with_network(tiny_recipe(SD3), path=str(broken)), "cannot be loaded: ")


def test_sizes(tiny_recipe) -> None:
    refused(tiny_recipe(SD3, height=36), "Network.height is 36; sd3 needs a multiple of 8, such as 32 or 40")
    refused(tiny_recipe(FLUX, width=3), "Network.width is 3; flux needs a multiple of 8, such as 8")
    refused(tiny_recipe(SD3, height=72), "72 x 32; this checkpoint's positions end at 64 pixels")
    refused(tiny_recipe(SD3, num_frames=5), "Network.num_frames is 5; sd3 makes images: set 1")
    refused(
        tiny_recipe(WAN, num_frames=6), "num_frames is 6; wan needs a multiple of 4 plus 1, such as 5 or 9"
    )
    refused(tiny_recipe(HUNYUAN_VIDEO15, num_frames=6), "hunyuan_video15 needs a multiple of 4 plus 1")
    refused(tiny_recipe(HUNYUAN_VIDEO15, width=34), "hunyuan_video15 needs a multiple of 4, such as 32 or 36")
    refused(tiny_recipe(FLUX2_KLEIN, width=36), "flux2_klein needs a multiple of 8, such as 32 or 40")
    refused(tiny_recipe(Z_IMAGE, height=20), "z_image needs a multiple of 8, such as 16 or 24")
    refused(tiny_recipe(SANA, height=33), "sana needs a multiple of 4, such as 32 or 36")
    refused(tiny_recipe(SANA, num_frames=5), "sana makes images: set 1")


def test_a_kernel_the_device_lacks(tiny_recipe) -> None:
    for family in (SD3, FLUX):
        recipe = tiny_recipe(family, attention="_native_cudnn", precision="bf16")
        refused(
            recipe,
            "Network.attention is '_native_cudnn', a kernel that cpu lacks for bfloat16; leave it empty",
        )


def test_lora_targets_that_match_nothing(tiny_recipe) -> None:
    lora = LoRA(rank=2, targets=("attn.to_q", "attn.to_quary"))
    refused(tiny_recipe(SD3, train=lora), r"LoRA.targets names 'attn.to_quary'.*did you mean 'attn.to_q'\?")
    refused(
        tiny_recipe(SD3, train=LoRA(rank=2, targets=("attn",))),
        "'attn', which ends the name of no linear layer",
    )


def test_adapters_that_do_not_fit(tiny_recipe, tmp_path, tiny_path) -> None:
    missing = LoRA(rank=2, alpha=4.0, path=str(tmp_path / "none.safetensors"))
    refused(tiny_recipe(SD3, train=missing), "LoRA.path '.*none.safetensors' is no adapter for these layers")
    other = tiny_path(SD3) / "vae" / "diffusion_pytorch_model.safetensors"
    refused(
        tiny_recipe(SD3, train=LoRA(rank=2, path=str(other))),
        "is no adapter for these layers: .* holds nothing",
    )
    engine = build_engine(tiny_recipe(SD3, train=LoRA(rank=4, alpha=4.0)), CPU)
    save_adapter(engine.model.module, tmp_path / "rank4.safetensors")
    path = str(tmp_path / "rank4.safetensors")
    refused(
        tiny_recipe(SD3, train=LoRA(rank=2, alpha=4.0, path=path)), r"holds \[4, 16\] for .* needs \[2, 16\]"
    )
    refused(
        tiny_recipe(SD3, train=LoRA(rank=4, alpha=8.0, path=path)),
        "trained with alpha 4.0; LoRA.alpha is 8.0",
    )


def test_prompts_and_images(tiny_recipe, tmp_path) -> None:
    recipe = tiny_recipe(SD3)
    refused(
        replace(recipe, data=Prompts()),
        "Prompts.path is empty and the model brings no prompts of its own; set it",
    )
    images = tmp_path / "images.txt"
    images.write_text("source_0.png\n")
    refused(replace(recipe, data=replace(recipe.data, images=str(images))), "names 1 images for 3 prompts")
    source_images(tmp_path, 3)
    images.write_text("source_0.png\nsource_1.png\nsource_2.png\n")
    refused(
        replace(recipe, data=replace(recipe.data, images=str(images))), "sd3 makes images from text alone"
    )
    editing = tiny_recipe(KONTEXT)
    refused(
        replace(editing, data=replace(editing.data, images="")), "flux_kontext edits images; set data.images"
    )
    Path(editing.data.images).write_text("source_0.png\nnone.png\nsource_2.png\n")
    refused(editing, "cannot read the image '.*none.png' of data.images")


def test_a_text_cache_that_cannot_be_written(tiny_recipe, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    refused(tiny_recipe(SD3, text_cache=str(tmp_path / "file")), "Network.text_cache: cannot write")


def test_a_damaged_embedding_is_made_again(tiny_recipe, tmp_path) -> None:
    recipe = tiny_recipe(SD3, text_cache=str(tmp_path / "text"))
    first = loaded(recipe).encode(tiny.PROMPTS)
    for file in (tmp_path / "text").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    again = loaded(recipe).encode(tiny.PROMPTS)
    assert torch.equal(first.prompt_embeds, again.prompt_embeds)
    assert len(list((tmp_path / "text").rglob("*.safetensors"))) == 4


def test_progress_counts_the_prompts_that_are_encoded(tiny_recipe, tmp_path) -> None:
    recipe = tiny_recipe(SD3, text_cache=str(tmp_path / "text"))
    seen = []
    setup = ModelSetup(
        network=recipe.network, precision="fp32", seed=0, progress=lambda done, of: seen.append((done, of))
    )
    load_model("sd3", CPU, setup).prompt_rows(["sun", "moon", "sun"])  # and the negative prompt
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    seen.clear()
    load_model("sd3", CPU, setup).prompt_rows(["sun", "rain"])
    assert seen == [(0, 1), (1, 1)]


def test_other_settings_are_other_embeddings(tiny_recipe, tmp_path, tiny_path) -> None:
    """The cache knows the encoders by their weights, not by their folder's name."""
    kept = {"text_cache": str(tmp_path / "text")}
    first = loaded(tiny_recipe(SD3, **kept)).encode(["sun"])
    longer = loaded(tiny_recipe(SD3, max_sequence_length=24, **kept)).encode(["sun"])
    assert longer.prompt_embeds.shape[1] == first.prompt_embeds.shape[1] + 8
    folder = Path(shutil.copytree(tiny_path(SD3), tmp_path / "other"))
    pipe = load_parts(folder, tiny.diffusers.StableDiffusion3Pipeline, (), {"default": torch.float32})
    tiny.fill(pipe.text_encoder_3, seed=7)
    pipe.text_encoder_3.save_pretrained(folder / "text_encoder_3")
    other = loaded(with_network(tiny_recipe(SD3, **kept), path=str(folder))).encode(["sun"])
    assert not torch.equal(other.prompt_embeds, first.prompt_embeds)


def test_sana_keeps_a_prompt_and_the_negative_prompt_apart(tiny_recipe, tmp_path) -> None:
    """The pipeline instructs its encoder for the one and not for the other: the same words, two embeddings."""
    kept = {"text_cache": str(tmp_path / "text")}
    prompt = loaded(tiny_recipe(SANA, **kept)).encode(["sun"]).prompt_embeds
    other = loaded(tiny_recipe(SANA, negative_prompt="sun", **kept)).encode(["moon"])
    negative = other.negative_prompt_embeds
    assert not torch.equal(prompt[:, : negative.shape[1]], negative)  # the prompt's is padded


def test_shapes_that_disagree(tiny_recipe) -> None:
    model = loaded(tiny_recipe(SD3))
    conditioning = model.encode(["sun", "moon"])
    latents = torch.zeros(2, *model.latent_shape)
    with pytest.raises(ValueError, match=r"latents must be \[B, 4, 8, 8\], got \[2, 4, 8, 4\]"):
        model.velocity(latents[..., :4], torch.tensor(0.5), conditioning)
    with pytest.raises(ValueError, match=r"sigma must be \[\] or \[2\], got \[3\]"):
        model.velocity(latents, torch.zeros(3), conditioning)
    with pytest.raises(ValueError, match="conditioning must hold 1 rows, one per sample, got 2"):
        model.velocity(latents[:1], torch.tensor(0.5), conditioning)
