from __future__ import annotations

import numpy as np
import pytest
import torch
from flowgrpo_fast.losses.clipped_ratio import clipped_ratio, drift_kl
from flowgrpo_fast.sampling.dynamics import coefficients

from flowgrpo_fast.ops import Extras, flow_log_prob
from flowgrpo_fast.recipe import ClippedRatio, FlowSDE


def test_recorded_loss_and_gradient(golden) -> None:
    """Flow-GRPO's clipped loss (1e-4) + 0.04 KL, and d loss / d velocity, on its recorded cases."""
    cases = [case for case in ("c0", "c1", "c2") if f"{case}_loss_loss" in golden]
    assert cases
    for case in cases:
        sigmas = golden[f"{case}_sigmas"].astype(np.float64)
        rule = FlowSDE(noise_level=float(golden[f"{case}_noise_level"]))
        coeffs = coefficients(sigmas, [rule] * (len(sigmas) - 1))
        tensors = {k: torch.from_numpy(golden[f"{case}_{k}"]) for k in ("x", "v", "next", "idx")}
        recorded = {
            k.removeprefix(f"{case}_loss_"): torch.from_numpy(golden[k])
            for k in golden
            if k.startswith(f"{case}_loss_")
        }
        v = tensors["v"].requires_grad_(True)
        extras = Extras(reference_velocity=recorded["vref"])
        log_prob, _, drift, _ = flow_log_prob(
            tensors["x"], v, tensors["next"], coeffs, tensors["idx"], extras=extras
        )
        kl = drift_kl(drift, coeffs, torch.from_numpy(sigmas).float(), tensors["idx"])
        part = ClippedRatio(clip_range=1e-4, kl_beta=0.04)
        terms = clipped_ratio(log_prob, recorded["old_log_prob"], recorded["adv"], part, kl)
        loss = terms.loss.mean()
        loss.backward()
        # exp(log_prob - old) amplifies the log-probs' last bits, each of 3e-5 at -262
        slack = 2.5e-7 * float(recorded["old_log_prob"].abs().max()) + 1e-6
        torch.testing.assert_close(terms.ratio, recorded["ratio"], rtol=0, atol=slack)
        torch.testing.assert_close(terms.policy.mean(), recorded["policy_loss"], rtol=0, atol=slack)
        torch.testing.assert_close(terms.kl.mean(), recorded["kl"], rtol=2e-5, atol=1e-7)
        torch.testing.assert_close(loss.detach(), recorded["loss"], rtol=0, atol=slack)
        scale = float(recorded["grad_v"].abs().max())
        torch.testing.assert_close(v.grad, recorded["grad_v"], rtol=1e-4, atol=2e-5 * scale)


@pytest.mark.parametrize(
    ("delta", "advantage", "loss", "slope"),
    [
        (0.0, 2.0, -2.0, -2.0),  # on policy: plain policy gradient
        (0.3, 2.0, -2.2, 0.0),  # already better than the clip allows: no more push
        (-0.3, 2.0, -2.0 * np.exp(-0.3), -2.0 * np.exp(-0.3)),
        (-0.3, -2.0, 1.8, 0.0),
        (0.3, -2.0, 2.0 * np.exp(0.3), 2.0 * np.exp(0.3)),
    ],
)
def test_the_clip_stops_exactly_the_steps_that_went_far_enough(delta, advantage, loss, slope) -> None:
    log_prob = torch.tensor([delta - 1.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0], dtype=torch.float64)
    terms = clipped_ratio(log_prob, old, torch.tensor([advantage]), ClippedRatio(clip_range=0.1))
    terms.loss.sum().backward()
    assert terms.loss.item() == pytest.approx(loss)
    assert log_prob.grad.item() == pytest.approx(slope)
    assert float(terms.clipped) == float(slope == 0.0)


def test_kl_is_the_published_expression() -> None:
    generator = torch.Generator().manual_seed(0)
    x, v, w = torch.randn(3, 4, 2, 5, 5, generator=generator, dtype=torch.float64)
    sigmas = np.linspace(1, 0, 7)
    coeffs = coefficients(sigmas, [FlowSDE(noise_level=0.5)] * 6)
    index = torch.tensor([0, 2, 3, 4])
    drift = flow_log_prob(x, v, x, coeffs, index, extras=Extras(reference_velocity=w)).drift
    ours = drift_kl(drift, coeffs, torch.from_numpy(sigmas).float(), index)
    s, dt = torch.from_numpy(sigmas)[index], torch.from_numpy(np.diff(sigmas))[index]
    q = 0.5 * torch.sqrt(s / (1 - torch.where(s == 1, torch.tensor(sigmas[1]), s)))
    view = lambda t: t.view(-1, 1, 1, 1)  # noqa: E731
    mean = lambda u: x * view(1 + q**2 / (2 * s) * dt) + u * view((1 + q**2 * (1 - s) / (2 * s)) * dt)  # noqa: E731
    expected = (mean(v) - mean(w)).square().mean((1, 2, 3)) / (2 * q**2)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0)
