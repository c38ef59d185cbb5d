"""Every family on a tiny configuration of its real pipeline, against diffusers' own pipeline on the same folder."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from flowgrpo_fast.models.adapters import ADAPTER_FILE
from flowgrpo_fast.ops import philox_normal
from flowgrpo_fast.recipe import (
    Clip,
    Cuts,
    FrozenWindow,
    FullFineTuning,
    Independent,
    LoRA,
    Optimizer,
    PolicyGradient,
    TransitionKL,
)
from flowgrpo_fast.sampling.policy import Policy
from flowgrpo_fast.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.evaluate import evaluate
from flowgrpo_fast.training.loop import train_step
from flowgrpo_fast.training.snapshots import trained_parameters
from tests.models import tiny
from tests.models.families import (
    FAMILIES,
    FIRST,
    FLUX2_KLEIN,
    ONE_EACH,
    QWEN_IMAGE,
    SD3,
    captured,
    loaded,
    source_images,
)

CPU = torch.device("cpu")
KL = PolicyGradient(trust=Clip(range=0.05), regularizers=(TransitionKL(beta=0.1),))
every_variant = pytest.mark.parametrize("family", FAMILIES, ids=str)
every_family = pytest.mark.parametrize("family", ONE_EACH, ids=str)


def start_noise(model, batch):
    return philox_normal(torch.arange(batch), model.latent_shape)


def euler(model, latents, sigmas, conditioning, recipe):
    """The ODE in plain PyTorch, guidance written out; also the velocities of both halves."""
    seen, policy = [], Policy(model, recipe.guidance_scale)
    for sigma, after in pairwise(sigmas):
        velocity, guidance = policy.predict(latents, sigma, conditioning)
        halves = [conditioning] if recipe.guidance_scale == 1 else [conditioning, conditioning.negative()]
        seen += [model.velocity(latents, sigma, half) for half in halves]
        if guidance is not None:
            velocity = guidance.negative_velocity + guidance.scale * (velocity - guidance.negative_velocity)
        latents = latents + (after - sigma) * velocity
    return latents, seen


def call_pipeline(pipe, family, prompts, latents, scale=1.0, images=()):
    arguments = {"prompt": prompts, "height": 32, "width": 32, "num_inference_steps": 3, "latents": latents}
    arguments |= {family.scale: scale, **family.call}
    if scale > 1:
        arguments["negative_prompt"] = [family.negative] * len(prompts)
    if images:
        arguments["image"] = [Image.open(path).resize((32, 32), Image.Resampling.LANCZOS) for path in images]
    if family.adapt is not None:
        family.adapt(pipe, arguments)
    out, calls = captured(pipe, lambda: pipe(output_type="pt", **arguments))
    return out[0], calls


@every_variant
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_velocity_and_sample_equal_the_pipelines(family, scale, tiny_recipe, pipeline, tmp_path) -> None:
    """Same start latents, same sigmas: every call of the transformer, and the finished pixels."""
    pipe = pipeline(family)
    recipe = tiny_recipe(family, guidance_scale=scale, negative_prompt=family.negative if scale > 1 else "")
    model = loaded(recipe)
    prompts, images = tiny.PROMPTS[:2], source_images(tmp_path, 2) if family.edits else []
    conditioning = family.encode(model, prompts, images)
    start = start_noise(model, len(prompts))
    expected, calls = call_pipeline(pipe, family, prompts, start, scale, images)
    with torch.no_grad():
        latents, velocities = euler(model, start, pipe.scheduler.sigmas, conditioning, recipe)
        ours = model.decode(latents)
    theirs = [output for _, output in calls]
    if len(theirs) < len(velocities):  # both halves in one call
        order = 1 if family.conditional_first else -1
        theirs = [half for both in theirs for half in both.chunk(2)[::order]]
    assert len(theirs) == len(velocities) == 3 * (1 + (scale > 1))
    for mine, other in zip(velocities, theirs, strict=True):
        torch.testing.assert_close(mine, other[:, : mine.shape[1]], rtol=2e-5, atol=family.atol)
    assert expected.std() > 0.05
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


@every_variant
def test_two_steps_of_training_are_exact_on_policy(family, tiny_recipe) -> None:
    engine = build_engine(tiny_recipe(family), CPU)
    before = [p.detach().clone() for p in engine.model.module.parameters()]
    reports = [train_step(engine) for _ in range(2)]
    assert reports[0].metrics["ratio_self_test"] == 0.0
    assert [report.metrics["first_ratio_error"] for report in reports] == [0.0, 0.0]
    assert all(report.metrics["grad_norm"] > 0 for report in reports)
    moved = [not torch.equal(a, b) for a, b in zip(before, engine.model.module.parameters(), strict=True)]
    trained = [p.requires_grad for p in engine.model.module.parameters()]
    assert not any(m and not t for m, t in zip(moved, trained, strict=True))
    least = (
        0.5 if family.variant.get("experts") else 0.7
    )  # one serves the window; last blocks drop their text half
    assert sum(moved) >= least * sum(trained)
    assert all(p.dtype == torch.float32 for p in trained_parameters(engine.model.module))


@every_family
def test_full_fine_tuning_trains_every_weight(family, tiny_recipe) -> None:
    engine = build_engine(
        tiny_recipe(family, train=FullFineTuning(), precision="bf16", guidance_scale=2.0), CPU
    )
    report = train_step(engine)
    assert report.metrics["ratio_self_test"] == 0.0
    assert all(p.requires_grad and p.dtype == torch.float32 for p in engine.model.module.parameters())


@every_family
def test_bf16_holds_the_base_in_bf16_and_the_adapter_in_fp32(family, tiny_recipe) -> None:
    engine = build_engine(tiny_recipe(family, precision="bf16"), CPU)
    assert {p.dtype for p in trained_parameters(engine.model.module)} == {torch.float32}
    frozen = [p for p in engine.model.module.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen if p.dtype == torch.bfloat16) > 0.9 * sum(p.numel() for p in frozen)
    assert train_step(engine).metrics["ratio_self_test"] == 0.0


@pytest.mark.parametrize(
    ("family", "mode"),
    [(family, "selective") for family in ONE_EACH] + [(family, "full") for family in FIRST],
    ids=str,
)
def test_checkpointing_changes_no_gradient(family, mode, tiny_recipe, tmp_path) -> None:
    gradients, flops = [], []
    for checkpointing in ("none", mode):
        model = loaded(tiny_recipe(family, checkpointing=checkpointing))
        for index, parameter in enumerate(trained_parameters(model.module)):
            generator = torch.Generator().manual_seed(index)
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        conditioning = family.encode(model, tiny.PROMPTS[:2], source_images(tmp_path, 2))
        with FlopCounterMode(display=False) as counter:
            velocity = model.velocity(start_noise(model, 2), torch.tensor([0.9, 0.4]), conditioning)
            velocity.square().mean().backward()
        flops.append(counter.get_total_flops())
        parameters = trained_parameters(model.module)
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    assert flops[1] == flops[0] if mode == "selective" else flops[1] > (1 + family.in_blocks) * flops[0]
    assert sum(bool(g.abs().sum() > 0) for g in gradients[0]) >= 0.7 * len(gradients[0])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


@every_family
def test_the_text_cache_gives_the_same_without_the_encoders(
    family, tiny_recipe, tmp_path, monkeypatch
) -> None:
    kept = tiny_recipe(family, text_cache=str(tmp_path / "text"))
    images = source_images(tmp_path, 3)
    plain = family.encode(loaded(tiny_recipe(family)), tiny.PROMPTS, images)
    first = family.encode(loaded(kept), tiny.PROMPTS, images)
    again = loaded(kept)

    def refuse(*args, **kwargs):
        raise AssertionError("a text encoder was loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    for other in (first, family.encode(again, tiny.PROMPTS[::-1], images[::-1])):
        order = torch.arange(3) if other is first else torch.tensor([2, 1, 0])
        ours = plain.rows(order)
        assert torch.equal(ours.prompt_embeds, other.prompt_embeds)
        assert torch.equal(ours.negative().prompt_embeds, other.negative().prompt_embeds)
        assert ours.extra.keys() == other.extra.keys()
        assert all(torch.equal(ours.extra[name], other.extra[name]) for name in ours.extra)
    gc.collect()
    assert not [o for o in gc.get_objects() if issubclass(type(o), transformers.PreTrainedModel)]


@pytest.mark.parametrize("family", [FLUX2_KLEIN, QWEN_IMAGE, SD3], ids=str)
def test_candidates_are_pruned_on_pooled_latents(family, tiny_recipe) -> None:
    """Packed ones as well: the model says their grid. Cells that do not tile it are refused before a sample is made."""
    inner = Independent(at=FrozenWindow(size=2, start=0))
    cuts = Cuts(inner=inner, steps=(3,), sizes=(4,), score="latents", pool=2)
    metrics = train_step(build_engine(tiny_recipe(family, topology=cuts), CPU)).metrics
    assert metrics["first_ratio_error"] == 0
    with pytest.raises(ValueError, match=r"^Cuts.pool is 3; it must divide the latents' height and width"):
        build_engine(tiny_recipe(family, topology=replace(cuts, pool=3)), CPU)


@every_family
def test_the_gradient_of_pixels_is_that_of_the_autoencoder(family, tiny_recipe, monkeypatch) -> None:
    """Against autograd through all samples at once, which keeps every activation."""
    model = loaded(tiny_recipe(family))
    latents = start_noise(model, 3)
    reference, own = (latents.clone().requires_grad_() for _ in range(2))
    pixels = (model.decode_latents(reference).float() / 2 + 0.5).clamp(0, 1)
    cotangent = philox_normal(torch.arange(3) + 7, pixels.shape[1:])
    (expected,) = torch.autograd.grad(pixels, reference, cotangent)
    assert expected.abs().max() > 0
    decode, calls = model.decode_latents, []
    monkeypatch.setattr(model, "decode_latents", lambda part: calls.append(len(part)) or decode(part))
    got = model.decode_with_grad(own)
    num_parts = len(calls)
    torch.testing.assert_close(got.detach(), pixels.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(model.decode(latents), got.detach()) or num_parts > 1
    assert not model.decode(own).requires_grad
    calls.clear()
    (gradient,) = torch.autograd.grad(got, own, cotangent)
    assert len(calls) == num_parts  # every part once more: nothing of it was kept
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    monkeypatch.setattr("flowgrpo_fast.models.pipeline._DIFFERENTIATED_PIXELS", 1)
    calls.clear()
    (one_by_one,) = torch.autograd.grad(model.decode_with_grad(own), own, cotangent)
    assert calls == [1] * 6
    torch.testing.assert_close(one_by_one, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FIRST, ids=str)
def test_a_run_loads_its_text_encoders_once(family, tiny_recipe, tmp_path, monkeypatch) -> None:
    """Whatever of the cache is missing: prompts, the negative one, all of them."""
    loads = []
    load = type(loaded(tiny_recipe(family)))._load_encoder
    monkeypatch.setattr(
        "flowgrpo_fast.models.pipeline.PipelineModel._load_encoder", lambda m: loads.append(m) or load(m)
    )
    for text_cache, expected in (("", 1), (str(tmp_path / "text"), 2), (str(tmp_path / "text"), 2)):
        build_engine(tiny_recipe(family, text_cache=text_cache), CPU)
        assert len(loads) == expected


@every_family
def test_a_lora_run_resumes_to_the_bit_and_diffusers_loads_its_adapter(
    family, tiny_recipe, pipeline, tmp_path
) -> None:
    recipe = tiny_recipe(family, objective=KL, optimizer=Optimizer(lr=1e-2, ema_decay=0.5))
    whole = build_engine(recipe, CPU)
    train_step(whole)
    folder = save_checkpoint(whole, tmp_path)
    assert train_step(whole).metrics["kl"] > 0
    resumed = build_engine(recipe, CPU)
    load_checkpoint(resumed, latest_checkpoint(tmp_path))
    train_step(resumed)
    for one, other in zip(whole.model.module.parameters(), resumed.model.module.parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(e.learner.snapshots["average"].values for e in (whole, resumed)), strict=True)
    )
    assert evaluate(whole).metrics == evaluate(resumed).metrics
    restored = build_engine(recipe, CPU)
    load_checkpoint(restored, folder)
    pipe = pipeline(family)
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(str(folder))
    else:  # HunyuanVideo 1.5's pipeline has no such method; its transformer does
        pipe.transformer.load_lora_adapter(str(folder), weight_name=ADAPTER_FILE)
    start = start_noise(restored.model, 2)
    images = source_images(tmp_path, 2) if family.edits else []
    _, calls = call_pipeline(pipe, family, tiny.PROMPTS[:2], start, images=images)
    conditioning = family.encode(restored.model, tiny.PROMPTS[:2], images)
    sigma = pipe.scheduler.sigmas[0]
    with torch.no_grad():
        policy = restored.learner.policy
        ours = policy.predict(start, sigma, conditioning).velocity
        base = policy.of(restored.learner.snapshots["start"]).predict(start, sigma, conditioning).velocity
    torch.testing.assert_close(ours, calls[0][1][:, : ours.shape[1]], rtol=2e-5, atol=family.atol)
    assert (ours - base).abs().max() > 1e-4  # the adapter says something


def test_an_adapter_can_start_another_run(tiny_recipe, tmp_path) -> None:
    recipe = tiny_recipe(SD3, optimizer=Optimizer(lr=1e-2))
    engine = build_engine(recipe, CPU)
    train_step(engine)
    folder = save_checkpoint(engine, tmp_path)
    started = build_engine(
        tiny_recipe(SD3, train=LoRA(rank=2, alpha=4.0, path=str(folder)), objective=KL), CPU
    )
    pairs = list(zip(*(trained_parameters(e.model.module) for e in (engine, started)), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    start, sigma = start_noise(started.model, 3), torch.full((3,), 0.7)
    conditioning, reference = started.stage.conditioning, started.learner.snapshots["start"]
    with torch.no_grad():
        now = started.model.velocity(start, sigma, conditioning)
        assert torch.equal(now, reference.velocity(start, sigma, conditioning))
        for parameter in trained_parameters(started.model.module):
            parameter += 0.1
        assert torch.equal(now, reference.velocity(start, sigma, conditioning))
        assert not torch.equal(now, started.model.velocity(start, sigma, conditioning))


def test_prompts_too_many_for_memory_are_read_from_disk(tiny_recipe, tmp_path, monkeypatch) -> None:
    """The same training, to the bit, and no text encoder after the first pass."""
    for family in (SD3, QWEN_IMAGE):
        length = 16 if family is SD3 else 400  # characters are tokens here, and Qwen's come in a template
        recipe = tiny_recipe(family, text_cache=str(tmp_path / "text"), max_sequence_length=length)
        monkeypatch.setattr("flowgrpo_fast.models.pipeline.MOST_EMBEDDINGS", 1 << 31)
        whole = build_engine(recipe, CPU)
        monkeypatch.setattr("flowgrpo_fast.models.pipeline.MOST_EMBEDDINGS", 1)
        stored = build_engine(recipe, CPU)
        assert type(stored.stage.conditioning) is not type(whole.stage.conditioning)
        index = torch.tensor([2, 0, 2, 1])
        for half in (lambda c: c, lambda c: c.negative()):
            one, other = (half(engine.stage.conditioning.rows(index)) for engine in (whole, stored))
            assert torch.equal(one.prompt_embeds, other.prompt_embeds)
            assert all(torch.equal(one.extra[name], other.extra[name]) for name in one.extra)
        assert ("mask" in stored.stage.conditioning.rows(index).extra) == (family is QWEN_IMAGE)
        for engine in (whole, stored):
            train_step(engine)
        pairs = zip(*(trained_parameters(engine.model.module) for engine in (whole, stored)), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
