from __future__ import annotations

import numpy as np
import pytest
import torch

from flowgrpo_fast.objectives.policy_gradient import PolicyGradient
from flowgrpo_fast.objectives.regularizers import TransitionKL, VelocityKL
from flowgrpo_fast.objectives.snapshots import Frozen
from flowgrpo_fast.objectives.surrogates import PathLogProb
from flowgrpo_fast.objectives.trust import Clip
from flowgrpo_fast.ops import Extras, Guidance, flow_log_prob
from flowgrpo_fast.schedule.dynamics import FlowSDE, coefficients


def test_recorded_loss_and_gradient(golden, evaluator, transitions) -> None:
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
        networks = evaluator(
            v, {"start": recorded["vref"]}, coeffs, torch.from_numpy(-np.diff(sigmas)).float()
        )
        point = transitions(tensors["idx"], tensors["x"], tensors["next"], recorded["old_log_prob"])
        part = PolicyGradient(trust=Clip(range=1e-4), regularizers=(TransitionKL(beta=0.04),))
        terms = part.loss(part.measure(point, networks), recorded["adv"])
        loss = terms.loss.mean()
        loss.backward()
        # exp(log_prob - old) amplifies the log-probs' last bits, each of 3e-5 at -262
        slack = 2.5e-7 * float(recorded["old_log_prob"].abs().max()) + 1e-6
        torch.testing.assert_close(terms.shown["ratio_mean"], recorded["ratio"], rtol=0, atol=slack)
        torch.testing.assert_close(
            terms.shown["policy_loss"].mean(), recorded["policy_loss"], rtol=0, atol=slack
        )
        torch.testing.assert_close(terms.shown["kl"].mean(), recorded["kl"], rtol=2e-5, atol=1e-7)
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
    part = PolicyGradient(trust=Clip(range=0.1))
    terms = part.loss({"log_prob": log_prob, "old_log_prob": old}, torch.tensor([advantage]))
    terms.loss.sum().backward()
    assert terms.loss.item() == pytest.approx(loss)
    assert log_prob.grad.item() == pytest.approx(slope)
    assert float(terms.shown["clip_fraction"]) == float(slope == 0.0)
    assert terms.worst["ratio_max"].item() == pytest.approx(np.exp(delta))
    assert part.ratio_range == 0.1


def drift_case():
    """Two velocities of the same latents at four steps, and what the ops measure of them."""
    generator = torch.Generator().manual_seed(0)
    x, v, w = torch.randn(3, 4, 2, 5, 5, generator=generator, dtype=torch.float64)
    sigmas = np.linspace(1, 0, 7)
    coeffs = coefficients(sigmas, [FlowSDE(noise_level=0.5)] * 6)
    index = torch.tensor([0, 2, 3, 4])
    drift = flow_log_prob(x, v, x, coeffs, index, extras=Extras(reference_velocity=w)).drift
    interval = torch.from_numpy(-np.diff(sigmas)).float()
    return (
        x,
        v,
        w,
        sigmas,
        index,
        {"drift/start": drift, "std": coeffs[index, 3], "interval": interval[index]},
    )


def means(x, velocities, sigmas, index):
    """The published transition means, fp64, and the rate q without sqrt(-dt)."""
    s, dt = torch.from_numpy(sigmas)[index], torch.from_numpy(np.diff(sigmas))[index]
    q = 0.5 * torch.sqrt(s / (1 - torch.where(s == 1, torch.tensor(sigmas[1]), s)))
    view = lambda t: t.view(-1, 1, 1, 1)  # noqa: E731
    mean = lambda u: x * view(1 + q**2 / (2 * s) * dt) + u * view((1 + q**2 * (1 - s) / (2 * s)) * dt)  # noqa: E731
    return [mean(u) for u in velocities], q, dt


def test_kl_is_the_published_expression() -> None:
    x, v, w, sigmas, index, stats = drift_case()
    ours = TransitionKL().penalty(stats)
    (mean_v, mean_w), q, _ = means(x, (v, w), sigmas, index)
    expected = (mean_v - mean_w).square().mean((1, 2, 3)) / (2 * q**2)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0)


def test_the_exact_kl_is_that_of_the_two_gaussians() -> None:
    x, v, w, sigmas, index, stats = drift_case()
    ours = TransitionKL(exact=True).penalty(stats)
    (mean_v, mean_w), q, dt = means(x, (v, w), sigmas, index)
    std = (q * torch.sqrt(-dt)).view(-1, 1, 1, 1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean_v, std), normal(mean_w, std)).mean((1, 2, 3))
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0)


def test_a_penalty_of_no_weight_needs_and_asks_for_nothing(evaluator, transitions) -> None:
    quiet = PolicyGradient(regularizers=(TransitionKL(beta=0.0), VelocityKL(beta=0.0)))
    assert quiet.requires == PolicyGradient().requires
    assert quiet.penalties == ()
    loud = PolicyGradient(regularizers=(TransitionKL(beta=0.1), VelocityKL(beta=0.2, to="teacher")))
    assert loud.requires.snapshots == {"start": Frozen(), "teacher": Frozen()}
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    coeffs = coefficients(np.linspace(1, 0, 5), [FlowSDE()] * 4)
    for part, names in ((quiet, ["trained"]), (loud, ["trained", "start", "teacher"])):
        networks = evaluator(x, {"start": x + 1, "teacher": x - 1}, coeffs, torch.full((4,), 0.25))
        point = transitions(torch.tensor([0, 1, 2]), x, x, torch.zeros(3))
        stats = part.measure(point, networks)
        assert [name for name, *_ in networks.asked] == names
        for kind in ("drift/", "distance/"):
            assert {name for name in stats if name.startswith(kind)} == {kind + n for n in names[1:]}


def test_penalties_add_up_by_their_weights() -> None:
    stats = {
        "log_prob": torch.zeros(3),
        "old_log_prob": torch.zeros(3),
        "drift/start": torch.tensor([1.0, 2.0, 3.0]),
        "distance/teacher": torch.tensor([0.5, 0.5, 0.1]),
        "std": torch.tensor([0.5, 0.25, 1.0]),
        "interval": torch.tensor([0.1, 0.2, 0.3]),
    }
    part = PolicyGradient(regularizers=(TransitionKL(beta=0.5), VelocityKL(beta=2.0, to="teacher")))
    terms = part.loss(stats, torch.ones(3))
    kl = np.array([1.0, 2.0, 3.0]) * (0.1, 0.2, 0.3) / (2 * np.array([0.25, 0.0625, 1.0]))
    np.testing.assert_allclose(terms.loss, -1 + 0.5 * kl + 2.0 * np.array([0.5, 0.5, 0.1]), rtol=1e-6)
    np.testing.assert_allclose(terms.shown["policy_loss"], -1, rtol=1e-7)
    np.testing.assert_allclose(terms.shown["kl"], kl + np.array([0.5, 0.5, 0.1]), rtol=1e-6)


@pytest.mark.parametrize("guided", [False, True])
def test_velocity_kl_is_the_distance_of_velocities(evaluator, transitions, guided: bool) -> None:
    """Not that of the transitions' means, which is smaller by the step's coefficient of the velocity, squared."""
    x, v, negative, w, w_negative = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(4))
    coeffs = coefficients(np.linspace(1, 0, 5), [FlowSDE()] * 4)
    guidance = {"trained": Guidance(negative, 3.0), "start": Guidance(w_negative, 3.0)} if guided else None
    networks = evaluator(v.requires_grad_(), {"start": w}, coeffs, torch.full((4,), 0.25), guidance)
    point = transitions(torch.tensor([0, 1, 2]), x, x, torch.zeros(3))
    stats = PolicyGradient(regularizers=(VelocityKL(beta=1.0),)).measure(point, networks)
    ours = VelocityKL().penalty(stats)
    mix = lambda positive, other: other + 3.0 * (positive - other) if guided else positive  # noqa: E731
    expected = (mix(v, negative) - mix(w, w_negative)).square().mean(1)
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(value.sum(), v)[0] for value in (ours, expected)), rtol=2e-5, atol=1e-6
    )


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("fan", [1, 3])
def test_edges_of_a_row_share_its_velocity(evaluator, transitions, fan: int, guided: bool) -> None:
    """Each edge is measured as if its row stood alone, to the bit; a row's gradient is the sum over its edges."""
    generator = torch.Generator().manual_seed(2)
    x, v, negative, w, w_negative = torch.randn(5, 4, 6, generator=generator)
    following = torch.randn(4 * fan, 6, generator=generator)
    coeffs = coefficients(np.linspace(1, 0, 5), [FlowSDE()] * 4)
    row = torch.tensor([0, 1, 2, 1]).repeat_interleave(fan)
    part = PolicyGradient(regularizers=(TransitionKL(beta=0.1),))

    def run(repeat: int):
        wide = lambda t: t.repeat_interleave(repeat, 0)  # noqa: E731
        velocity = wide(v).requires_grad_()
        guidance = (
            {"trained": Guidance(wide(negative), 3.0), "start": Guidance(wide(w_negative), 3.0)}
            if guided
            else None
        )
        networks = evaluator(velocity, {"start": wide(w)}, coeffs, torch.full((4,), 0.25), guidance)
        stats = part.measure(transitions(row, wide(x), following, torch.zeros(4 * fan)), networks)
        (gradient,) = torch.autograd.grad(
            part.loss(stats, torch.linspace(-1, 1, 4 * fan)).loss.sum(), velocity
        )
        return stats, gradient

    (shared, one), (alone, each) = run(1), run(fan)
    assert shared.keys() == alone.keys()
    assert all(torch.equal(shared[name], alone[name]) for name in shared)
    torch.testing.assert_close(one, each.view(4, fan, 6).sum(1), rtol=1e-5, atol=1e-7)


def test_what_was_sampled_is_replayed_at_a_ratio_of_exactly_one(evaluator, transitions) -> None:
    generator = torch.Generator().manual_seed(3)
    x, v, following = torch.randn(3, 5, 8, generator=generator)
    coeffs = coefficients(np.linspace(1, 0, 6), [FlowSDE()] * 5)
    row = torch.arange(4).repeat(2)[:5]
    old = flow_log_prob(x, v, following, coeffs, row)
    stats = PathLogProb().measure(transitions(row, x, following, old), evaluator(v, {}, coeffs), ())
    assert torch.equal(PolicyGradient().log_ratio(stats), torch.zeros(5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clip(range=0), "Clip.range is 0; it must be above 0"),
        (lambda: Clip(upper=-1), "Clip.upper is -1; it must be at least 0"),
        (lambda: TransitionKL(beta=-1), "TransitionKL.beta is -1; it must be at least 0"),
        (lambda: VelocityKL(beta=-1), "VelocityKL.beta is -1; it must be at least 0"),
    ],
)
def test_refusals_name_value_and_remedy(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("upper", [0.0, 0.3])
def test_a_clip_may_reach_further_up_than_down(upper: float) -> None:
    ratio = torch.tensor([0.8, 0.95, 1.05, 1.2, 1.4], dtype=torch.float64)
    for advantage in (1.0, -1.0):
        worth = torch.full((5,), advantage, dtype=torch.float64)
        loss, _, clipped = Clip(range=0.1, upper=upper)(ratio.log(), worth)
        high = 1 + (upper or 0.1)
        expected = [max(-advantage * r, -advantage * min(max(r, 0.9), high)) for r in ratio.tolist()]
        torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
        acts = [(r > high if advantage > 0 else r < 0.9) for r in ratio.tolist()]
        assert clipped.bool().tolist() == acts
