"""Runs that are killed at every point where they touch their folder, at odd moments, and folders that are damaged.

After each, the run goes on to the same bits as one that nobody disturbed, or says in one line what is wrong. A short
form is part of `make test`, all of it is `make torture`.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from flowgrpo_fast import launch
from flowgrpo_fast.launch import Run
from flowgrpo_fast.monitor.metrics import read_metrics
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.recipe_io import load_recipe
from flowgrpo_fast.training.checkpoint import damage, finished_checkpoints

STEPS = 3
TOUCHES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
SHORT = 9  # every ninth point in `make test`


@pytest.fixture
def recipe(toy_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> Recipe:
    made = toy_recipe(num_steps=STEPS)
    monkeypatch.setattr(launch, "floor_of", lambda engine: None)
    monkeypatch.setattr(launch, "write_report", lambda folder: folder / "report.html")
    return replace(made, task=replace(made.task, num_eval_samples=4, eval_every=100, judge=""))


def run(recipe: Recipe, folder: Path, resume: bool = False) -> None:
    console = Console(file=io.StringIO())
    device = torch.device("cpu")
    Run(
        recipe=recipe, folder=folder, device=device, resume=resume, checkpoint_every=1, console=console
    ).start()


def resumable(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("metrics.jsonl", "recipe.json"))


def result(folder: Path) -> tuple[bytes, list[Any]]:
    """Final weights, and all that was recorded but for times."""
    last = finished_checkpoints(folder)[-1]
    assert damage(last) == ""
    records = [
        {name: value for name, value in record.items() if "seconds" not in name}
        for record in read_metrics(folder)
    ]
    return (last / "model.safetensors").read_bytes(), records


def in_a_child(work: Callable[[], None]) -> int:
    """Forks; how the child ended. It shares nothing with this process but what it reads."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def killed_at(recipe: Recipe, folder: Path, point: int) -> int:
    """Runs in a child that is killed before its `point`-th touch of the folder; how it ended."""

    def work() -> None:
        touched = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal touched
            if event in TOUCHES and str(arguments[0]).startswith(str(folder)):
                touched += 1
                if touched == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        run(recipe, folder, resume=resumable(folder))

    return in_a_child(work)


def crash_at_points(recipe: Recipe, tmp_path: Path, every: int) -> int:
    run(recipe, tmp_path / "whole")
    expected, point, killed = result(tmp_path / "whole"), 1, 0
    while True:
        folder = tmp_path / f"run_{point}"
        if killed_at(recipe, folder, point) == 0:
            return killed  # it came to its end: there is no such point
        killed += 1
        run(recipe, folder, resume=resumable(folder))
        assert result(folder) == expected, f"killed at touch {point}"
        shutil.rmtree(folder)
        point += every


def test_some_crash_points(recipe, tmp_path) -> None:
    assert crash_at_points(recipe, tmp_path, SHORT) >= 5


@pytest.mark.torture
def test_every_crash_point(recipe, tmp_path) -> None:
    assert crash_at_points(recipe, tmp_path, 1) >= 60


@pytest.mark.torture
def test_killed_again_and_again(recipe, tmp_path) -> None:
    """Killed at random moments, each time a while after it went on, until it is through."""
    run(recipe, tmp_path / "whole")
    expected, chance = result(tmp_path / "whole"), random.Random(0)
    for turn in range(40):
        folder = tmp_path / f"run_{turn}"
        for _ in range(200):
            child = os.fork()
            if child == 0:
                try:
                    run(recipe, folder, resume=resumable(folder))
                    os._exit(0)
                except BaseException:
                    os._exit(1)
            time.sleep(chance.uniform(0.005, 0.25))
            os.kill(child, signal.SIGKILL)
            if os.waitpid(child, 0)[1] == 0:
                break
        run(recipe, folder, resume=resumable(folder))
        assert result(folder) == expected, f"turn {turn}"


def damages() -> dict[str, Callable[[Path], None]]:
    """What may have happened to a folder, by name."""
    found: dict[str, Callable[[Path], None]] = {}
    checkpoint = f"checkpoints/step_{STEPS:06d}"
    files = ["recipe.json", "metrics.jsonl", "summary.json"]
    files += [f"{checkpoint}/{name}" for name in ("model.safetensors", "optimizer.pt", "state.json")]

    def cut(folder: Path, name: str) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-7])

    def noise(folder: Path, name: str) -> None:
        (folder / name).write_bytes(bytes(random.Random(0).randrange(256) for _ in range(400)))

    for name in files:
        found[f"no {name}"] = lambda folder, name=name: (folder / name).unlink()
        found[f"empty {name}"] = lambda folder, name=name: (folder / name).write_bytes(b"")
        found[f"cut {name}"] = lambda folder, name=name: cut(folder, name)
        found[f"noise in {name}"] = lambda folder, name=name: noise(folder, name)
        found[f"a folder at {name}"] = lambda folder, name=name: (
            (folder / name).unlink(),
            (folder / name).mkdir(),
        )[1]
    found["no checkpoints"] = lambda folder: shutil.rmtree(folder / "checkpoints")
    found["no samples"] = lambda folder: shutil.rmtree(folder / "samples")
    found["half a checkpoint"] = lambda folder: (folder / "checkpoints/.step_000009.partial").mkdir()
    return found


def survives(recipe: Recipe, tmp_path: Path, damage_done: Callable[[Path], None]) -> None:
    run(recipe, tmp_path / "whole")
    expected = result(tmp_path / "whole")
    folder = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", folder)
    damage_done(folder)
    refusal = ""
    try:
        run(load_recipe(folder), folder, resume=True)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert "\n" not in refusal
        assert str(folder) in refusal
    else:
        assert result(folder)[0] == expected[0]


@pytest.mark.parametrize("name", [name for name in damages() if "model.safetensors" in name])
def test_a_damaged_folder(recipe, tmp_path, name) -> None:
    survives(recipe, tmp_path, damages()[name])


@pytest.mark.torture
@pytest.mark.parametrize("name", [name for name in damages() if "model.safetensors" not in name])
def test_another_damaged_folder(recipe, tmp_path, name) -> None:
    survives(recipe, tmp_path, damages()[name])
