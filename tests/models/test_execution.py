"""How the families run: compiled blocks, attention backends, no host syncs."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch.utils._python_dispatch import TorchDispatchMode

from flowgrpo_fast.models.execution import compile_blocks
from flowgrpo_fast.ops import philox_normal
from flowgrpo_fast.recipe import FrozenWindow, FullFineTuning, SharedStart
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import train_step
from flowgrpo_fast.training.snapshots import trained_parameters
from tests.models import tiny
from tests.models.families import FAMILIES, FLUX, ONE_EACH, QWEN_IMAGE, SD3, WAN, loaded, source_images

CPU = torch.device("cpu")


def _reset_attention() -> None:
    """diffusers keeps the last choice for the whole process."""
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


class NoSyncs(TorchDispatchMode):
    """Refuses whatever asks the device for a number or a size."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        forbidden = ("_local_scalar_dense", "nonzero", "item", "masked_select", "unique", "equal")
        assert func._overloadpacket.__name__ not in forbidden, f"{func} asks the device for a number"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", [each for each in FAMILIES if each.syncs != "always"], ids=str)
def test_velocity_asks_the_device_for_nothing(family, tiny_recipe, tmp_path) -> None:
    model = loaded(tiny_recipe(family))
    prompts = ["sun"] * 3 if family.syncs == "lengths" else tiny.PROMPTS
    conditioning = family.encode(model, prompts, source_images(tmp_path, 3))
    start = philox_normal(torch.arange(3), model.latent_shape)
    with NoSyncs():
        for half in (conditioning, conditioning.negative()):
            model.velocity(start, torch.tensor([0.9, 0.5, 0.1]), half).sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpointing", "changes"),
    [("selective", {}), ("none", {"topology": SharedStart(at=FrozenWindow(size=2)), "graphs": True})],
    ids=str,
)
def test_the_ratio_is_exactly_one_with_compiled_blocks(checkpointing, changes, tiny_recipe) -> None:
    """bf16, where another fusion would show: rollout and replay run one artefact."""
    recipe = tiny_recipe(SD3, compile=True, precision="bf16", checkpointing=checkpointing, **changes)
    engine = build_engine(recipe, CPU)
    reports = [train_step(engine) for _ in range(2)]
    assert reports[0].metrics["ratio_self_test"] == 0.0
    assert [report.metrics["first_ratio_error"] for report in reports] == [0.0, 0.0]
    assert all(report.metrics["grad_norm"] > 0 for report in reports)


@pytest.mark.slow
@pytest.mark.parametrize("family", [QWEN_IMAGE, WAN], ids=str)
def test_the_ratio_is_exactly_one_whatever_is_compiled(family, tiny_recipe) -> None:
    """Through the real compiler, in bf16; the other families compile as long and are left to docs/log.md."""
    torch._dynamo.reset()
    report = train_step(build_engine(tiny_recipe(family, compile=True, precision="bf16"), CPU))
    assert report.metrics["ratio_self_test"] == report.metrics["first_ratio_error"] == 0.0
    assert report.metrics["grad_norm"] > 0


@pytest.mark.slow
def test_the_ratio_is_exactly_one_however_a_compiled_block_runs(tiny_recipe) -> None:
    """All weights trained, attention through another backend."""
    torch._dynamo.reset()
    changes = {"attention": "_native_math", "train": FullFineTuning()}
    report = train_step(build_engine(tiny_recipe(FLUX, compile=True, precision="bf16", **changes), CPU))
    _reset_attention()
    assert report.metrics["ratio_self_test"] == report.metrics["first_ratio_error"] == 0.0
    assert report.metrics["grad_norm"] > 0


@pytest.mark.parametrize("family", ONE_EACH, ids=str)
def test_a_compiled_block_is_the_block(family, tiny_recipe, tmp_path, monkeypatch) -> None:
    """With the compiler's do-nothing backend: the wrapping changes neither value nor gradient, in either mode."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compiled(f, **{**k, "backend": "eager"}))
    results = []
    for compiles in (False, True):
        torch._dynamo.reset()
        model = loaded(tiny_recipe(family, checkpointing="full" if compiles else "none"))
        if compiles:
            for transformer in model.transformers.values():
                assert compile_blocks(transformer, model.blocks, model.streams) >= 2
        conditioning = family.encode(model, tiny.PROMPTS[:2], source_images(tmp_path, 2))
        inputs = philox_normal(torch.arange(2), model.latent_shape), torch.tensor([0.9, 0.4]), conditioning
        with torch.no_grad():
            sampled = model.velocity(*inputs)
        assert not sampled.requires_grad
        velocity = model.velocity(*inputs)
        assert torch.equal(velocity, sampled)
        velocity.square().mean().backward()
        gradients = [p.grad for p in trained_parameters(model.module) if p.grad is not None]
        results.append([velocity.detach(), *gradients])
    for plain, through in zip(*results, strict=True):
        assert torch.equal(plain, through)


@pytest.mark.parametrize("family", [SD3, FLUX], ids=str)
def test_attention_backends(family, tiny_recipe) -> None:
    plain = loaded(tiny_recipe(family))
    other = loaded(tiny_recipe(family, attention="_native_math", checkpointing="full"))
    start = philox_normal(torch.arange(3), plain.latent_shape)
    conditioning = plain.encode(tiny.PROMPTS)
    velocities = [model.velocity(start, torch.tensor(0.5), conditioning) for model in (plain, other)]
    torch.testing.assert_close(*velocities, rtol=1e-5, atol=1e-6)
    velocities[1].sum().backward()
    _reset_attention()
    with pytest.raises(ValueError, match=r"Network.attention is 'flush'") as caught:
        loaded(tiny_recipe(family, attention="flush"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ONE_EACH, ids=str)
def test_a_copy_with_another_module_calls_that(family, tiny_recipe, tmp_path) -> None:
    """What low precision does: a shallow copy of the model, a deep one of its module, changed."""
    model = loaded(tiny_recipe(family, attention="_native_math"))
    conditioning = family.encode(model, tiny.PROMPTS[:2], source_images(tmp_path, 2))
    inputs = philox_normal(torch.arange(2), model.latent_shape), torch.tensor([0.9, 0.4]), conditioning
    twin = copy.copy(model)
    twin.module = copy.deepcopy(model.module)
    with torch.no_grad():
        before = model.velocity(*inputs)
        assert torch.equal(before, twin.velocity(*inputs))
        layers = [m for name, m in twin.module.named_modules() if name.endswith(("to_v", "to_v.base_layer"))]
        assert len(layers) >= 2
        for layer in layers:
            layer.weight.add_(0.1)
        assert torch.equal(before, model.velocity(*inputs))
        assert not torch.equal(before, twin.velocity(*inputs))
    _reset_attention()


@pytest.mark.parametrize("family", ONE_EACH, ids=str)
def test_sensitive_layers(family, tiny_recipe) -> None:
    """Embedders, modulation and final layers; never what a block multiplies most of its tokens by."""
    model = loaded(tiny_recipe(family, train=FullFineTuning()))
    linear = {n for n, m in model.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    spared = {name for name in linear if any(re.search(part, name) for part in model.sensitive)}
    in_blocks = {
        f"{name}.{inner}"
        for name, block in model.transformer.named_modules()
        if type(block).__name__ in model.blocks
        for inner, layer in block.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    assert linear - in_blocks <= spared
    kept = {name for name in in_blocks if re.search(r"norm|_mod\.|adaLN|img_mlp\.net\.2$", name)}
    assert spared & in_blocks == kept
    assert 2 * len(in_blocks - spared) > len(in_blocks)
