"""DiffusionNFT's loss against its definition on x0 predictions, in fp64."""

from __future__ import annotations

import pytest
import torch
from flowgrpo_fast.losses.nft import forward_process, nft, old_decay, optimality

from flowgrpo_fast.ops import philox_normal
from flowgrpo_fast.recipe import NFT


def case(seed: int = 0, rows: int = 7, shape=(3, 4, 5)):
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randn(rows, *shape, generator=g)
    sigma = torch.rand(rows, generator=g).clamp_min(0.01)
    latents, target = forward_process(x0, torch.arange(rows), sigma, torch.arange(rows) % 3)
    velocity, old, reference = (target + 0.3 * torch.randn(rows, *shape, generator=g) for _ in range(3))
    good = torch.rand(rows, generator=g)
    return x0, sigma, latents, target, velocity.requires_grad_(), old, reference, good


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
def test_loss_and_gradient_are_those_of_the_definition(beta: float, kl_beta: float) -> None:
    x0, sigma, latents, target, velocity, old, reference, good = case()
    part = NFT(beta=beta, kl_beta=kl_beta)
    terms = nft(velocity, old, target, sigma, good, part, 5.0, reference if kl_beta else None)
    (mine,) = torch.autograd.grad(terms.loss.sum(), velocity)
    expected, (positive, negative) = written_out(
        x0, sigma, latents, velocity, old, reference, good, part, 5.0
    )
    (gradient,) = torch.autograd.grad(expected.sum(), velocity)
    torch.testing.assert_close(terms.loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine, gradient.float(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(terms.positive.double(), positive.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.negative.double(), negative.detach(), rtol=1e-5, atol=1e-6)
    drift = (velocity - reference).square().flatten(1).mean(1).detach()
    torch.testing.assert_close(terms.kl, drift if kl_beta else torch.zeros(7))


def test_on_policy_good_samples_attract_bad_ones_repel_and_average_ones_rest() -> None:
    """At v = old the gradient is (2 r - 1) times that of a good sample: it points to the sample, or away."""
    _, sigma, _, target, velocity, _, _, _ = case()
    old = velocity.detach().clone()
    gradients = {}
    for r in (0.0, 0.5, 0.9, 1.0):
        good = torch.full((7,), r)
        loss = nft(velocity, old, target, sigma, good, NFT(), 5.0).loss.sum()
        (gradients[r],) = torch.autograd.grad(loss, velocity)
    assert ((old - target) * gradients[1.0]).flatten(1).sum(1).min() > 0
    torch.testing.assert_close(gradients[0.0], -gradients[1.0])
    torch.testing.assert_close(gradients[0.9], 0.8 * gradients[1.0])
    assert gradients[0.5].abs().max() < 1e-6 * gradients[1.0].abs().max()


def test_a_perfect_prediction_is_finite() -> None:
    """The divisor's floor: no residual, no division by 0."""
    _, sigma, _, target, _, _, _, good = case()
    velocity = target.clone().requires_grad_()
    terms = nft(velocity, target, target, sigma, good, NFT(), 5.0)
    terms.loss.sum().backward()
    assert terms.loss.abs().max() == 0
    assert velocity.grad.abs().max() == 0


def test_optimality_maps_advantages_to_probabilities() -> None:
    r = optimality(torch.tensor([-9.0, -5.0, -1.0, 0.0, 2.5, 5.0, 7.0]), 5.0)
    torch.testing.assert_close(r, torch.tensor([0.0, 0.0, 0.4, 0.5, 0.75, 1.0, 1.0]))


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
    slow = NFT(old_decay_start=75, old_decay_rate=0.0075, old_decay_max=0.999)
    assert [old_decay(slow, n) for n in (1, 75, 76, 175, 1000)] == [
        0.0,
        0.0,
        0.0075,
        0.75,
        0.999,
    ]
    assert [old_decay(NFT(), n) for n in (1, 100, 500, 1000)] == [0.001, 0.1, 0.5, 0.5]
    assert old_decay(NFT(old_decay_max=0.0), 50) == 0.0


def test_a_kl_needs_a_reference() -> None:
    _, sigma, _, target, velocity, old, _, good = case()
    with pytest.raises(ValueError, match=r"NFT.kl_beta is 0.1, but there is no reference"):
        nft(velocity, old, target, sigma, good, NFT(kl_beta=0.1), 5.0)
