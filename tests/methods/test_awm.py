"""AWM: its surrogate against the worked case, where it noises, what it costs, and two steps of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

from flowgrpo_fast.credit.shape import Bound
from flowgrpo_fast.objectives.forward import forward_process
from flowgrpo_fast.objectives.forward_error import ForwardError
from flowgrpo_fast.objectives.policy_gradient import PolicyGradient
from flowgrpo_fast.objectives.regularizers import VelocityKL
from flowgrpo_fast.objectives.snapshots import Moment
from flowgrpo_fast.objectives.trust import Clip
from flowgrpo_fast.recipes import RECIPES
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.learner import Counts, networks
from flowgrpo_fast.training.loop import train_step
from flowgrpo_fast.types import Choices, Credit
from tests.methods.runs import CPU, assert_resumes, batch_of, gradients, small, trained_by_command


@pytest.mark.parametrize(
    ("weighting", "name"),
    [("uniform", "uniform"), ("sigma", "t"), ("sigma2", "t2"), ("huber", "huber"), ("ghuber", "ghuber")],
)
def test_pseudo_log_probs_of_the_worked_case(methods, weighting: str, name: str) -> None:
    given, expected = methods["awm"]["inputs"], methods["awm"]["expected"]
    error, sigma = (torch.tensor(given[key], dtype=torch.float64) for key in ("err", "t"))
    log_prob = -ForwardError(weighting=weighting, power=0.25).weigh(error, sigma)
    np.testing.assert_allclose(log_prob, expected[name], rtol=1e-9)


def worked(methods):
    """Stats of the worked case with a leaf error, and the credit that the recipe's own bound gives."""
    given = methods["awm"]["inputs"]
    error, old, sigma, raw = (
        torch.tensor(given[key], dtype=torch.float64) for key in ("err", "err_old", "t", "A_raw")
    )
    surrogate = ForwardError()
    error.requires_grad_()
    stats = {
        "log_prob": -surrogate.weigh(error, sigma),
        "old_log_prob": -surrogate.weigh(old, sigma),
    }
    bound = Bound(limit=5.0, to=given["advantage_max"])
    credit = bound(Credit(raw, torch.ones_like(raw)), None)
    return error, stats, credit.advantages, Clip(range=given["clip"])


def test_loss_and_gradient_of_the_worked_case(methods) -> None:
    error, stats, advantages, trust = worked(methods)
    loss = PolicyGradient(surrogate=ForwardError(), trust=trust).loss(stats, advantages).loss.mean()
    loss.backward()
    expected = methods["awm"]["expected"]
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-6)
    np.testing.assert_allclose(error.grad, expected["grad"], atol=1e-6)


def test_sum_first_is_one_ratio_of_the_mean_over_noisings(methods) -> None:
    """The worked case's two rows as two noisings of one sample, beside the formula written out."""
    error, stats, advantages, trust = worked(methods)
    part = PolicyGradient(surrogate=ForwardError(ratio="sum_first"), trust=trust)
    assert part.couples
    assert not PolicyGradient(surrogate=ForwardError()).couples
    terms = part.loss({name: values[None] for name, values in stats.items()}, advantages[:1])
    (gradient,) = torch.autograd.grad(terms.loss.sum(), error, retain_graph=True)
    ratio = torch.exp((stats["log_prob"] - stats["old_log_prob"]).mean())
    (expected,) = torch.autograd.grad(-advantages[0] * ratio, error)
    torch.testing.assert_close(terms.loss[0], -advantages[0] * ratio)
    torch.testing.assert_close(gradient, expected)


def test_sum_first_refuses_an_advantage_for_each_noising() -> None:
    stats = {name: torch.zeros(2, 3) for name in ("log_prob", "old_log_prob")}
    with pytest.raises(ValueError, match="one ratio for all points of a sample"):
        PolicyGradient(surrogate=ForwardError(ratio="sum_first")).loss(stats, torch.zeros(2, 3))


@pytest.mark.parametrize("limit", [-7.0, -5.0, 1.5, 5.0, 9.0])
def test_advantages_are_cut_and_scaled(limit: float) -> None:
    raw = torch.tensor([limit])
    credit = RECIPES["awm"].make().credit[-1](Credit(raw, torch.ones(1)), None)
    assert credit.advantages.item() == pytest.approx(max(-5.0, min(5.0, limit)) / 5, abs=1e-7)


def test_the_followed_average_keeps_the_lesser_of_a_thousandth_a_step_and_0_3() -> None:
    rule = RECIPES["awm"].make().objective.regularizers[1].rule
    at = [
        rule.keep(Moment(step=n, num_updates=n, ends_step=True, metrics={})) for n in (1, 50, 299, 300, 900)
    ]
    assert at == pytest.approx([0.001, 0.05, 0.299, 0.3, 0.3])


# ------------------------------------------------------------------------------------- where it noises


def test_schedule_strata_are_those_of_the_authors() -> None:
    """14 steps, 6 strata over 90 % of them without the first: bounds 1, 2, 4, 6, 8, 10, 12."""
    part = ForwardError()
    low = part.schedule_steps(np.zeros((1, 6)), 14)
    high = part.schedule_steps(np.full((1, 6), 1 - 1e-12), 14)
    assert low.tolist() == [[1, 2, 4, 6, 8, 10]]
    assert high.tolist() == [[1, 3, 5, 7, 9, 11]]
    whole = replace(part, skip=0).schedule_steps(np.zeros((1, 6)), 14)  # "discrete", of the PickScore runs
    assert whole.tolist() == [[0, 2, 4, 6, 8, 10]]


def test_more_strata_than_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="times is 6, but 6 steps leave 4 to draw from") as caught:
        ForwardError().schedule_steps(np.zeros((1, 6)), 6)
    assert "\n" not in str(caught.value)


class OfSigmas:
    """As much of a batch as noising reads."""

    def __init__(self, num_samples: int, sigmas: torch.Tensor) -> None:
        self.choices = Choices(3, 5, slice(0, num_samples), num_samples)
        self.samples = self
        self.plan, self.sigmas = self, sigmas
        self.x0 = torch.zeros(num_samples, 2)
        self.draws, self.seed = self, torch.arange(num_samples)

    def __len__(self) -> int:
        return len(self.x0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_logit_normal_draws_fall_one_into_each_stratum(shift: float) -> None:
    batch = OfSigmas(4000, torch.linspace(1, 0, 15))
    points = ForwardError(sigmas="logit_normal", shift=shift, times=6).points(batch)
    sigma = np.stack([point.sigma.double().numpy() for point in points], 1)
    inner = sigma / (shift - (shift - 1) * sigma)  # the shift undone
    place = norm.cdf(np.log(inner / (1 - inner)))
    kept = sigma > 0.0101
    assert np.all(np.floor(place * 6 + 1e-4)[kept] >= np.broadcast_to(np.arange(6), sigma.shape)[kept])
    assert np.all(np.floor(place * 6 - 1e-4)[kept] <= np.broadcast_to(np.arange(6), sigma.shape)[kept])
    assert sigma.min() >= 0.01 - 1e-8
    assert abs(place.mean() - 0.5) < 0.01


def test_noisings_of_a_sample_differ_and_are_functions_of_its_seed() -> None:
    batch = OfSigmas(3, torch.linspace(1, 0, 15))
    points = list(ForwardError().points(batch))
    assert len(points) == 6
    noises = [forward_process(p.x0, p.seed, p.sigma, p.step)[1] for p in points]
    again = [forward_process(p.x0, p.seed, p.sigma, p.step)[1] for p in ForwardError().points(batch)]
    assert all(torch.equal(a, b) for a, b in zip(noises, again, strict=True))
    assert len({tuple(n.flatten().tolist()) for n in noises}) == 6


# ---------------------------------------------------------------------------------------- in training


@pytest.mark.parametrize("ratio", ["exp_first", "sum_first"])
def test_gradient_of_a_step_is_that_of_the_formula(ratio: str) -> None:
    """The loss of the first step written out in plain torch, over all samples and noisings at once."""
    recipe = small("awm", f"objective.surrogate.ratio={ratio}", "optimizer.max_grad_norm=1e9")
    got, metrics = gradients(recipe, rows=2)
    engine = build_engine(recipe, CPU)
    batch = batch_of(engine)
    raw = batch.credit.advantages
    assert raw.abs().max() <= 1
    losses = []
    for point in recipe.objective.points(batch):
        x, target = forward_process(point.x0, point.seed, point.sigma, point.step)
        velocity = engine.model.velocity(x, point.sigma, batch.conditioning)
        error = (velocity - target).square().flatten(1).mean(1).double()
        sigma = point.sigma.double()
        log_prob = -(sigma / 0.25) * ((error + 1e-10) ** 0.25 - 1e-10**0.25)
        drift = (velocity - velocity.detach()).square().flatten(1).mean(1)  # both references are the start
        losses.append((log_prob - log_prob.detach(), drift))
    log_ratio = torch.stack([a for a, _ in losses], 1)
    advantages = raw[:, None] if ratio == "exp_first" else raw
    log_ratio = log_ratio if ratio == "exp_first" else log_ratio.mean(1)
    (-advantages * log_ratio.exp()).mean().backward()
    expected = [p.grad for p in engine.model.module.parameters() if p.requires_grad]
    for own, other in zip(got, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-6)
    assert metrics["kl"] == pytest.approx(0, abs=1e-12)
    assert metrics["ratio_max"] == 1


@pytest.mark.parametrize("ratio", ["exp_first", "sum_first"])
def test_micro_batches_do_not_matter(ratio: str) -> None:
    recipe = small("awm", f"objective.surrogate.ratio={ratio}")
    one, _ = gradients(recipe, rows=1)
    all_, _ = gradients(recipe, rows=8)
    for a, b in zip(one, all_, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_old_of_a_snapshot_is_the_policy_before_the_step() -> None:
    """Two updates: in the second the ratio is no longer 1, which a detached old log-prob would say it were."""
    kept, metrics = gradients(small("awm", "objective.surrogate.old=snapshot", "optimizer.num_updates=2"))
    assert metrics["ratio_max"] != 1
    first, _ = gradients(small("awm", "objective.surrogate.old=detached", "optimizer.num_updates=2"))
    for a, b in zip(kept, first, strict=True):  # of the first update, where both are the same policy
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "with_reference"),
    [((), 2), (("objective.regularizers=[]",), 0), (("objective.surrogate.old=snapshot",), 3)],
)
def test_network_evaluations(changes: tuple[str, ...], with_reference: int) -> None:
    """A sample: T in the rollout; 6 with gradient, and 6 for each other set of weights."""
    metrics = train_step(build_engine(small("awm", *changes), CPU)).metrics
    assert metrics["network_evaluations"] == 8 * (10 + 6 * (1 + with_reference))
    assert metrics["network_backwards"] == 8 * 6


def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    assert_resumes(small("awm", "optimizer.lr=0.001"), tmp_path)


def test_two_steps_of_the_command_line(tmp_path: Path) -> None:
    lines = trained_by_command("awm", tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(np.isfinite(list(line.values())).all() for line in lines)


def test_references_are_measured_each_from_its_own_weights() -> None:
    """After a step the average follows and the start does not: two drifts, both written out."""
    recipe = small("awm", "optimizer.lr=0.01")
    engine = build_engine(recipe, CPU)
    train_step(engine)
    part = PolicyGradient(
        surrogate=ForwardError(),
        regularizers=(VelocityKL(to="start"), VelocityKL(to="followed")),
    )
    batch = batch_of(engine, 1)
    point = part.points(batch)[0]
    evaluator = networks(engine.learner, batch, Counts()).at(point)
    with torch.no_grad():
        stats = part.measure(point, evaluator)
        x, _ = forward_process(point.x0, point.seed, point.sigma, point.step)
        own = engine.model.velocity(x, point.sigma, batch.conditioning)
        for name in ("start", "followed"):
            other = engine.learner.snapshots[name].velocity(x, point.sigma, batch.conditioning)
            expected = (own - other).square().flatten(1).mean(1)
            torch.testing.assert_close(stats[f"distance/{name}"], expected, rtol=1e-4, atol=1e-9)
    assert not torch.equal(stats["distance/start"], stats["distance/followed"])
