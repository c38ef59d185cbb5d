from __future__ import annotations

import errno
import json

import pytest
import torch

from flowgrpo_fast.training import checkpoint
from flowgrpo_fast.training.checkpoint import (
    finished_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import train_step

CPU = torch.device("cpu")


def test_the_two_newest_are_kept(toy_recipe, tmp_path) -> None:
    engine = build_engine(toy_recipe(), CPU)
    for _ in range(4):
        train_step(engine)
        save_checkpoint(engine, tmp_path)
    assert [path.name for path in finished_checkpoints(tmp_path)] == ["step_000003", "step_000004"]


@pytest.mark.parametrize("failing", ["save_model", "torch.save", "fsync"])
def test_a_full_disk_leaves_the_previous_checkpoint(toy_recipe, tmp_path, monkeypatch, failing) -> None:
    engine = build_engine(toy_recipe(), CPU)
    train_step(engine)
    good = save_checkpoint(engine, tmp_path)
    expected = {path.name: path.read_bytes() for path in good.iterdir()}
    train_step(engine)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, name = {
        "save_model": (checkpoint, "save_model"),
        "torch.save": (torch, "save"),
        "fsync": (checkpoint.os, "fsync"),
    }[failing]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(ValueError, match=r"No space left on device.*step_000001.*--resume") as caught:
            save_checkpoint(engine, tmp_path)
    assert "\n" not in str(caught.value)
    assert latest_checkpoint(tmp_path) == good
    assert {path.name: path.read_bytes() for path in good.iterdir()} == expected
    assert [path.name for path in good.parent.iterdir()] == ["step_000001"]  # no half-written remains
    load_checkpoint(build_engine(toy_recipe(), CPU), good)


def test_an_unfinished_checkpoint_is_not_taken(toy_recipe, tmp_path) -> None:
    engine = build_engine(toy_recipe(), CPU)
    train_step(engine)
    good = save_checkpoint(engine, tmp_path)
    (tmp_path / "checkpoints" / ".step_000009.partial").mkdir()
    (tmp_path / "checkpoints" / "step_000009").mkdir()
    assert latest_checkpoint(tmp_path) == good


def test_a_checkpoint_of_something_else_is_refused(toy_recipe, tmp_path) -> None:
    engine = build_engine(toy_recipe(), CPU)
    train_step(engine)
    folder = save_checkpoint(engine, tmp_path)
    (folder / "state.json").write_text(json.dumps({"epoch": 1}))
    with pytest.raises(ValueError, match="is not a checkpoint of this recipe"):
        load_checkpoint(engine, folder)
    (folder / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match="is not a checkpoint of this recipe"):
        load_checkpoint(engine, folder)
