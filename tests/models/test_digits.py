"""The digits model against diffusers called directly, its file format, its prompts and its shipped start."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from flowgrpo_fast.models import digits
from flowgrpo_fast.models.digits_data import digit_images
from flowgrpo_fast.models.digits_text import DIGIT_WORDS, VOCABULARY, all_prompts, digits_of, tokenize
from flowgrpo_fast.models.pretrain_digits import pretrain
from flowgrpo_fast.rewards.judges import DigitJudge

SHIPPED = Path(digits.__file__).with_name("digits.safetensors")


@pytest.fixture(scope="module")
def model() -> digits.DigitsModel:
    return digits.shipped()


def euler_samples(model: digits.DigitsModel, prompts: list[str], num_steps: int = 10, scale: float = 1.0):
    latents = torch.randn(len(prompts), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    conditioning = model.encode(prompts)
    sigmas = torch.linspace(1, 0, num_steps + 1)
    with torch.no_grad():
        for now, after in itertools.pairwise(sigmas):
            velocity = model.velocity(latents, now, conditioning)
            if scale != 1.0:
                unconditional = model.velocity(latents, now, conditioning.negative())
                velocity = unconditional + scale * (velocity - unconditional)
            latents = latents + (after - now) * velocity
    return model.decode(latents)


def test_encode_looks_words_up_in_the_table(model):
    weights = load_file(SHIPPED)["words.weight"]
    got = model.encode(["a handwritten seven", "the number 3"])
    row = [VOCABULARY.index(w) for w in ("a", "handwritten", "seven", "")]
    other = [VOCABULARY.index(w) for w in ("the", "number", "three", "")]
    assert torch.equal(got.prompt_embeds, weights[torch.tensor([row, other])])
    torch.testing.assert_close(got.pooled_prompt_embeds, got.prompt_embeds.sum(1) / 4)
    assert torch.equal(got.negative_prompt_embeds, weights[0].expand(2, 4, -1))
    assert not got.prompt_embeds.requires_grad


def test_velocity_is_the_transformer_itself(model):
    weights = load_file(SHIPPED)
    reference = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=32,
        pos_embed_max_size=4,
    )
    prefix = "transformer."
    reference.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    latents = torch.randn(3, 1, 8, 8)
    sigma = torch.tensor([0.9, 0.5, 0.1])
    conditioning = model.encode(["the digit two", "a handwritten nine", "the number 0"])
    with torch.no_grad():
        expected = reference(
            hidden_states=latents,
            timestep=1000 * sigma,
            encoder_hidden_states=conditioning.prompt_embeds,
            pooled_projections=conditioning.pooled_prompt_embeds,
        ).sample
        assert torch.equal(model.velocity(latents, sigma, conditioning), expected)
        half = torch.tensor(0.5)
        same = model.velocity(latents, half, conditioning)
        assert torch.equal(same, model.velocity(latents, half.expand(3), conditioning))


def test_velocity_predicts_noise_minus_x0(model):
    """On real digits it explains most of the target's variance (which is 1 + var(x0))."""
    data = digit_images("training")
    x0, noise = data.images * 2 - 1, torch.randn(len(data.images), 1, 8, 8)
    prompts = [f"the digit {DIGIT_WORDS[d]}" for d in data.digits.tolist()]
    with torch.no_grad():
        velocity = model.velocity(0.5 * x0 + 0.5 * noise, torch.tensor(0.5), model.encode(prompts))
    error = (velocity - (noise - x0)).square().mean() / (noise - x0).square().mean()
    assert error < 0.35


@pytest.mark.parametrize("bf16", [False, True])
def test_gradient_mode_does_not_change_a_bit(model, bf16):
    conditioning = model.encode(digits.prompts() * 24)
    latents, sigma = torch.randn(240, 1, 8, 8), torch.full((240,), 0.7)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            rollout = model.velocity(latents, sigma, conditioning)
        replay = model.velocity(latents, sigma, conditioning)
    assert replay.requires_grad
    assert replay.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert torch.equal(rollout, replay.detach())


def test_only_the_transformer_trains(model):
    model.velocity(torch.randn(2, 1, 8, 8), torch.tensor(0.3), model.encode(["a 1", "a 2"])).sum().backward()
    assert not model.module.words.weight.requires_grad
    assert all(p.grad is not None for p in model.module.transformer.parameters())
    model.module.zero_grad(set_to_none=True)


def test_decode_clamps_to_ink(model):
    latents = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 9.0, -1.0, 1.0]).expand(1, 1, 8, 8)
    expected = torch.tensor([0.0, 0.0, 0.5, 0.75, 1.0, 1.0, 0.0, 1.0]).expand(1, 1, 8, 8)
    assert torch.equal(model.decode(latents.bfloat16()), expected)


def test_save_and_load_keep_every_bit_and_the_configuration(tmp_path):
    config = digits.DigitsConfig(num_layers=2, attention_head_dim=16, word_dim=8)
    network = digits.DigitsNetwork(config)
    digits.save_pretrained(network, tmp_path / "small.safetensors")
    loaded = digits.from_pretrained(tmp_path / "small.safetensors")
    assert loaded.module.config == config
    assert loaded.module.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in loaded.module.state_dict().items())
    latents, conditioning = torch.randn(2, 1, 8, 8), loaded.encode(["a zero", "a one"])
    expected = digits.DigitsModel(network.eval()).velocity(latents, torch.tensor(0.5), conditioning)
    assert torch.equal(loaded.velocity(latents, torch.tensor(0.5), conditioning), expected)


def test_bad_weight_files_are_one_line_errors(tmp_path):
    (tmp_path / "noise.safetensors").write_bytes(b"not a weights file")
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    network = digits.DigitsNetwork(digits.DigitsConfig(num_layers=1))
    weights = dict(list(network.state_dict().items())[1:])
    save_file(weights, tmp_path / "part.safetensors", metadata={"config": '{"num_layers": 1}'})
    for name in ("missing", "noise", "plain", "part"):
        path = tmp_path / f"{name}.safetensors"
        with pytest.raises(ValueError, match=name) as caught:
            digits.from_pretrained(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a handwritten sevn", ["'sevn'", "'seven'"]),
        ("a handwriten two", ["'handwriten'", "'handwritten'"]),
        ("a handwritten", ["'a handwritten'", "0 digit words"]),
        ("", ["''", "0 digit words"]),
        ("one two", ["2 digit words"]),
        ("the the the the four", ["5 words"]),
        (7, ["7"]),
    ],
)
def test_prompt_errors_name_the_word(model, prompt, words):
    with pytest.raises(ValueError, match="prompt") as caught:
        model.encode(["a handwritten one", prompt])
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompts", ["a handwritten one", []])
def test_prompts_must_be_a_sequence(model, prompts):
    with pytest.raises(ValueError, match="prompts"):
        model.encode(prompts)


def test_prompts_ask_for_the_ten_digits():
    assert digits_of(digits.prompts()).tolist() == list(range(10))
    assert digits_of(all_prompts()).tolist() == list(range(10)) * 3
    assert digits_of(["A Handwritten SEVEN", "the digit 7"]).tolist() == [7, 7]
    assert tokenize(all_prompts()).unique(dim=0).shape == (30, 4)


def test_the_gradient_of_pixels_is_their_finite_difference(model):
    latents = torch.linspace(-1.75, 1.75, 64).view(1, 1, 8, 8).requires_grad_()
    cotangent = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(model.decode_with_grad(latents), latents, cotangent)
    change = 2.0**-6  # the pixels are linear but for the clamp, from whose corners the latents keep away
    pixels = [model.decode(latents.detach() + sign * change).double() for sign in (1, -1)]
    expected = cotangent * (pixels[0] - pixels[1]) / (2 * change)
    torch.testing.assert_close(gradient.double(), expected.double(), rtol=1e-5, atol=1e-6)
    assert 0 < int((gradient == 0).sum()) < 64
    assert not model.decode(latents).requires_grad
    assert torch.equal(model.decode(latents), model.decode_with_grad(latents).detach())


def test_it_makes_its_prompts_and_takes_no_images(model):
    assert model.own_prompts() == digits.prompts()
    with pytest.raises(ValueError, match=r"data.images is set; digits makes images from text alone"):
        model.prompt_rows(["a handwritten one"], [SHIPPED])


def test_shape_errors(model):
    conditioning = model.encode(["a one", "a two"])
    good, sigma = torch.zeros(2, 1, 8, 8), torch.tensor(0.5)
    with pytest.raises(ValueError, match=r"latents.*\[2, 8, 8\]"):
        model.velocity(good[:, 0], sigma, conditioning)
    with pytest.raises(ValueError, match=r"sigma.*\[3\]"):
        model.velocity(good, torch.zeros(3), conditioning)
    with pytest.raises(ValueError, match="conditioning must hold 4"):
        model.velocity(good.repeat(2, 1, 1, 1), sigma, conditioning)


def test_the_halves_are_all_the_data_and_do_not_meet():
    from sklearn.datasets import load_digits

    training, judge = digit_images("training"), digit_images("judge")
    together = torch.cat([training.images, judge.images]).flatten(1) * 16
    assert sorted(together.tolist()) == sorted(load_digits().data.tolist())
    assert abs(len(training.digits) - len(judge.digits)) <= 1
    counts = [half.digits.bincount() for half in (training, judge)]
    assert (counts[0] - counts[1]).abs().max() <= 1


def test_the_shipped_start_is_good_but_not_finished(model):
    assert SHIPPED.stat().st_size <= 3_000_000
    prompts = digits.prompts() * 60
    judge = DigitJudge()
    assert 0.60 <= judge.accuracy(euler_samples(model, prompts), prompts) <= 0.85
    guided = judge.accuracy(euler_samples(model, prompts, scale=2.0), prompts)
    assert guided > 0.9  # the empty prompt is a real negative


def test_the_other_phrasings_work_too(model):
    judge = DigitJudge()
    for start in (10, 20):
        prompts = all_prompts()[start : start + 10] * 40
        assert 0.55 <= judge.accuracy(euler_samples(model, prompts), prompts) <= 0.9


def test_pretraining_repeats_itself_and_learns(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    seen: list[tuple[int, float]] = []
    losses = [
        pretrain(tmp_path / f"{name}.safetensors", seed=seed, num_steps=12, on_step=lambda *s: seen.append(s))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1] != losses[2]
    assert [step for step, _ in seen] == list(range(12)) * 3
    assert seen[11][1] < seen[0][1]
    a, b, c = (load_file(tmp_path / f"{name}.safetensors") for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["words.weight"], c["words.weight"])
    with pytest.raises(ValueError, match="num_steps"):
        pretrain(tmp_path / "d.safetensors", num_steps=0)
    with pytest.raises(ValueError, match="folder"):
        pretrain(tmp_path / "nowhere" / "d.safetensors", num_steps=1)
