"""LeapAlign: two leaps against the worked case and a hand-written graph, what is stored, and two steps of a run."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from flowgrpo_fast.models.digits import DigitsModel, shipped
from flowgrpo_fast.models.loading import load_model
from flowgrpo_fast.models.network import ModelSetup, Network
from flowgrpo_fast.objectives.objective import Requires
from flowgrpo_fast.objectives.reward_gradient import LeapAlign, Leaps
from flowgrpo_fast.recipe import RandomPair
from flowgrpo_fast.recipes import RECIPES
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import train_step
from flowgrpo_fast.types import FlowModel, Predicted
from tests.methods.runs import CPU, assert_resumes, batch_of, gradients, refused, small, trained_by_command
from tests.models import tiny

ALONE = ("group_size=1", "num_prompts=4")


def leap(*changes: str):
    return small("leap_align", *ALONE, *changes)


# ------------------------------------------------------------------------------------ the worked case


def toy(given, alpha: float | None = None, j: int | None = None, k: int | None = None):
    """The worked case's toy network, its walk in plain torch, and the product's loss on two of the walk's states."""
    weight, slope = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in given["params"])
    sigmas = torch.tensor(given["schedule"], dtype=torch.float64)
    k, j = given["k"] if k is None else k, given["j"] if j is None else j
    states = [torch.tensor(given["x_T"], dtype=torch.float64)[:, None]]

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(weight * x) + slope * sigma

    with torch.no_grad():
        for s, t in pairwise(sigmas):
            states.append(states[-1] + (t - s) * velocity(states[-1], s))
    seen = {}

    class Toy:
        def trained(self, latents: Tensor, sigma: Tensor, unconditional: Tensor | None = None) -> Predicted:
            seen.setdefault("inputs", []).append(latents)
            return Predicted(velocity(latents, sigma.view(-1, 1)))

        def reward(self, x0: Tensor) -> Tensor:
            seen["x0"] = x0
            return -(x0[:, 0] - 0.3).square()

    def state(step: int) -> SimpleNamespace:
        return SimpleNamespace(latents=states[step], sigma=sigmas[step].expand(len(states[step])))

    part = LeapAlign(
        alpha=given["alpha"] if alpha is None else alpha, threshold=given["threshold"], tau=given["tau"]
    )
    stats = part.measure(Leaps(state(k), state(j), states[-1]), Toy())
    terms = part.loss(stats, torch.zeros(0))
    gradient = torch.stack(torch.autograd.grad(terms.loss.mean(), (weight, slope)))
    return SimpleNamespace(stats=stats, terms=terms, gradient=gradient, states=states, seen=seen)


def test_worked_case(methods) -> None:
    given, expected = methods["leapalign"]["inputs"], methods["leapalign"]["expected"]
    got = toy(given)
    np.testing.assert_allclose(torch.stack(got.states)[:, :, 0], expected["states"], rtol=1e-12)
    np.testing.assert_allclose(got.stats["gap"], expected["weight_denominator"], atol=1e-9)
    assert got.terms.loss.mean().item() == pytest.approx(expected["loss"], abs=1e-6)
    np.testing.assert_allclose(got.gradient, expected["grad"], atol=1e-6)


def test_values_are_the_walks_own(methods) -> None:
    """What the network is asked at and what is rewarded are the stored states, whatever the leaps say."""
    given = methods["leapalign"]["inputs"]
    got = toy(given)
    torch.testing.assert_close(got.seen["inputs"][0], got.states[given["k"]], rtol=0, atol=0)
    torch.testing.assert_close(got.seen["inputs"][1], got.states[given["j"]])
    torch.testing.assert_close(got.seen["x0"], got.states[-1])


def test_alpha_scales_the_nested_gradient_linearly(methods) -> None:
    given = methods["leapalign"]["inputs"]
    none, part, whole = (toy(given, alpha) for alpha in (0.0, 0.3, 1.0))
    assert not torch.allclose(none.gradient, whole.gradient, rtol=1e-3)
    torch.testing.assert_close(part.gradient, none.gradient + 0.3 * (whole.gradient - none.gradient))
    torch.testing.assert_close(none.terms.loss, whole.terms.loss)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_from_the_last_step_the_second_leap_is_the_real_one(methods, k: int) -> None:
    """Then it lands on x0: its distance is the floor, and between neighbours the first leap's is as well."""
    given = methods["leapalign"]["inputs"]
    tau = given["tau"]
    gap = toy(given, k=k, j=3).stats["gap"] - tau
    if k == 2:  # neighbours: the leap is the step
        torch.testing.assert_close(gap, torch.full_like(gap, tau))
    else:
        assert (gap >= tau - 1e-12).all()
        assert (gap > tau).any()


# ----------------------------------------------------------------- against a graph written out by hand


def by_hand(engine, batch, alpha: float, threshold: float, tau: float) -> list[Tensor]:
    """The gradient of the mean loss over the batch, in fp64, of two leaps written out as autograd sees them."""
    module = engine.model.module.double()
    earlier, later = batch.samples.transitions
    x_k, x_j, x_0 = (x.double() for x in (earlier.latents, later.latents, batch.samples.x0))
    s_k, s_j = (t.sigma[0].double() for t in (earlier, later))
    embeds = batch.conditioning.prompt_embeds.double()
    pooled = batch.conditioning.pooled_prompt_embeds.double()

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return module(x, sigma.expand(len(x)), embeds, pooled)

    hat_j = x_k - (s_k - s_j) * velocity(x_k, s_k)
    moved = hat_j + (x_j - hat_j).detach()
    inner = x_j.clone().requires_grad_()  # the network's input: its gradient is scaled by hand
    v_j = velocity(inner, s_j)
    hat_0 = moved - s_j * v_j
    d_j = (hat_j - x_j).abs().flatten(1).mean(1).clamp(min=tau).detach()
    d_0 = (hat_0 - x_0).abs().flatten(1).mean(1).clamp(min=tau).detach()
    final = x_0.clone().requires_grad_()
    images = (final * 0.5 + 0.5).clamp(0, 1)
    rewards = sum(
        term.weight * term.score(SimpleNamespace(images=images.float(), prompts=list(batch.prompts.prompts)))
        for term in engine.recipe.task.rewards
    )
    loss = (torch.relu(threshold - rewards) / (d_j + d_0)).mean()
    (at_end,) = torch.autograd.grad(loss, final)  # d loss / d x0
    parameters = [p for p in module.parameters() if p.requires_grad]
    # Through the second leap's weights, and back to its input.
    *second, at_input = torch.autograd.grad(
        -(s_j * v_j), [*parameters, inner], at_end, allow_unused=True, retain_graph=True
    )
    first = torch.autograd.grad(hat_j, parameters, at_end + alpha * at_input, allow_unused=True)
    return [
        sum((g for g in pair if g is not None), torch.zeros_like(p))
        for p, pair in zip(parameters, zip(second, first, strict=True), strict=True)
    ]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_gradient_of_a_step_is_that_of_two_leaps_by_hand(alpha: float) -> None:
    recipe = leap(f"objective.alpha={alpha}", "objective.tau=0.02", "optimizer.max_grad_norm=1e9")
    got, _ = gradients(recipe)
    engine = build_engine(recipe, CPU)
    expected = by_hand(engine, batch_of(engine), alpha, recipe.objective.threshold, 0.02)
    scale = max(float(g.abs().max()) for g in expected)
    for own, other in zip(got, expected, strict=True):
        torch.testing.assert_close(own.double(), other, rtol=1e-3, atol=1e-5 * scale)


def test_micro_batches_do_not_matter() -> None:
    one, _ = gradients(leap(), rows=1)
    every, _ = gradients(leap(), rows=4)
    for a, b in zip(one, every, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_with_guidance_the_leaps_are_the_guided_ones() -> None:
    """The walk is guided: neighbouring states are a step of the guided velocity apart, and the gap is the floor."""
    recipe = leap("guidance_scale=2.5", "topology.at.low=8", "topology.at.high=10", "objective.tau=1e-7")
    _, metrics = gradients(recipe)
    assert metrics["gap"] < 1e-5
    assert metrics["network_evaluations"] == 4 * 2 * (10 + 2)
    assert metrics["network_backwards"] == 4 * 2


# --------------------------------------------------------------------------------------- what is kept


def test_two_states_are_kept_and_nothing_else() -> None:
    engine = build_engine(leap(), CPU)
    batch = batch_of(engine)
    latents = batch.samples.x0.numel()
    kept = batch.samples.transitions
    assert len(kept) == 2
    assert [t.latents.numel() for t in kept] == [latents, latents]
    assert [t.next_latents.numel() for t in kept] == [0, 0]
    assert all(t.unconditional is None for t in kept)
    storages = {t.latents.untyped_storage().data_ptr() for t in kept}
    assert len(storages) == 2


def test_pairs_are_uniform() -> None:
    window = RECIPES["leap_align"].make().topology.at
    drawn = [window.steps(5, iteration, 0).kept for iteration in range(4000)]
    pairs = {(k, j): drawn.count((k, j)) for k in range(5) for j in range(k + 1, 5)}
    assert sum(pairs.values()) == 4000
    deviation = math.sqrt(4000 * 0.1 * 0.9)
    assert all(abs(count - 400) < 5 * deviation for count in pairs.values()), pairs


def test_the_decoding_is_computed_again_in_the_backward(tmp_path: Path, monkeypatch) -> None:
    """Of an autoencoder: nothing of its activations is held from the forward to the backward."""
    path = tiny.make("sd3", tmp_path / "sd3")
    setup = ModelSetup(network=Network(path=str(path), height=16, width=16), precision="fp32", seed=0)
    model = load_model("sd3", CPU, setup)
    calls = []
    decode = type(model).decode_latents
    monkeypatch.setattr(
        type(model),
        "decode_latents",
        lambda self, x: calls.append(torch.is_grad_enabled()) or decode(self, x),
    )
    latents = torch.randn(2, *model.latent_shape, requires_grad=True)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        images = model.decode_with_grad(latents)
    first = len(calls)
    assert first > 0
    assert max(held) <= max(latents.numel(), images.numel())
    images.sum().backward()
    assert len(calls) == 2 * first
    assert latents.grad is not None


# --------------------------------------------------------------------------------------- in training


def test_defaults_are_the_papers() -> None:
    recipe = RECIPES["leap_align"].make()
    part = recipe.objective
    assert (part.alpha, part.threshold, part.tau) == (0.3, 0.55, 0.1)
    assert (recipe.num_prompts, recipe.group_size, recipe.num_steps) == (64, 1, 300)
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.optimizer.ema_decay) == (
        1e-5,
        1e-4,
        0.995,
    )
    assert recipe.sigmas.num_inference_steps == 25
    assert recipe.network.embedded_guidance == 3.5
    assert part.requires == Requires(states=True, reward_gradient=True)


def test_network_evaluations() -> None:
    """A sample: T without gradient, and the two leaps again with it."""
    metrics = train_step(build_engine(leap(), CPU)).metrics
    assert metrics["network_evaluations"] == 4 * (10 + 2)
    assert metrics["network_backwards"] == 4 * 2


def test_a_reward_above_the_threshold_teaches_nothing() -> None:
    got, metrics = gradients(leap("objective.threshold=-1000"))
    assert metrics["loss"] == 0
    assert all(not g.any() for g in got)


def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    assert_resumes(leap("optimizer.lr=0.001"), tmp_path)


def test_two_steps_of_the_command_line(tmp_path: Path) -> None:
    lines = trained_by_command("leap_align", tmp_path / "run", *ALONE)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(np.isfinite(list(line.values())).all() for line in lines)


# ---------------------------------------------------------------------------- what cannot be together


def detached(images: Tensor, prompts: list[str]) -> Tensor:
    return images.detach().flatten(1).mean(1)


def unmoved(images: Tensor, prompts: list[str]) -> Tensor:
    """With a gradient, of something else."""
    return torch.zeros(len(images), requires_grad=True) + 0


class NoDecoder(DigitsModel):
    def decode_with_grad(self, latents: Tensor) -> Tensor:
        return FlowModel.decode_with_grad(self, latents)

    def decode(self, latents: Tensor) -> Tensor:
        return (latents.float() * 0.5 + 0.5).clamp(0.0, 1.0)


def load_without_decoder(device: torch.device, setup: ModelSetup) -> NoDecoder:
    return NoDecoder(shipped(device).module)


def reward(**fields: object) -> str:
    return f"task.rewards={json.dumps([{'is': 'RewardTerm', **fields}])}"


INK = "flowgrpo_fast.rewards.rules:ink_contrast"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([reward(function=INK)], "'flowgrpo_fast.rewards.rules:ink_contrast' is not marked differentiable"),
        (
            [reward(function=INK, differentiable=True, where="thread")],
            "no gradient comes back from; use 'here'",
        ),
        ([reward(function=f"{__name__}:detached", differentiable=True)], "its scores carry no gradient"),
        ([reward(function=f"{__name__}:unmoved", differentiable=True)], "does not reach the latents"),
        ([f"task.model={__name__}:load_without_decoder"], "decodes without gradient"),
        (["topology.at=AllSteps"], "use Independent(at=RandomPair())"),
        (["topology.at=Deterministic"], "use Independent(at=RandomPair())"),
        (["objective.alpha=1.5"], "LeapAlign.alpha is 1.5; it must be in [0, 1]"),
        (["topology.at.low=9"], "leaves no two of the 10 steps"),
    ],
)
def test_refusals_are_one_line(capsys, tmp_path: Path, words: list[str], message: str) -> None:
    error = refused(capsys, "leap_align", *ALONE, *words, "--out", str(tmp_path / "run"))
    assert message in error
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_a_pair_needs_two_steps() -> None:
    with pytest.raises(ValueError, match=r"RandomPair.high is 3; it must be at least low \+ 2 = 4"):
        RandomPair(low=2, high=3)
