"""Tiny pipelines of every family: what is planned from a folder is what the loaded model holds and runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from flowgrpo_fast.planner.architectures import architecture, count, count_model
from flowgrpo_fast.recipe import FullFineTuning, LoRA, Network
from flowgrpo_fast.training.engine import build_engine
from tests.models.conftest import tiny_path, tiny_recipe
from tests.models.families import FAMILIES, HUNYUAN_VIDEO15, KONTEXT, WAN, loaded

__all__ = ["tiny_path", "tiny_recipe"]
CPU = torch.device("cpu")
KNOWN = [family for family in FAMILIES if family.name != HUNYUAN_VIDEO15.name]


def size(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("family", KNOWN, ids=str)
def test_what_is_planned_is_what_the_model_runs(family, tiny_recipe) -> None:
    """Without adapters, whose own products a plan leaves out; at the number of text tokens that the prompts have."""
    recipe = tiny_recipe(family, train=FullFineTuning())
    engine = build_engine(recipe, CPU)
    model, conditioning = engine.model, engine.stage.conditioning
    live = count_model(model, conditioning, CPU)
    tokens = conditioning.prompt_embeds.shape[1]
    if family.name == "z_image":  # it takes each caption at its own length
        tokens = int(conditioning.extra["mask"][0].sum())
    network = replace(recipe.network, max_sequence_length=0)
    planned = count(replace(architecture(network.path), tokens=tokens), network)
    both = live.forward.linear / planned.forward.linear
    assert both == 1  # of two experts, one serves a step
    assert live.forward.attention == both * planned.forward.attention
    assert live.forward.products == both * planned.forward.products
    assert planned.decode == live.decode
    assert planned.latent_elements == math.prod(model.latent_shape)
    assert planned.sequence == model.image_seq_len
    assert planned.parameters == planned.trained == size(model.module)
    assert planned.vae_parameters == size(model.pipe.vae)
    assert planned.vae_in_fp32 == model.vae_in_fp32
    held = [
        conditioning.prompt_embeds,
        conditioning.pooled_prompt_embeds,
        conditioning.extra.get("image_latents"),
    ]
    if family.name != "z_image":
        assert planned.prompt_elements == sum(x[0].numel() for x in held if x is not None)


@pytest.mark.parametrize("family", KNOWN, ids=str)
def test_the_layers_with_an_adapter_are_those_of_the_model(family, tiny_recipe) -> None:
    recipe = tiny_recipe(family, train=LoRA(rank=2))
    model = loaded(recipe)
    planned = count(architecture(recipe.network.path), replace(recipe.network, max_sequence_length=0))
    assert planned.trained == sum(p.numel() for p in model.module.parameters() if p.requires_grad)


def test_a_family_without_shapes_is_one_line(tiny_path) -> None:
    with pytest.raises(ValueError, match="holds a HunyuanVideo15Pipeline; the planner knows") as caught:
        architecture(str(tiny_path(HUNYUAN_VIDEO15)))
    assert "\n" not in str(caught.value)


def test_a_source_image_is_as_long_as_the_one_that_is_made(tiny_recipe) -> None:
    """FLUX and Kontext have the same transformer: the pipeline's class tells them apart."""
    network = tiny_recipe(KONTEXT).network
    editing = architecture(network.path)
    plain, edited = count(replace(editing, pipeline="FluxPipeline"), network), count(editing, network)
    assert editing.pipeline == "FluxKontextPipeline"
    assert edited.forward.linear > 1.4 * plain.forward.linear
    assert edited.activations.all > 1.4 * plain.activations.all
    assert edited.latent_elements == plain.latent_elements
    assert edited.prompt_elements == plain.prompt_elements + plain.latent_elements


def test_experts_are_held_both_and_run_one_by_one(tiny_recipe) -> None:
    network = tiny_recipe(replace(WAN, variant={"experts": True})).network
    two = architecture(network.path)
    one = replace(
        two, networks={name: part for name, part in two.networks.items() if name != "transformer_2"}
    )
    for train in (LoRA(rank=2), FullFineTuning()):
        single, double = (count(part, replace(network, train=train)) for part in (one, two))
        assert double.parameters == 2 * single.parameters
        assert double.linear_parameters == 2 * single.linear_parameters
        assert double.trained == 2 * single.trained
        assert double.forward == single.forward
        assert double.activations == single.activations


@pytest.mark.slow
def test_the_published_wan_2_2() -> None:
    """The 5B has 16 pixels a latent, of which its list of halvings tells 8, and a timestep a token."""
    small = count(architecture("wan2.2-5b"), Network(height=704, width=1280, num_frames=5))
    assert small.parameters / 1e9 == pytest.approx(5.0, rel=0.01)
    assert small.vae_parameters / 1e6 == pytest.approx(705, rel=0.01)
    assert small.latent_elements == 48 * 2 * 44 * 80
    assert small.sequence == 2 * 22 * 40
    once = count(
        replace(architecture("wan2.2-5b"), options={}), Network(height=704, width=1280, num_frames=5)
    )
    each = 2 * (256 * 3072 + 3072**2 + 6 * 3072**2)  # what a timestep goes through before the blocks
    assert small.forward.linear - once.forward.linear == (small.sequence - 1) * each
    large = count(architecture("wan2.2-a14b"), Network(height=240, width=416, num_frames=5))
    assert large.parameters / 1e9 == pytest.approx(2 * 14.3, rel=0.01)
