"""Rollout and update under a mode in which the host may ask the device for one thing: its numbers, at the end."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flowgrpo_fast.models.digits import DigitsConfig, DigitsModel, DigitsNetwork
from flowgrpo_fast.recipe import LowPrecision, Prune, Scouts, TrainingPrecision
from flowgrpo_fast.recipes import RECIPES, digits
from flowgrpo_fast.sampling.schedule import resolve_schedule
from flowgrpo_fast.training import loop
from flowgrpo_fast.training.draws import draw
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import train_step
from flowgrpo_fast.training.sample import sample
from flowgrpo_fast.training.score import score
from flowgrpo_fast.training.update import update
from tests.models.conftest import tiny_path, tiny_recipe  # noqa: F401, fixtures
from tests.models.families import FLUX, SD3

CPU = torch.device("cpu")
PACKAGE = str(Path(loop.__file__).parents[1])
# Ops that give the host a number, or a result whose size the host must learn.
NUMBERS = {"_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "unique"}
NUMBERS |= {"_unique2", "unique_dim", "unique_consecutive", "bincount", "repeat_interleave", "index_put_bool"}
# Python's ways to the same, and to the host's memory; a list's are not ops at all on a CPU.
READS = {
    "tolist",
    "item",
    "numpy",
    "cpu",
    "cuda",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__array__",
}


def caller() -> str:
    """The line of this package that is running, empty within another."""
    frame = sys._getframe(2)
    while frame is not None and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    name = frame.f_code.co_filename if frame is not None else ""
    return f"{name}:{frame.f_lineno}" if name.startswith(PACKAGE) else ""


class Python(TorchFunctionMode):
    """Sees what never reaches the dispatcher: reads of host memory, and copies that do nothing on a CPU."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, where = getattr(function, "__name__", ""), caller()
        moves = name == "to" and any(isinstance(a, torch.device) for a in (*args, *kwargs.values()))
        if name in READS or (moves and where and not kwargs.get("non_blocking")):
            self.log.append(f"{name} {where}")
        if name in ("tensor", "as_tensor") and where and kwargs.get("device") is not None:
            self.log.append(f"{name} {where}")  # copies from the host, and waits
        if name in ("__getitem__", "__setitem__") and any(map(waits, index_of(args))):
            self.log.append(f"{name} {where}")
        return function(*args, **kwargs)


def index_of(args) -> tuple:
    return args[1] if isinstance(args[1], tuple) else (args[1],)


def waits(index) -> bool:
    """A list is copied to the device, a mask has a size that only the device knows, a scalar tensor is read."""
    if isinstance(index, Tensor):
        return index.dtype is torch.bool or (index.ndim == 0 and index.dtype is torch.int64)
    return isinstance(index, list)


class Dispatched(TorchDispatchMode):
    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log, self.after = log, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        if name in NUMBERS:
            self.log.append(f"{name} {caller()}")
        return function(*args, **(kwargs or {}))


def waited(run) -> tuple[object, list[str]]:
    """What `run` returns, and all it asked the device for."""
    log: list[str] = []
    with Dispatched(log), Python(log):
        result = run()
    return result, log


@pytest.fixture
def network(monkeypatch) -> None:
    torch.manual_seed(0)
    network = DigitsNetwork(DigitsConfig(num_layers=1)).eval()
    network.words.requires_grad_(False)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    monkeypatch.setattr("flowgrpo_fast.models.digits.load", lambda device: DigitsModel(network))


def small(name: str, **changes):
    recipe = digits(RECIPES[name].make())
    if isinstance(recipe.prune, Prune):
        recipe = replace(recipe, prune=Prune(at=(3, 6), sizes=(12, 8), score="latents", pool=2))
    if isinstance(recipe.explore, Scouts):
        scouts = replace(recipe.explore, num_scouts=8, precision=TrainingPrecision())
        recipe = replace(recipe, explore=scouts)
    return replace(
        recipe, num_prompts=4, group_size=4, num_steps=3, task=replace(recipe.task, judge=""), **changes
    )


def check(recipe) -> None:
    engine = build_engine(recipe, CPU)
    train_step(engine)  # what is made once: states of the optimiser
    schedule = resolve_schedule(recipe, engine.step, engine.seq_len)
    draws = draw(recipe, len(engine.prompts), engine.step, CPU)
    trajectory, log = waited(lambda: sample(engine, draws, schedule))
    # Whether all velocities were finite, once, when the walk is over.
    assert [line.split()[0] for line in log] in (
        ["__bool__", "is_nonzero", "_local_scalar_dense"],
        ["__bool__"],
        ["__bool__", "_local_scalar_dense"],
    ) or len(trajectory_checks(log)) == len(log), log
    batch = loop.make_batch(engine, trajectory, score(engine, trajectory), schedule)
    metrics, log = waited(lambda: update(engine, batch))
    print(log)
    assert metrics["network_backwards"] > 0


def trajectory_checks(log):
    return [line for line in log if "sampler.py" in line]


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("name", ["flow_grpo", "mix_grpo_flash", "dance_grpo", "pro_grpo", "diffusion_nft"])
def test_digits(name) -> None:
    check(small(name))
