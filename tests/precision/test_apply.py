"""The low-precision model of a real transformer with a peft LoRA: what is quantised, shared, refreshed, refused."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from flowgrpo_fast.models.digits import DigitsModel
from flowgrpo_fast.precision import FORMATS, QuantizedLinear
from flowgrpo_fast.precision.adapters import linear_layers
from flowgrpo_fast.recipe import LowPrecision
from flowgrpo_fast.types import FlowModel

from .conftest import TARGETS, flux, flux_inputs, sd3, sd3_inputs

pytestmark = pytest.mark.filterwarnings("ignore:.* is emulated on a CPU:RuntimeWarning")

MODES = ("merged", "bare_layers", "branch", "shared_base")
NAMES = sorted(FORMATS)


def low(model, mode: str = "merged", form: str = "fp8_rows", **changes):
    return LowPrecision(mode=mode, format=form, **changes).build(model)


def quantized_names(model) -> set[str]:
    return {
        name.removesuffix(".base_layer")
        for name, module in model.transformer.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def plain(name: str, model) -> tuple[set[str], set[str]]:
    """Names of the layers with and without an adapter that may be quantised, by the family's own words."""
    layers = [
        layer
        for layer in linear_layers(model.transformer)
        if not any(part in layer.name for part in model.sensitive)
    ]
    multiples = FORMATS[name].multiples
    fits = [
        layer
        for layer in layers
        if layer.linear.out_features % multiples[0] == 0 and layer.linear.in_features % multiples[1] == 0
    ]
    return {x.name for x in fits if x.wrapper}, {x.name for x in fits if not x.wrapper}


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [sd3, flux], ids=["sd3", "flux"])
def test_each_mode_quantises_its_layers_and_says_so(make, mode, form) -> None:
    model = make()
    adapted, bare = plain(form, model)
    assert adapted
    assert bare
    total = sum(1 for _ in linear_layers(model.transformer))
    result = low(model, mode, form)
    assert quantized_names(result.model) == (bare if mode == "bare_layers" else adapted | bare)
    assert quantized_names(model) == (adapted | bare if mode == "shared_base" else set())
    assert (result.model is model) == (mode == "shared_base")
    assert result.description.startswith(
        f"{len(quantized_names(result.model))} of {total} linear layers in {form}"
    )
    emulated = "" if form in ("fp8_rows", "fp8_tensor") else ", emulated"
    assert f" in {form}{emulated}, mode {mode} (" in result.description
    assert "sensitive" in result.description
    for word in model.sensitive:
        assert not any(word in name for name in quantized_names(result.model))


def test_names_of_a_published_layout() -> None:
    model = low(sd3(), "bare_layers").model
    block = {"ff.net.0.proj", "ff.net.2", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"}
    first = {f"transformer_blocks.0.{name}" for name in (*block, "attn.to_add_out")}
    first |= {"transformer_blocks.0.ff_context.net.0.proj", "transformer_blocks.0.ff_context.net.2"}
    last = {f"transformer_blocks.1.{name}" for name in block}
    assert quantized_names(model) == first | last


def by_hand(model, result, mode: str, form: str):
    """The training model with plain linears that quantise activations by a hook and hold dequantised weights."""
    hand = copy.deepcopy(model)
    if mode == "merged":
        sources = {layer.name: layer for layer in linear_layers(hand.transformer)}
    for name in quantized_names(result.model):
        layer = hand.transformer.get_submodule(name)
        if mode == "merged":
            if sources[name].wrapper is not None:
                layer.merge()  # peft's own
                layer = layer.base_layer
        elif hasattr(layer, "base_layer"):
            layer = layer.base_layer
        values = QuantizedLinear(layer, FORMATS[form])
        values.write_(layer.weight)
        layer.weight.data = values.dequantized()
        layer.register_forward_pre_hook(
            lambda _, args: (
                FORMATS[form]
                .rounded(args[0].reshape(-1, args[0].shape[-1]), torch.float32)
                .view(args[0].shape),
            )
        )
    return hand


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [sd3, flux], ids=["sd3", "flux"])
@torch.no_grad()
def test_the_velocity_is_that_of_plain_layers_with_dequantised_operands(make, mode, form) -> None:
    """peft merges, hooks quantise activations, torch multiplies in fp32."""
    model = make()
    inputs = sd3_inputs(model) if isinstance(model, DigitsModel) else flux_inputs()
    exact = model.velocity(*inputs)
    original = copy.deepcopy(model)
    result = low(model, mode, form)
    got = result.model.velocity(*inputs)
    expected = by_hand(original, result, mode, form).velocity(*inputs)
    # An activation or a merged weight on the border between two codes may fall on either side.
    assert (got - expected).norm() < 2e-2 * (expected - exact).norm() + 1e-6 * exact.norm()
    assert (got - exact).norm() < (0.5 if form == "nvfp4" else 0.2) * exact.norm()


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("mode", MODES[:3])
def test_a_copy_owns_its_codes_and_nothing_else(mode, form) -> None:
    model = sd3()
    state = {name: value.clone() for name, value in model.module.state_dict().items()}
    result = low(model, mode, form)
    theirs = {t.data_ptr() for t in (*model.module.parameters(), *model.module.buffers())}
    own = [
        t
        for t in (*result.model.module.parameters(), *result.model.module.buffers())
        if t.data_ptr() not in theirs and t.numel()
    ]
    assert own
    assert all(t.dtype is torch.uint8 for t in own)
    values = sum(
        m.in_features * m.out_features
        for m in result.model.module.modules()
        if isinstance(m, QuantizedLinear)
    )
    size = sum(t.numel() for t in own) / values
    bits = 8 * size if form != "nvfp4" else 8 * (size - _padding(result.model) / values)
    assert bits < (4.6 if form == "nvfp4" else 8.6)
    assert result.model.module is not model.module
    assert all(torch.equal(value, state[name]) for name, value in model.module.state_dict().items())


def _padding(model) -> int:
    """Bytes of swizzled scales that toy layers leave unused."""
    layers = [m for m in model.module.modules() if isinstance(m, QuantizedLinear)]
    return sum(m.scale.numel() - m.in_features * m.out_features // 16 for m in layers)


def test_a_shared_base_holds_its_frozen_weights_in_low_precision_alone() -> None:
    model = sd3()
    before = sum(p.numel() * p.element_size() for p in model.module.parameters())
    trained = {name for name, p in model.module.named_parameters() if p.requires_grad}
    result = low(model, "shared_base")
    layers = [m for m in model.module.modules() if isinstance(m, QuantizedLinear)]
    after = sum(p.numel() * p.element_size() for p in model.module.parameters())
    assert before - after == sum(4 * m.in_features * m.out_features for m in layers)
    assert {name for name, p in model.module.named_parameters() if p.requires_grad} == trained
    assert result.merged == ()


@pytest.mark.parametrize("mode", MODES[:3])
@torch.no_grad()
def test_an_update_is_in_the_copy(mode) -> None:
    """At once where the adapter is shared; after the refresh, in the same memory, where it is merged."""
    model = sd3()
    result = low(model, mode)
    inputs = sd3_inputs(model)
    before = result.model.velocity(*inputs)
    pointers = [t.data_ptr() for t in result.model.module.buffers()]
    for parameter in model.module.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn_like(parameter)
    stale = result.model.velocity(*inputs)
    assert torch.equal(stale, before) == (mode == "merged")
    result.refresh()
    after = result.model.velocity(*inputs)
    assert not torch.equal(after, before)
    assert torch.equal(after, low(model, mode).model.velocity(*inputs))
    assert [t.data_ptr() for t in result.model.module.buffers()] == pointers


@pytest.mark.parametrize("form", NAMES)
@torch.no_grad()
def test_a_thousand_refreshes_do_not_drift(form) -> None:
    model = sd3()
    result = low(model, form=form)
    trained = [p for p in model.module.parameters() if p.requires_grad]
    start = [p.clone() for p in trained]
    first = [t.clone() for t in result.model.module.buffers()]
    for update in range(1000):
        for parameter in trained[update % 8 :: 8]:
            parameter += 1e-3 * torch.randn_like(parameter)
        if update % 100:
            for quantized, source in result.merged[update % 5 :: 5]:
                quantized.write_(source.linear.weight, None)  # as dirty as can be
        result.refresh()
        if update % 250 == 249:
            fresh = low(model, form=form).model.module.buffers()
            assert all(map(torch.equal, result.model.module.buffers(), fresh))
    for parameter, value in zip(trained, start, strict=True):
        parameter.copy_(value)
    result.refresh()
    assert all(map(torch.equal, result.model.module.buffers(), first))


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_bf16_base_under_autocast(mode) -> None:
    """As models are loaded: frozen weights and biases in bf16, adapters in fp32."""
    model = sd3()
    exact = model.velocity(*sd3_inputs(model))
    for name, parameter in model.module.named_parameters():
        parameter.data = parameter.data if "lora" in name else parameter.data.bfloat16()
    inputs = sd3_inputs(model)
    result = low(model, mode)
    result.refresh()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = result.model.velocity(*inputs)
    assert got.dtype is torch.bfloat16
    assert (got.float() - exact).norm() < 0.1 * exact.norm()


def _selective(context, op, *args, **kwargs):
    kept = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("form", NAMES)
def test_checkpointing_a_shared_base_changes_no_gradient(form, selective) -> None:
    model = sd3()
    low(model, "shared_base", form)
    inputs = sd3_inputs(model)
    trained = [p for p in model.module.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model.velocity(*inputs).square().sum(), trained)

    def checkpointed(block, *args):
        context = partial(create_selective_checkpoint_contexts, _selective) if selective else noop_context_fn
        return checkpoint(block, *args, use_reentrant=False, context_fn=context)

    model.transformer.enable_gradient_checkpointing(checkpointed)
    got = torch.autograd.grad(model.velocity(*inputs).square().sum(), trained)
    assert all(map(torch.equal, got, expected))


def test_a_model_of_slots_is_copied() -> None:
    @dataclass(frozen=True, slots=True)
    class Slotted(FlowModel):
        module: nn.Module
        latent_shape: tuple[int, ...] = (8,)

    module = nn.Sequential(nn.Linear(16, 16))
    result = low(Slotted(module))
    assert type(result.model.module[0]) is QuantizedLinear
    assert type(module[0]) is nn.Linear


@torch.no_grad()
def test_full_fine_tuning_is_merged_from_the_masters() -> None:
    model = sd3(lora=False)
    result = low(model)
    for parameter in model.module.parameters():
        parameter += 0.01
    result.refresh()
    name = "transformer_blocks.1.ff.net.2"
    weight = model.transformer.get_submodule(name).weight
    again = QuantizedLinear(nn.Linear(*weight.shape[::-1]), FORMATS["fp8_rows"])
    again.write_(weight)
    assert torch.equal(result.model.transformer.get_submodule(name).dequantized(), again.dequantized())


@pytest.mark.parametrize("changes", [{"use_rslora": True}, {"r": 7, "lora_alpha": 3}], ids=str)
@torch.no_grad()
def test_the_scale_is_peft_s(changes) -> None:
    _merges_as_peft_does(sd3(**changes))


@torch.no_grad()
def test_several_active_adapters_are_merged_together() -> None:
    model = sd3()
    model.transformer.add_adapter(LoraConfig(r=3, lora_alpha=9, target_modules=["to_q", "to_k"]), "second")
    model.transformer.add_adapter(LoraConfig(r=3, target_modules=["to_q"]), "idle")
    for name, parameter in model.module.named_parameters():
        if "second" in name or "idle" in name:
            parameter += 0.05 * torch.randn_like(parameter)
    model.transformer.set_adapters(["default", "second"])
    layer = model.transformer.transformer_blocks[0].attn.to_q
    assert layer.active_adapters == ["default", "second"]
    _merges_as_peft_does(model)


def _merges_as_peft_does(model) -> None:
    result = low(model)
    for name in quantized_names(result.model):
        layer = model.transformer.get_submodule(name)
        if hasattr(layer, "base_layer"):
            layer = copy.deepcopy(layer)
            layer.merge()
            layer = layer.base_layer
        expected = QuantizedLinear(layer, FORMATS["fp8_rows"])
        expected.write_(layer.weight)
        different = (expected.codes != result.model.transformer.get_submodule(name).codes).float().mean()
        assert different < 1e-3  # peft adds the products in another order: ties may fall elsewhere


def test_what_is_not_plain_lora_is_refused_by_name() -> None:
    message = r"transformer_blocks.0.attn.to_q carries {}.*low precision knows plain LoRA alone"
    for changes, found in (
        ({"use_dora": True}, "the LoRA variant DoraLinearVariant"),
        ({"lora_bias": True}, "a LoRA with a bias of its own"),
        ({"r": 257}, "LoRA adapters of rank 257 together, above 256"),
    ):
        for mode in ("merged", "branch", "shared_base"):
            with pytest.raises(ValueError, match=message.format(found)):
                low(sd3(**changes), mode)
        low(sd3(**changes), "bare_layers")
    model = sd3()
    model.transformer.transformer_blocks[0].attn.to_q.merge()
    with pytest.raises(ValueError, match=message.format("adapters already merged into the weight .default.")):
        low(model)
    model = sd3(lora=False)
    inject_adapter_in_model(LoHaConfig(r=4, target_modules=TARGETS), model.transformer)
    with pytest.raises(ValueError, match=message.format(r"an adapter of type peft.tuners.loha.layer.Linear")):
        low(model)


def test_skipped_names_and_their_typos() -> None:
    model = sd3()
    names = quantized_names(low(model, skip=("ff.net.2", "add_")).model)
    assert names
    assert not any("ff.net.2" in name or "add_" in name for name in names)
    names = quantized_names(low(model, skip=(r"^transformer_blocks\.0\.", r"attn\.to_[qk]$")).model)
    assert {name.split(".")[1] for name in names} == {"1"}
    assert "transformer_blocks.1.attn.to_v" in names
    assert "transformer_blocks.1.attn.to_q" not in names
    with pytest.raises(ValueError, match=r"skip has 'ff.nett', which is found in no linear layer's name"):
        low(model, skip=("ff.nett",))
    with pytest.raises(ValueError, match=r"skip has '\(', no regular expression: missing \), unterminated"):
        low(model, skip=("(",))


@pytest.mark.parametrize(
    ("model", "mode", "form", "reason"),
    [
        (lambda: sd3(lora=False), "bare_layers", "fp8_rows", "of 32, .* trained"),
        (lambda: sd3(lora=False), "branch", "fp8_rows", "of 32, .* trained"),
        (lambda: sd3(lora=False), "shared_base", "fp8_rows", "of 32, .* trained"),
        (lambda: sd3(target_modules="all-linear"), "bare_layers", "fp8_rows", "with an adapter"),
    ],
    ids=["bare", "branch", "shared", "adapters everywhere"],
)
def test_nothing_to_quantise_is_refused_with_the_reasons(model, mode, form, reason) -> None:
    with pytest.raises(
        ValueError, match=rf"no linear layer can run in {form} with mode='{mode}': .*{reason}"
    ):
        low(model(), mode, form)


def test_shapes_a_format_cannot_take_stay_as_they_are() -> None:
    model = flux()
    model.transformer.odd = nn.Linear(24, 40).requires_grad_(False)
    result = low(model, "branch")
    assert type(result.model.transformer.odd) is nn.Linear
    assert "1 not a multiple of 16 x 16" in result.description


def test_a_format_the_device_lacks_is_emulated_aloud_or_refused() -> None:
    line = "nvfp4 is emulated on a CPU: the numbers are right, but slower than bf16; native are fp8_rows"
    with pytest.warns(RuntimeWarning, match=line) as seen:
        result = low(sd3(), form="nvfp4")
    assert len(seen) == 1
    assert "nvfp4, emulated, mode merged" in result.description
    message = r"format is 'fp8_blocks', which a CPU lacks \(it has fp8_rows, fp8_tensor\); emulate=true"
    with pytest.raises(ValueError, match=message):
        low(sd3(), form="fp8_blocks", emulate=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low(sd3(), form="fp8_rows", emulate=False)
    model = sd3()
    model.module.to("meta")
    with pytest.raises(ValueError, match="there is no low precision on meta"):
        low(model)


def test_a_copy_of_compiled_blocks_is_compiled() -> None:
    model = sd3()
    model.transformer.transformer_blocks[0].compile(backend="aot_eager")
    twin = low(model).model
    assert twin.transformer.transformer_blocks[0]._compiled_call_impl is not None
    assert twin.transformer.transformer_blocks[1]._compiled_call_impl is None
