"""DiffusionNFT's loss against its definition on x0 predictions, in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowgrpo_fast.objectives.forward import forward_process
from flowgrpo_fast.objectives.nft import NFT
from flowgrpo_fast.objectives.snapshots import Frozen, Moment, Ramp
from flowgrpo_fast.ops import philox_normal
from flowgrpo_fast.schedule.topology import ode_plan
from flowgrpo_fast.types import Batch, Choices, Conditioning, Credit, Draws, PromptSet, Trajectory

ROWS = 7


def case(seed: int = 0, rows: int = ROWS, shape=(3, 4, 5)):
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randn(rows, *shape, generator=g)
    sigma = torch.rand(rows, generator=g).clamp_min(0.01)
    latents, target = forward_process(x0, torch.arange(rows), sigma, torch.arange(rows) % 3)
    velocity, old, reference = (target + 0.3 * torch.randn(rows, *shape, generator=g) for _ in range(3))
    good = torch.rand(rows, generator=g)
    return x0, sigma, latents, target, velocity.requires_grad_(), old, reference, good


@pytest.fixture
def run(evaluator, noised):
    """The terms of a part, on velocities that were made beforehand; `good` is the optimality probability."""

    def terms(part: NFT, x0, sigma, velocity, old, good, reference=None):
        networks = evaluator(velocity, {"old": old, "start": reference})
        point = noised(x0, sigma, torch.arange(ROWS), torch.arange(ROWS) % 3)
        stats = part.measure(point, networks)
        wanted, _ = forward_process(x0, torch.arange(ROWS), sigma, torch.arange(ROWS) % 3)
        assert all(torch.equal(latents, wanted) for _, latents, _ in networks.asked)
        assert [name for name, *_ in networks.asked].count("start") == (reference is not None)
        return part.loss(stats, (2 * good - 1) * part.most)

    return terms


def written_out(x0, sigma, latents, velocity, old, reference, good, part, clip):
    """algorithms as published: x0 predictions of both implicit policies, self-normalised."""
    x0, sigma, latents, velocity, old, reference, good = (
        t.double() for t in (x0, sigma, latents, velocity, old, reference, good)
    )
    sigma = sigma.view(-1, 1, 1, 1)
    sides = []
    for implicit in (
        part.beta * velocity + (1 - part.beta) * old,
        (1 + part.beta) * old - part.beta * velocity,
    ):
        difference = latents - sigma * implicit - x0
        weight = difference.detach().abs().flatten(1).mean(1).clamp_min(1e-5)
        sides.append(difference.square().flatten(1).mean(1) / weight)
    policy = good * sides[0] / part.beta + (1 - good) * sides[1] / part.beta
    return clip * policy + part.kl_beta * (velocity - reference).square().flatten(1).mean(1), sides


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("kl_beta", [0.0, 0.5])
def test_loss_and_gradient_are_those_of_the_definition(run, beta: float, kl_beta: float) -> None:
    x0, sigma, latents, _, velocity, old, reference, good = case()
    part = NFT(beta=beta, kl_beta=kl_beta)
    terms = run(part, x0, sigma, velocity, old, good, reference if kl_beta else None)
    (mine,) = torch.autograd.grad(terms.loss.sum(), velocity)
    expected, (positive, negative) = written_out(
        x0, sigma, latents, velocity, old, reference, good, part, 5.0
    )
    (gradient,) = torch.autograd.grad(expected.sum(), velocity)
    torch.testing.assert_close(terms.loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine, gradient.float(), rtol=1e-4, atol=1e-7)
    shown = terms.shown
    torch.testing.assert_close(shown["positive_loss"].double(), positive.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shown["negative_loss"].double(), negative.detach(), rtol=1e-5, atol=1e-6)
    drift = (velocity - reference).square().flatten(1).mean(1).detach()
    torch.testing.assert_close(shown["kl"], drift if kl_beta else torch.zeros(ROWS))


def test_on_policy_good_samples_attract_bad_ones_repel_and_average_ones_rest(run) -> None:
    """At v = old the gradient is (2 r - 1) times that of a good sample: it points to the sample, or away."""
    x0, sigma, _, target, velocity, _, _, _ = case()
    old = velocity.detach().clone()
    gradients = {}
    for r in (0.0, 0.5, 0.9, 1.0):
        loss = run(NFT(), x0, sigma, velocity, old, torch.full((ROWS,), r)).loss.sum()
        (gradients[r],) = torch.autograd.grad(loss, velocity)
    assert ((old - target) * gradients[1.0]).flatten(1).sum(1).min() > 0
    torch.testing.assert_close(gradients[0.0], -gradients[1.0])
    torch.testing.assert_close(gradients[0.9], 0.8 * gradients[1.0])
    assert gradients[0.5].abs().max() < 1e-6 * gradients[1.0].abs().max()


def test_a_perfect_prediction_is_finite(run) -> None:
    """The divisor's floor: no residual, no division by 0."""
    x0, sigma, _, target, _, _, _, good = case()
    velocity = target.clone().requires_grad_()
    terms = run(NFT(), x0, sigma, velocity, target, good)
    terms.loss.sum().backward()
    assert terms.loss.abs().max() == 0
    assert velocity.grad.abs().max() == 0


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_advantages_become_optimality_probabilities(beta: float) -> None:
    """With L(v+) = 1 and L(v-) = 0 the loss is most / beta times the probability."""
    advantages = torch.tensor([-9.0, -5.0, -1.0, 0.0, 2.5, 5.0, 7.0])
    sides = {"positive": torch.ones(7), "negative": torch.zeros(7)}
    r = NFT(beta=beta).loss(sides, advantages).loss * beta / 5.0
    torch.testing.assert_close(r, torch.tensor([0.0, 0.0, 0.4, 0.5, 0.75, 1.0, 1.0]))
    doubled = NFT(beta=beta, most=10.0).loss(sides, 2 * advantages).loss * beta / 10.0
    torch.testing.assert_close(doubled, r)


def test_the_forward_process_has_a_noise_of_its_own_for_every_sample_and_sigma() -> None:
    x0, seed = torch.ones(4, 6), torch.tensor([3, 3, 4, 4])
    sigma, step = torch.tensor([1.0, 0.25, 1.0, 0.5]), torch.tensor([0, 1, 0, 0])
    latents, target = forward_process(x0, seed, sigma, step)
    noise = philox_normal(seed, (6,), step=step, stream=2)
    torch.testing.assert_close(latents, (1 - sigma)[:, None] + sigma[:, None] * noise)
    torch.testing.assert_close(latents - sigma[:, None] * target, x0)  # the target recovers the sample
    assert torch.equal(latents[0], noise[0])
    assert torch.equal(noise[2], noise[3])  # same seed and step
    assert not torch.isin(noise[:3], philox_normal(seed, (6,), step=step)).any()  # not the steps' noise
    assert len(noise.unique(dim=0)) == 3


def test_the_old_policy_follows_the_published_schedules() -> None:
    def kept(rule: Ramp, step: int) -> float | None:
        return rule.keep(Moment(step=step, num_updates=2 * step, ends_step=True, metrics={}))

    slow = Ramp(start=75, rate=0.0075, most=0.999)
    assert [kept(slow, n) for n in (1, 75, 76, 175, 1000)] == [
        0.0,
        0.0,
        0.0075,
        0.75,
        0.999,
    ]
    assert NFT().old == Ramp()
    assert [kept(Ramp(), n) for n in (1, 100, 500, 1000)] == [0.001, 0.1, 0.5, 0.5]
    assert kept(Ramp(most=0.0), 50) == 0.0
    assert Ramp().keep(Moment(step=0, num_updates=3, ends_step=False, metrics={})) is None


def test_a_kl_needs_a_reference() -> None:
    assert NFT(kl_beta=0.1).requires.snapshots == {"old": Ramp(), "start": Frozen()}
    assert NFT().requires.snapshots == {"old": Ramp()}
    for part in (NFT(), NFT(kl_beta=0.1)):
        assert part.requires.sampled_by == "old"
        assert part.requires.no_guidance
        assert not part.requires.log_probs


def batch(num_samples: int, num_steps: int, seed: int = 5) -> Batch:
    plan = ode_plan(np.linspace(1, 0, num_steps + 1), group_size=num_samples)
    seeds = torch.arange(num_samples)
    draws = Draws(prompt_index=torch.zeros(1), group_id=0 * seeds, seed=seeds + 10, start_seed=seeds)
    x0 = torch.arange(num_samples).float()[:, None]
    return Batch(
        samples=Trajectory(plan=plan, draws=draws, x0=x0, transitions=(), coeffs=plan.coeffs),
        conditioning=Conditioning(torch.zeros(num_samples, 1, 1)),
        credit=Credit(torch.zeros(num_samples), torch.ones(num_samples)),
        live=np.ones(num_samples, dtype=bool),
        choices=Choices(seed, 3, slice(0, num_samples), num_samples),
        prompts=PromptSet(("a",) * num_samples, ({},) * num_samples),
    )


@pytest.mark.parametrize(("fraction", "count"), [(0.99, 9), (1.0, 10), (0.5, 5), (0.01, 1)])
def test_each_sample_is_noised_at_some_of_the_schedules_sigmas(fraction: float, count: int) -> None:
    given = batch(6, 10)
    points = list(NFT(fraction=fraction).points(given))
    assert len(points) == count
    steps = torch.stack([point.step for point in points], 1)  # [B, count]
    assert all(len(row.unique()) == count for row in steps)  # without repetition
    for point in points:
        assert torch.equal(point.sigma, given.samples.plan.sigmas[point.step])
        assert torch.equal(point.x0, given.samples.x0)
        assert point.samples[:, 0].tolist() == list(range(6))
    if 1 < count < 10:
        assert len({tuple(row.tolist()) for row in steps}) > 1  # each sample its own
    # A share of the samples has the choices that it has among all.
    share = list(NFT(fraction=fraction).points(given.of_samples(slice(2, 5))))
    assert torch.equal(torch.stack([point.step for point in share], 1), steps[2:5])
    assert torch.equal(share[0].seed, given.samples.draws.seed[2:5])


def test_a_bad_weight_is_refused() -> None:
    refusals: list[tuple[dict[str, float], str]] = [
        ({"beta": 0}, "NFT.beta is 0; it must be above 0"),
        ({"most": 0}, "NFT.most is 0; it must be above 0"),
        ({"fraction": 0}, r"NFT.fraction is 0; it must be in \(0, 1\]"),
        ({"kl_beta": -1}, "NFT.kl_beta is -1; it must be at least 0"),
    ]
    for fields, message in refusals:
        with pytest.raises(ValueError, match=message) as error:
            NFT(**fields)
        assert "\n" not in str(error.value)
