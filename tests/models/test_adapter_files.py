"""Adapters as files: what diffusers and peft load of ours, and what we load of theirs, by the outputs."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from flowgrpo_fast.models.adapters import ADAPTER_FILE, check_alpha, load_adapter, load_lora, save_adapter
from flowgrpo_fast.models.network import FullFineTuning, LoRA
from flowgrpo_fast.recipe import Optimizer
from flowgrpo_fast.training.checkpoint import save_checkpoint
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import train_step
from tests.models import tiny
from tests.models.families import SD3, WAN, loaded
from tests.models.test_families import call_pipeline, euler, start_noise

CPU = torch.device("cpu")
EXPERTS = replace(WAN, variant={"experts": True})
TARGETS = ("attn.to_q", "attn.to_v")


@pytest.fixture
def transformer(tiny_path):
    return SD3Transformer2DModel.from_pretrained(str(tiny_path(SD3)), subfolder="transformer")


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "hidden_states": torch.randn(2, 4, 4, 4, generator=generator),
        "encoder_hidden_states": torch.randn(2, 6, 32, generator=generator),
        "pooled_projections": torch.randn(2, 32, generator=generator),
        "timestep": torch.tensor([300.0, 700.0]),
    }


def output(transformer) -> torch.Tensor:
    with torch.no_grad():
        return transformer(**inputs()).sample


def witness(transformer, rank=4, targets=TARGETS, **settings):
    """peft's own model over a copy, with an adapter that says something."""
    model = get_peft_model(
        copy.deepcopy(transformer), LoraConfig(r=rank, target_modules=list(targets), **settings)
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def ours(transformer, path, alpha, rank=4, targets=TARGETS, prefix="transformer"):
    transformer = copy.deepcopy(transformer)
    LoRA(rank=rank, alpha=alpha, targets=targets, path=str(path)).prepare(transformer, (), 0, prefix)
    return transformer


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [({"lora_alpha": 8}, 8.0), ({"lora_alpha": 6, "use_rslora": True}, 12.0)],
    ids=["alpha", "rslora"],
)
def test_peft_folders_and_diffusers_files_are_read_as_they_are_there(
    settings, alpha, transformer, tmp_path
) -> None:
    model = witness(transformer, **settings)
    expected, base = output(model), output(transformer)
    assert (expected - base).abs().max() > 1e-2
    model.save_pretrained(str(tmp_path / "peft"))
    for path in (tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors"):
        torch.testing.assert_close(output(ours(transformer, path, alpha)), expected, rtol=1e-5, atol=1e-6)
    save_with_diffusers(model, tmp_path)
    reread = copy.deepcopy(transformer)
    reread.load_lora_adapter(str(tmp_path), weight_name=ADAPTER_FILE)
    torch.testing.assert_close(output(reread), expected, rtol=1e-5, atol=1e-6)
    mine = output(ours(transformer, tmp_path, alpha))
    torch.testing.assert_close(mine, output(reread), rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"was trained with alpha [68].*LoRA.alpha(=12.0, not| is) 4.0"
    ) as caught:
        ours(transformer, tmp_path, 4.0)
    assert "\n" not in str(caught.value)


def save_with_diffusers(model, folder, described=True) -> None:
    tensors = get_peft_model_state_dict(model)
    StableDiffusion3Pipeline.save_lora_weights(
        str(folder),
        transformer_lora_layers={key.removeprefix("base_model.model."): v for key, v in tensors.items()},
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict() if described else None,
    )


def test_a_file_without_a_configuration_has_the_scale_that_diffusers_gives_it(transformer, tmp_path) -> None:
    save_with_diffusers(witness(transformer, lora_alpha=8), tmp_path, described=False)
    reread = copy.deepcopy(transformer)
    reread.load_lora_adapter(str(tmp_path), weight_name=ADAPTER_FILE)
    mine = output(ours(transformer, tmp_path / ADAPTER_FILE, 4.0))
    torch.testing.assert_close(mine, output(reread), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"it says no alpha, .* set LoRA.alpha to 4, not 8.0"):
        ours(transformer, tmp_path, 8.0)


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (
            {},
            {"targets": TARGETS[:1]},
            r"it also holds '.*attn.to_v.lora_A.weight' and 3 more, .* LoRA.targets",
        ),
        ({}, {"targets": (*TARGETS, "attn.to_k")}, r"holds nothing for '.*attn.to_k.lora_A.weight'"),
        ({}, {"rank": 2}, r"holds \[4, 16\] for .* needs \[2, 16\]"),
        ({"use_dora": True}, {}, "it was trained with use_dora True|it also holds '.*lora_magnitude_vector"),
        ({"lora_bias": True}, {}, "it was trained with lora_bias True|it also holds '.*lora_B.bias'"),
        ({"alpha_pattern": {"attn.to_v": 2}}, {}, "it was trained with alpha_pattern {'attn.to_v': 2}"),
        ({}, {"prefix": "transformer_2"}, "it is one transformer's; put 'transformer_2''s in a folder"),
    ],
    ids=["layers beyond", "layers missing", "rank", "DoRA", "bias", "an alpha of its own", "one of two"],
)
def test_what_differs_is_named(settings, changes, message, transformer, tmp_path) -> None:
    witness(transformer, lora_alpha=8, **settings).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=message) as caught:
        ours(transformer, tmp_path, 8.0, **changes)
    assert str(caught.value).startswith(f"LoRA.path {str(tmp_path)!r} is no adapter for these layers: ")
    assert "\n" not in str(caught.value)


def test_one_call_loads_both_transformers_of_wan(tiny_recipe, pipeline, tmp_path) -> None:
    """Pixels of diffusers' own pipeline with the saved adapters, against our own sampling with them active."""
    recipe = tiny_recipe(EXPERTS)
    model = loaded(recipe)
    with torch.no_grad():
        for index, parameter in enumerate(p for p in model.module.parameters() if p.requires_grad):
            generator = torch.Generator().manual_seed(index)
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model.module, tmp_path / ADAPTER_FILE)
    pipe, start, prompts = pipeline(EXPERTS), start_noise(model, 2), tiny.PROMPTS[:2]
    base, _ = call_pipeline(pipe, EXPERTS, prompts, start)
    load_lora(pipe, tmp_path)
    expected, _ = call_pipeline(pipe, EXPERTS, prompts, start)
    sigmas = pipe.scheduler.sigmas
    boundary = model.pipe.config.boundary_ratio
    assert 0 < int((sigmas[:-1] >= boundary).sum()) < len(sigmas) - 1  # both run
    with torch.no_grad():
        latents, _ = euler(model, start, sigmas, model.encode(prompts), recipe)
        torch.testing.assert_close(model.decode(latents), expected, rtol=0, atol=2e-5)
    assert (expected - base).abs().max() > 1e-3
    pipe.transformer_2.disable_adapters()
    first_alone, _ = call_pipeline(pipe, EXPERTS, prompts, start)
    assert (expected - first_alone).abs().max() > 1e-3  # the second says something, too


def test_both_start_another_run(tiny_recipe, tmp_path) -> None:
    model = loaded(tiny_recipe(EXPERTS))
    save_adapter(model.module, tmp_path / ADAPTER_FILE)
    again = loaded(tiny_recipe(EXPERTS, train=LoRA(rank=2, alpha=4.0, path=str(tmp_path))))
    for one, other in zip(model.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_pipeline_without_the_transformer_is_refused(pipeline, tmp_path) -> None:
    save_file({"transformer_2.x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / ADAPTER_FILE)
    with pytest.raises(ValueError, match="holds adapters for 'transformer_2', which WanPipeline lacks"):
        load_lora(pipeline(WAN), tmp_path)


def test_the_scale_of_a_run_is_its_recipes(tiny_recipe, tmp_path) -> None:
    """`load_adapter` reads values; a resume under another alpha has the new scale, as `check_alpha` can tell."""
    model = loaded(tiny_recipe(SD3))
    save_adapter(model.module, tmp_path / ADAPTER_FILE)
    other = loaded(tiny_recipe(SD3, train=LoRA(rank=2, alpha=6.0))).module
    values = load_adapter(other, tmp_path / ADAPTER_FILE)
    saved = [p for p in model.module.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(values, saved, strict=True))
    assert other.peft_config["default"].lora_alpha == 6.0
    check_alpha(model.module, tmp_path / ADAPTER_FILE)
    with pytest.raises(ValueError, match=r"it was trained with alpha 4.0; LoRA.alpha is 6.0"):
        check_alpha(other, tmp_path / ADAPTER_FILE)


@pytest.mark.parametrize("family", [SD3, EXPERTS], ids=str)
def test_fully_trained_weights_load_into_diffusers(family, tiny_recipe, pipeline, tmp_path) -> None:
    """As docs/models.md says it: `load_state_dict` of the transformer, or of the two by their names."""
    recipe = tiny_recipe(family, train=FullFineTuning(), optimizer=Optimizer(lr=1e-2))
    engine = build_engine(recipe, CPU)
    train_step(engine)
    folder = save_checkpoint(engine, tmp_path)
    pipe, model, prompts = pipeline(family), engine.model, tiny.PROMPTS[:2]
    start = start_noise(model, 2)
    base, _ = call_pipeline(pipe, family, prompts, start)
    names = list(model.transformers)
    whole = nn.ModuleDict({n: getattr(pipe, n) for n in names}) if len(names) > 1 else pipe.transformer
    whole.load_state_dict(load_file(folder / "model.safetensors"))
    expected, _ = call_pipeline(pipe, family, prompts, start)
    assert (expected - base).abs().max() > 1e-3
    with torch.no_grad():
        latents, _ = euler(model, start, pipe.scheduler.sigmas, model.encode(prompts), recipe)
        torch.testing.assert_close(model.decode(latents), expected, rtol=0, atol=2e-5)
