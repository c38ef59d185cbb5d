"""GCPO's chunk ratios against the worked case, and against the plain policy gradient."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from flowgrpo_fast.objectives.chunks import ChunkRatio
from flowgrpo_fast.objectives.policy_gradient import PolicyGradient
from flowgrpo_fast.objectives.regularizers import TransitionKL
from flowgrpo_fast.objectives.trust import Clip
from flowgrpo_fast.schedule.dynamics import Euler, FlowSDE
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.schedule.topology import Course, Independent
from flowgrpo_fast.schedule.windows import AllSteps, FractionOfSteps, FrozenWindow


def test_worked_case(methods) -> None:
    case = methods["gcpo"]
    given, expected = case["inputs"], case["expected"]
    log_prob = torch.tensor(given["dlogp"], dtype=torch.float64, requires_grad=True)
    stats = {"log_prob": log_prob, "old_log_prob": torch.zeros_like(log_prob)}
    part = ChunkRatio(sizes=tuple(given["chunks"]), trust=Clip(range=given["clip"]))
    terms = part.loss(stats, torch.tensor(given["A"], dtype=torch.float64))
    loss = terms.loss.mean()
    loss.backward()
    ratio = np.array(expected["ratio"])
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-6)
    np.testing.assert_allclose(log_prob.grad, expected["grad"], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(terms.shown["ratio_mean"], ratio.mean(1), rtol=1e-12)
    np.testing.assert_allclose(terms.worst["ratio_max"], ratio.max(1), rtol=1e-12)
    active = np.array(expected["grad"])[:, [0, 2, 5]] == 0  # the first step of each chunk
    np.testing.assert_allclose(terms.shown["clip_fraction"], active.mean(1), rtol=1e-6)


def tables(num_samples: int = 5, num_steps: int = 6):
    generator = torch.Generator().manual_seed(0)
    new, old, drift = 0.1 * torch.randn(3, num_samples, num_steps, generator=generator, dtype=torch.float64)
    stats = {
        "log_prob": new.requires_grad_(),
        "old_log_prob": old,
        "drift/start": drift.square(),
        "std": torch.linspace(0.2, 0.9, num_steps, dtype=torch.float64).expand(num_samples, -1),
        "interval": torch.full((num_samples, num_steps), 0.125, dtype=torch.float64),
    }
    return stats, torch.linspace(-2, 2, num_samples, dtype=torch.float64)


def test_chunks_of_one_step_are_the_plain_policy_gradient() -> None:
    """The loss of a sample is the mean over its steps."""
    stats, advantages = tables()
    parts = {"trust": Clip(range=0.05), "regularizers": (TransitionKL(beta=0.3),)}
    chunked = ChunkRatio(sizes=(1,) * 6, **parts).loss(stats, advantages)
    plain = PolicyGradient(**parts).loss(stats, advantages[:, None])
    torch.testing.assert_close(chunked.loss, plain.loss.mean(1))
    for name in ("policy_loss", "kl", "ratio_mean", "clip_fraction"):
        torch.testing.assert_close(chunked.shown[name].double(), plain.shown[name].double().mean(1), msg=name)
    slopes = [torch.autograd.grad(t.loss.sum(), stats["log_prob"])[0] for t in (chunked, plain)]
    torch.testing.assert_close(slopes[0], slopes[1] / 6)


def test_a_chunk_of_all_steps_is_a_ratio_of_trajectories() -> None:
    stats, advantages = tables()
    terms = ChunkRatio(sizes=(6,), trust=Clip(range=10.0)).loss(stats, advantages)
    ratio = torch.exp((stats["log_prob"] - stats["old_log_prob"]).mean(1))
    torch.testing.assert_close(terms.loss, -advantages * ratio)


def plan(window, num_steps: int = 8) -> Plan:
    course = Course(
        sigmas=np.linspace(1, 0, num_steps + 1),
        shift=1.0,
        dynamics=FlowSDE(),
        solver=Euler(),
        iteration=0,
        seed=0,
        num_prompts=2,
        group_size=3,
    )
    return Independent(at=window).plan(course)


def test_chunks_must_cover_the_trained_steps() -> None:
    part = ChunkRatio(sizes=(2, 3, 2))
    assert part.couples
    part.check(plan(AllSteps()))
    assert part.requires == replace(PolicyGradient().requires, all_steps=True)
    for window, trained in ((FrozenWindow(size=4), 4), (FractionOfSteps(fraction=0.6), 4)):
        with pytest.raises(
            ValueError, match=rf"ChunkRatio.sizes is \(2, 3, 2\), 7 steps .* trains on {trained}: name sizes"
        ) as error:
            part.check(plan(window))
        assert "\n" not in str(error.value)
    for sizes in ((), (2, 0)):
        with pytest.raises(ValueError, match="name at least one chunk, of at least one step each"):
            ChunkRatio(sizes=sizes)
