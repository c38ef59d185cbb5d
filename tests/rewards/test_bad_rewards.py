"""Rewards that fail, wherever they run: one line that names them, none hangs, and the next call works."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time

import pytest
import torch

from flowgrpo_fast.recipe import RewardTerm
from flowgrpo_fast.rewards.calls import RewardFailed, RewardTimedOut, limited
from flowgrpo_fast.rewards.scoring import Scorer
from flowgrpo_fast.rewards.workers import _Pool
from flowgrpo_fast.types import PromptSet, Scores
from tests.rewards.own_reward import OwnReward

CPU = torch.device("cpu")
GROUP = torch.tensor([0, 0, 1])
X0 = torch.rand(3, 1, 2, 3, generator=torch.Generator().manual_seed(1))
PROMPTS = PromptSet(("a", "bb", "ccc"), ({}, {}, {}))


def reward(function: str, where: str, **changes) -> RewardTerm:
    return RewardTerm(function=f"tests.rewards.bad:{function}", where=where, **changes)


def score(*terms) -> Scores:
    scorer = Scorer(terms, lambda latents: latents.clone(), CPU)
    try:
        return scorer.start(X0, PROMPTS, GROUP, 2).result()
    finally:
        scorer.close()


@pytest.fixture(scope="module")
def in_processes():
    """One scorer for all, whose processes must outlast a failure that is not their end."""
    scorer = Scorer((reward("good", "process"),), lambda latents: latents.clone(), CPU)
    yield scorer
    scorer.close()


WHERE = ["here", "thread", "process"]
RAISES = [
    ("value_error", "raised ValueError: my own"),
    ("exits", "raised SystemExit: 3"),
    ("unprintable", "raised UnprintableError"),
    ("key_error", "raised KeyError: 'missing'"),
    ("generator_exit", "raised GeneratorExit"),
]
RETURNS = [
    ("complex_scores", "returned a Tensor of complex numbers for 3 images"),
    ("nothing", "returned a NoneType for 3 images"),
    ("not_finite", "of sample 0 is nan"),
]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("function", "message"), RAISES + RETURNS, ids=lambda v: v.split()[0])
def test_each_is_one_line(in_processes, function, message, where) -> None:
    in_processes.terms = (reward(function, where),)
    with pytest.raises(ValueError, match=message) as caught:
        in_processes.start(X0, PROMPTS, GROUP, 2).result()
    assert str(caught.value).startswith(f"reward 'tests.rewards.bad:{function}' ")
    assert "\n" not in str(caught.value)
    raised = isinstance(caught.value, RewardFailed)
    assert raised == ((function, message) in RAISES)
    if raised:
        assert f"in {function}" in caught.value.traceback_text
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), again.traceback_text) == (str(caught.value), caught.value.traceback_text)
    if raised and where != "process":
        assert caught.value.__cause__ is not None


@pytest.mark.parametrize("where", WHERE)
def test_good_ones_work(in_processes, where) -> None:
    in_processes.terms = (reward("good", where), reward("good_list", where))
    scores = in_processes.start(X0, PROMPTS, GROUP, 2).result()
    mean = X0.flatten(1).mean(1)
    assert torch.equal(scores.objectives["good"], mean)
    assert torch.equal(scores.objectives["good_list"], torch.cat([torch.tensor([0.5]), mean[1:]]))


@pytest.mark.parametrize("where", ["here", "thread"])
@pytest.mark.parametrize("function", ["hangs", "spins"])
def test_what_hangs_ends_by_its_limit(function, where) -> None:
    begin = time.monotonic()
    with pytest.raises(RewardTimedOut) as caught:
        score(reward(function, where, timeout=0.2))
    assert time.monotonic() - begin < 30.0
    assert str(caught.value) == (
        f"reward 'tests.rewards.bad:{function}' took longer than 0.2 s; raise RewardTerm.timeout (0 = no limit) "
        "if it may take that long"
    )
    assert f"in {function}" in caught.value.traceback_text


def test_processes_that_hang_or_die_are_replaced() -> None:
    scorer = Scorer((reward("good", "process"),), lambda latents: latents.clone(), CPU)
    ends = {
        "hangs": r"^reward '.*:hangs' took longer than 0.2 s; raise RewardTerm.timeout",
        "leaves": r"^the process of reward '.*:leaves' died: out of memory, killed, or left by os._exit; or its script",
        "killed": r"^the process of reward '.*:killed' died",
    }
    try:
        for function, message in ends.items():
            scorer.terms = (reward(function, "process", timeout=0.2),)
            with pytest.raises(RewardFailed, match=message) as caught:
                scorer.start(X0, PROMPTS, GROUP, 2).result()
            assert "\n" not in str(caught.value)
        scorer.terms = (reward("good", "process"),)
        assert torch.equal(scorer.start(X0, PROMPTS, GROUP, 2).result().total, X0.flatten(1).mean(1))
    finally:
        scorer.close()


def test_of_several_that_ran_all_are_named() -> None:
    pool = _Pool(2)  # starts no process before its first call
    pool.calls = dict(enumerate(("a", "b", "waits")))
    assert str(pool.died()).startswith("a process of rewards 'a', 'b' died: out of memory, killed")
    pool.end()


def test_gradients_come_back_from_a_call_with_a_limit() -> None:
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(limited(lambda: (value**2).sum(), 5.0, "r"), value)
    assert gradient.tolist() == [2.0, 4.0]


def test_a_call_in_another_thread_has_the_callers_modes() -> None:
    def modes():
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.get_num_threads(),
            threading.current_thread() is threading.main_thread(),
        )

    for enter in (
        torch.no_grad,
        torch.enable_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.float16),
    ):
        with enter():
            mine = modes()
            assert limited(modes, 5.0, "r") == (*mine[:-1], False)
            assert limited(modes, 0.0, "r") == mine


def test_signals_win_over_what_hangs() -> None:
    def interrupt(number, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            score(reward("hangs", "here", timeout=50.0))
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, previous)


def test_parts_of_ones_own_fail_alike() -> None:
    def interrupted(images, prompts):
        raise KeyboardInterrupt

    with pytest.raises(RewardFailed, match=r"^reward 'own' raised ZeroDivisionError: division by zero$"):
        score(OwnReward(function=lambda images, prompts: 1 / 0))
    with pytest.raises(KeyboardInterrupt):
        score(OwnReward(function=interrupted))


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_limits_are_seconds(seconds) -> None:
    with pytest.raises(
        ValueError, match=r"^RewardTerm.timeout is .*; it must be seconds, or 0 for no limit$"
    ):
        RewardTerm(function="a:b", timeout=seconds)
