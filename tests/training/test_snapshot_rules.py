"""Snapshots follow the trained weights as their rules say, and a run that stops and goes on does not notice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flowgrpo_fast.models.adapters import ADAPTER_FILE
from flowgrpo_fast.objectives.snapshots import Moment
from flowgrpo_fast.recipe import (
    EMA,
    Clip,
    EarlySteps,
    Frozen,
    Independent,
    Loaded,
    Optimizer,
    PolicyGradient,
    Ramp,
    Replayed,
    ResetWhen,
    VelocityKL,
)
from flowgrpo_fast.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from flowgrpo_fast.training.engine import Engine, build_engine
from flowgrpo_fast.training.learner import Learner
from flowgrpo_fast.training.loop import train_step
from flowgrpo_fast.training.snapshots import Snapshot, load_weights
from tests.conftest import ToyModel
from tests.training.own_parts import load_adapted
from tests.training.steps import CPU, snapshot_weights, weights

RULES = {
    "start": Frozen(),
    "each": EMA(decay=0.8),
    "third": EMA(decay=0.6, every=3),
    "slow": Ramp(start=1, rate=0.3, most=0.5),
    "before": Ramp(most=0.0),
    "far": ResetWhen(metric="reward", above=-1e9),
    "never": ResetWhen(metric="reward", above=1e9),
    "second": ResetWhen(metric="no such metric", every=2),
}


def following(**rules) -> PolicyGradient:
    """An objective that keeps snapshots by these rules, and hardly feels them."""
    parts = tuple(VelocityKL(beta=1e-3, to=name, rule=rule) for name, rule in rules.items())
    return PolicyGradient(trust=Clip(range=0.05), regularizers=parts)


def trained(engine: Engine) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in engine.learner.parameters])


def test_every_rule_follows_as_it_says(toy_recipe, monkeypatch) -> None:
    """Over four training steps of two optimiser steps each, against the rules' formulas."""
    optimizer = Optimizer(lr=2e-2, num_updates=2, ema_decay=0.9, ema_every=2)
    engine = build_engine(toy_recipe(objective=following(**RULES), optimizer=optimizer), CPU)
    updates: list[Tensor] = []
    step = Learner.step

    def spy(learner: Learner) -> Tensor:
        norm = step(learner)
        updates.append(trained(engine))
        return norm

    monkeypatch.setattr(Learner, "step", spy)
    first = trained(engine)
    expected = {name: first.double() for name in (*RULES, "average")}
    for number in range(1, 5):
        updates.clear()
        train_step(engine)
        assert len(updates) == 2
        for place, now in enumerate(updates):
            count, now = 2 * (number - 1) + place + 1, now.double()
            expected["each"] = 0.8 * expected["each"] + 0.2 * now
            if count % 3 == 0:
                expected["third"] = 0.6 * expected["third"] + 0.4 * now
            if count % 2 == 0:
                expected["average"] = 0.9 * expected["average"] + 0.1 * now
        kept = min(0.5, 0.3 * max(0, number - 1))
        expected["slow"] = kept * expected["slow"] + (1 - kept) * now
        expected["before"] = expected["far"] = now
        if number % 2 == 0:
            expected["second"] = now
        for name, values in expected.items():
            torch.testing.assert_close(snapshot_weights(engine, name).double(), values, rtol=1e-6, atol=1e-7)
    assert torch.equal(snapshot_weights(engine, "start"), first)
    assert torch.equal(snapshot_weights(engine, "never"), first)
    for name in ("before", "far", "second"):
        assert torch.equal(snapshot_weights(engine, name), trained(engine))
    assert not torch.equal(trained(engine), first)


@pytest.mark.parametrize(
    ("rule", "moment", "kept"),
    [
        (ResetWhen(metric="kl", above=0.1), Moment(1, 1, True, {"kl": 0.11}), 0.0),
        (ResetWhen(metric="kl", above=0.1), Moment(1, 1, True, {"kl": 0.09}), None),
        (ResetWhen(metric="kl", above=0.1), Moment(1, 1, False, {"kl": 0.2}), None),
        (ResetWhen(metric="kl", above=0.1, every=5), Moment(10, 1, True, {"kl": 0.0}), 0.0),
        (EMA(decay=0.9, every=4), Moment(1, 8, False, {}), 0.9),
        (EMA(decay=0.9, every=4), Moment(1, 8, True, {}), None),
        (Ramp(start=2, rate=0.1, most=0.25), Moment(4, 9, True, {}), 0.2),
        (Ramp(start=2, rate=0.1, most=0.25), Moment(9, 9, True, {}), 0.25),
        (Ramp(start=2, rate=0.1, most=0.25), Moment(9, 9, False, {}), None),
        (Frozen(), Moment(9, 9, True, {}), None),
    ],
)
def test_when_a_rule_moves(rule, moment, kept) -> None:
    assert rule.keep(moment) == (pytest.approx(kept) if kept is not None else None)


def resumes(recipe, folder: Path) -> tuple[Engine, Engine]:
    """A run of four steps, and one that stops after two and goes on from its checkpoint."""
    whole, half = build_engine(recipe, CPU), build_engine(recipe, CPU)
    reports = [train_step(whole).metrics for _ in range(4)]
    first = [train_step(half).metrics for _ in range(2)]
    save_checkpoint(half, folder)
    resumed = build_engine(recipe, CPU)
    load_checkpoint(resumed, latest_checkpoint(folder))
    assert first + [train_step(resumed).metrics for _ in range(2)] == reports
    assert torch.equal(weights(whole), weights(resumed))
    for name, snapshot in whole.learner.snapshots.items():
        if isinstance(snapshot, Snapshot):
            assert torch.equal(snapshot_weights(whole, name), snapshot_weights(resumed, name)), name
    return whole, resumed


@pytest.mark.parametrize("adapted", [False, True], ids=["", "adapter"])
def test_snapshots_survive_a_checkpoint_to_the_bit(toy_recipe, tmp_path, adapted) -> None:
    optimizer = Optimizer(lr=2e-2, num_updates=2, ema_decay=0.9)
    recipe = toy_recipe(objective=following(**RULES), optimizer=optimizer)
    if adapted:
        task = replace(recipe.task, model="tests.training.own_parts:load_adapted")
        recipe = replace(recipe, task=task)
    whole, _ = resumes(recipe, tmp_path)
    files = {path.stem for path in latest_checkpoint(tmp_path).glob("*.safetensors")}
    moving = {name for name in RULES if RULES[name].moves} | {"average"}
    assert files == moving | {Path(ADAPTER_FILE).stem if adapted else "model"}
    assert not torch.equal(snapshot_weights(whole, "slow"), trained(whole))


def test_the_replay_buffer_survives_a_checkpoint_to_the_bit(toy_recipe, tmp_path) -> None:
    recipe = toy_recipe(topology=Independent(at=EarlySteps(size=3)), experience=Replayed(num_early_steps=3))
    whole, resumed = resumes(recipe, tmp_path)
    assert (latest_checkpoint(tmp_path) / "memory.pt").exists()

    def same(one, other) -> bool:
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        if isinstance(one, list | tuple):
            return len(one) == len(other) and all(map(same, one, other))
        return torch.equal(one, other) if isinstance(one, Tensor) else one == other

    assert whole.stage.memory
    assert same(whole.stage.memory, resumed.stage.memory)


# ----------------------------------------------------------------------------------------- other weights


def teacher(engine_recipe, folder: Path) -> Engine:
    """A short run of the same model, with a checkpoint."""
    engine = build_engine(engine_recipe, CPU)
    train_step(engine)
    save_checkpoint(engine, folder)
    return engine


@pytest.mark.parametrize("name", ["", "model.safetensors"], ids=["folder", "file"])
def test_a_teacher_from_a_checkpoint_or_a_file(toy_recipe, tmp_path, name) -> None:
    source = teacher(toy_recipe(optimizer=Optimizer(lr=0.1)), tmp_path)
    path = latest_checkpoint(tmp_path) / name if name else latest_checkpoint(tmp_path)
    engine = build_engine(toy_recipe(objective=following(taught=Loaded(path=str(path)))), CPU)
    assert torch.equal(snapshot_weights(engine, "taught"), trained(source))
    assert not torch.equal(trained(engine), trained(source))
    for _ in range(2):
        train_step(engine)
    assert torch.equal(snapshot_weights(engine, "taught"), trained(source))


@pytest.mark.parametrize("name", ["", ADAPTER_FILE], ids=["folder", "file"])
def test_a_teacher_that_is_an_adapter(toy_recipe, tmp_path, name) -> None:
    recipe = toy_recipe(optimizer=Optimizer(lr=0.1))
    recipe = replace(recipe, task=replace(recipe.task, model="tests.training.own_parts:load_adapted"))
    source = teacher(recipe, tmp_path)
    path = latest_checkpoint(tmp_path) / name if name else latest_checkpoint(tmp_path)
    engine = build_engine(replace(recipe, objective=following(taught=Loaded(path=str(path)))), CPU)
    assert torch.equal(snapshot_weights(engine, "taught"), trained(source))
    train_step(engine)
    assert torch.equal(snapshot_weights(engine, "taught"), trained(source))


def wrong_file(kind: str, folder: Path) -> Path:
    file = folder / "other.safetensors"
    if kind == "missing":
        return folder / "nowhere"
    if kind == "an empty folder":
        return folder
    if kind == "not safetensors":
        file.write_bytes(b"not one")
    elif kind == "other names":
        save_file({"weight": torch.zeros(2)}, file)
    elif kind == "other shapes":
        save_file({name: torch.zeros(3) for name in ToyModel().module.state_dict()}, file)
    else:
        file.write_bytes(b"")
    return file


@pytest.mark.parametrize("load", [ToyModel, lambda: load_adapted(CPU, None)], ids=["model", "adapter"])
@pytest.mark.parametrize(
    "kind", ["missing", "an empty folder", "not safetensors", "other names", "other shapes", "empty"]
)
def test_a_wrong_file_is_one_line(kind, load, tmp_path) -> None:
    path = wrong_file(kind, tmp_path)
    snapshot = Snapshot(load())
    before = [value.clone() for value in snapshot.values]
    with pytest.raises(ValueError, match=r"^Loaded\.path ") as caught:
        load_weights(snapshot, str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert ("there is no such file or folder" in message) == (kind == "missing")
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot.values, strict=True))
