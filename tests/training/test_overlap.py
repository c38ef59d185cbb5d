"""Rewards in a thread or a process while the next prompts roll out: the same run, sooner; failures in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowgrpo_fast.experience.experience import Stage
from flowgrpo_fast.recipe import (
    NFT,
    Cuts,
    Deterministic,
    FrozenWindow,
    Independent,
    RewardTerm,
    Scouts,
    SharedStart,
    Task,
)
from flowgrpo_fast.rewards.workers import RewardWorkers
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.evaluate import evaluate
from flowgrpo_fast.training.loop import train, train_step
from tests.conftest import ToyModel
from tests.training import rewards_elsewhere
from tests.training.rewards_elsewhere import HANGS, SIGNS, count_signs, put_sign, shown, wait_for_signs
from tests.training.steps import drawn, sampled, weights

CPU = torch.device("cpu")
WINDOW = FrozenWindow(size=3, start=1)
CUT = Cuts(inner=Independent(at=WINDOW), steps=(3,), sizes=(16,))
HERE = "tests.training.rewards_elsewhere"


@pytest.fixture
def job(toy_recipe):
    """Engines whose rewards run at a place; all are closed at the end."""
    engines = []

    def build(where: str, *names: str, **changes):
        recipe = toy_recipe(**{"rows_per_forward": 8, **changes})
        terms = tuple(RewardTerm(function=f"{HERE}:{n}", where=where, weight=0.5) for n in names)
        engines.append(build_engine(replace(recipe, task=replace(recipe.task, rewards=terms)), CPU))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("where", ["thread", "process"])
@pytest.mark.parametrize(
    "changes",
    [
        {"prompts_per_chunk": 1},
        {"prompts_per_chunk": 2, "topology": SharedStart(at=WINDOW)},
        {"topology": CUT, "prompts_per_chunk": 2},
        {},
    ],
    ids=str,
)
def test_the_run_is_the_sequential_one_to_the_bit(job, where, changes) -> None:
    plain = job("here", "bright", "edge", **changes)
    overlapped = job(where, "bright", "edge", **changes)
    reports = []
    for engine in (plain, overlapped):
        train(engine, reports.append, lambda: False)
    for mine, theirs in zip(reports[:4], reports[4:], strict=True):
        assert mine.metrics == theirs.metrics
    assert torch.equal(weights(plain), weights(overlapped))
    assert evaluate(plain).metrics == evaluate(overlapped).metrics


@pytest.mark.parametrize(
    "changes",
    [{}, {"topology": SharedStart(at=WINDOW), "rows_per_forward": 2}, {"topology": CUT}],
)
def test_chunks_are_the_whole_to_the_bit(toy_recipe, changes) -> None:
    """Of samples; decoders and rewards round by the batch they are given, like any network."""
    whole, parts = (
        build_engine(toy_recipe(**{"rows_per_forward": 8, "prompts_per_chunk": n, **changes}), CPU)
        for n in (0, 2)
    )
    draws = drawn(whole.recipe)
    one, two = (sampled(engine, draws) for engine in (whole, parts))
    assert len(one.transitions) == len(two.transitions) > 0
    for mine, theirs in zip(one.transitions, two.transitions, strict=True):
        for name in (
            "latents",
            "next_latents",
            "log_prob",
            "row",
            "samples",
            "sigma",
            "samples_host",
            "offsets",
            "fan",
        ):
            assert torch.equal(*(torch.as_tensor(getattr(t, name)) for t in (mine, theirs))), name
    for name in ("x0", "evaluations"):
        assert torch.equal(*(torch.as_tensor(getattr(t, name)) for t in (one, two))), name
    for name in ("prompt_index", "group_id", "seed", "start_seed"):
        assert torch.equal(getattr(one.draws, name), getattr(two.draws, name)), name
    for _ in range(2):
        first, second = (train_step(engine).metrics for engine in (whole, parts))
        assert first == pytest.approx(second, rel=1e-4, abs=1e-6)


def test_scouts_come_in_chunks_too(job) -> None:
    changes = {
        "objective": NFT(),
        "topology": Independent(at=Deterministic()),
        "experience": Scouts(num_scouts=16, num_inference_steps=4),
    }
    engines = [job(*at, **changes) for at in (("here", "bright"), ("thread", "bright"))]
    engines[1].stage.prompts_per_chunk = 2
    seeds, metrics = [], []
    for engine in engines:
        collected = engine.recipe.experience.collect(engine.stage, drawn(engine.recipe), 0)
        seeds.append(collected.samples.draws.seed)
        metrics.append(train_step(engine).metrics)
    assert torch.equal(*seeds)
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-6)


@pytest.fixture(autouse=True)
def signs(tmp_path, monkeypatch) -> Path:
    """Where rewards and tests tell each other how far they are."""
    folder = tmp_path / "signs"
    folder.mkdir()
    monkeypatch.setenv(SIGNS, str(folder))
    return folder


@pytest.mark.parametrize("where", ["thread", "process"])
def test_rewards_run_while_the_next_prompts_roll_out(job, where, monkeypatch) -> None:
    """Four chunks: the reward of one ends only when the next rolls out, so one after another they would never end. And
    the next is done only when the reward has begun, which is then at work beside it."""
    calls, steps = 0, 6
    plain = ToyModel.velocity

    def velocity(model, *arguments):
        nonlocal calls
        if not torch.is_grad_enabled():
            chunk, step = divmod(calls, steps)
            calls += 1
            if step == 0:
                put_sign(f"rollout {chunk + 1}")
            if step == steps - 1:
                wait_for_signs("reward", chunk)
        return plain(model, *arguments)

    monkeypatch.setattr(ToyModel, "velocity", velocity)
    engine = job(where, "meets_next_rollout", prompts_per_chunk=1)
    train_step(engine)
    assert calls == 4 * steps
    assert count_signs("rollout") == count_signs("reward") == 4


def test_a_chunk_is_decoded_before_the_next_rolls_out(job, monkeypatch) -> None:
    order = []
    decode, submit = ToyModel.decode, RewardWorkers.submit
    rolled_out = Stage.score

    def spy(name, function):
        def call(*arguments):
            order.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(ToyModel, "decode", spy("decode", decode))
    monkeypatch.setattr(RewardWorkers, "submit", spy("submit", submit))
    monkeypatch.setattr(Stage, "score", spy("rolled out", rolled_out))
    train_step(job("thread", "bright", "edge", prompts_per_chunk=2))
    assert order == ["rolled out", "decode", "submit", "submit"] * 2


@pytest.mark.parametrize("where", ["here", "thread", "process"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("refuses", r"^reward '.*:refuses' raised ValueError: image 3 is no image$"),
        ("nan", r"^reward 'tests.training.rewards_elsewhere:nan' of sample 0 is nan$"),
        ("too_few", r"^reward '.*:too_few' returned shape \(3,\) for 8 images; it must return \(8,\)$"),
        (
            "listed",
            r"^reward '.*:listed' returned a list for 8 images; it must return 8 numbers, as a tensor, an array",
        ),
    ],
)
def test_the_same_mistakes_in_the_same_words(job, where, name, message) -> None:
    engine = job(where, name, prompts_per_chunk=1)
    with pytest.raises(ValueError, match=message):
        train_step(engine)


@pytest.mark.parametrize("where", ["here", "thread", "process"])
def test_nothing_is_kept_for_a_gradient_of_rewards(job, where) -> None:
    """A reward network's parameters may ask for one; its activations would stay through the update."""
    train_step(job(where, "without_gradient"))


def test_other_failures_of_a_process_are_one_line(job) -> None:
    with pytest.raises(ValueError, match=r"^reward '.*:breaks' raised KeyError: 'missing\\nand more'$"):
        train_step(job("process", "breaks"))
    engine = job("process", "dies")
    with pytest.raises(ValueError, match=r"^the process of reward '.*:dies' died: out of memory, killed, or"):
        train_step(engine)


def test_processes_ignore_interrupts_and_end_with_the_engine(job) -> None:
    images = torch.rand(4, 1, 2, 3)
    workers = RewardWorkers(1)
    term = RewardTerm(function=f"{HERE}:where", where="process")
    pid, ignored = workers.submit(term, shown(images)).result().total[:2].int().tolist()
    assert ignored
    assert pid != os.getpid()
    stuck = RewardTerm(function=f"{HERE}:stuck", where="process")
    future = workers.submit(stuck, shown(images))
    wait_for_signs("stuck", 1)
    workers.close()
    with pytest.raises(ValueError, match=r"stuck' died"):
        future.result(timeout=HANGS)
    assert gone(pid)
    workers.close()  # nothing is left to end


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["thread", "process"])
def test_images_leave_the_device_without_anyone_waiting(where) -> None:
    """The memory they lay in is written again at once; the reward sees what was there."""
    workers = RewardWorkers(1)
    term = RewardTerm(function=f"{HERE}:edge", where=where)
    try:
        images = [torch.rand(4, 3, 256, 256) for _ in range(4)]
        futures = []
        for part in images:
            futures.append(workers.submit(term, shown(part.cuda())))
        for part, future in zip(images, futures, strict=True):
            expected = rewards_elsewhere.edge(part, [""] * 4)
            torch.testing.assert_close(future.result().total.cpu().double(), expected, rtol=1e-6, atol=0)
    finally:
        workers.close()


def gone(pid: int) -> bool:
    deadline = time.monotonic() + HANGS
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


SCRIPT = """
import signal, torch
from flowgrpo_fast.recipe import RewardTerm
from flowgrpo_fast.rewards.workers import RewardWorkers
from tests.training.rewards_elsewhere import shown

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background begins without
    workers, images = RewardWorkers(1), torch.rand(2, 1, 2, 3)
    def start(name, place):
        term = RewardTerm(function=f"tests.training.rewards_elsewhere:{name}", where=place)
        return workers.submit(term, shown(images))
    print(int(start("where", "process").result().total[0]), flush=True)
    start("stuck", "thread")
    start("stuck", "process").result()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_nothing_outlives_the_program(number, tmp_path) -> None:
    """Ctrl-C while a reward hangs, in a process and in a thread; and a program that cannot clean up."""
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT
        if number == signal.SIGKILL
        else SCRIPT.replace(
            '    start("stuck", "process").result()',
            '    try:\n        start("stuck", "process").result()\n    finally:\n        workers.close()',
        )
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    process = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    worker = int(process.stdout.readline())
    wait_for_signs("stuck", 2)
    process.send_signal(number)
    process.wait(timeout=HANGS)
    assert gone(worker)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda r: RewardTerm(function="a:b", where="there"),
            "RewardTerm.where is 'there'; it must be 'here'",
        ),
        (lambda r: Task(reward_processes=0), "Task.reward_processes is 0; it must be above 0"),
        (lambda r: r(prompts_per_chunk=3), "prompts_per_chunk is 3; it must divide num_prompts = 4"),
        (lambda r: r(prompts_per_chunk=-1), "prompts_per_chunk is -1; it must be at least 0"),
        (
            lambda r: r(prompts_per_chunk=1),
            r"prompts_per_chunk is 1: 8 samples, which must be whole forwards of 32; set rows_per_forward to 8",
        ),
    ],
)
def test_settings_that_cannot_be(toy_recipe, make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(toy_recipe)
