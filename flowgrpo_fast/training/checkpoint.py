"""Checkpoints: a folder per step, written beside its final name and moved there whole.

    checkpoints/step_000120/model.safetensors     the trained module; of a LoRA run, in its place
                            pytorch_lora_weights.safetensors   the adapter, as diffusers and peft load it
                            <name>.safetensors    every snapshot that moves, alike: average, old, ...
                            optimizer.pt          AdamW's state
                            memory.pt             what the experience keeps, such as a replay buffer
                            state.json            counters

Noise is a function of (seed, step), so there is no random state to save.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from flowgrpo_fast.models.adapters import ADAPTER_FILE, has_adapter, load_adapter, save_adapter
from flowgrpo_fast.training.engine import Engine
from flowgrpo_fast.training.snapshots import Snapshot, trained_parameters

_KEEP = 2  # finished checkpoints; the older one survives whatever happens to the newer


def save_checkpoint(engine: Engine, run_dir: Path) -> Path:
    """Writes the engine's state; an earlier checkpoint is removed only after this one is complete.

    Raises:
        ValueError: the disk is full or not writable; earlier checkpoints are intact.
    """
    root = run_dir / "checkpoints"
    final = root / f"step_{engine.step:06d}"
    partial = root / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(engine, partial)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, as each of them reports it
        shutil.rmtree(partial, ignore_errors=True)
        last = latest_checkpoint(run_dir)
        raise ValueError(
            f"cannot save {str(final)!r}: {error}. "
            + (
                f"The last complete checkpoint is {str(last)!r}. "
                if last
                else "No earlier checkpoint exists. "
            )
            + "Free some space, then continue with --resume"
        ) from error
    for old in finished_checkpoints(run_dir)[:-_KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write(engine: Engine, folder: Path) -> None:
    module = engine.model.module
    if has_adapter(module):
        save_adapter(module, folder / ADAPTER_FILE)
    else:
        save_model(module, str(folder / "model.safetensors"))
    learner = engine.learner
    for name, snapshot in moving(engine).items():
        _save_snapshot(snapshot, folder / f"{name}.safetensors")
    torch.save(learner.optimizer.state_dict(), folder / "optimizer.pt")
    if engine.stage.memory:
        torch.save(engine.stage.memory, folder / "memory.pt")
    counters = {"step": engine.step, "num_updates": learner.num_updates}
    (folder / "state.json").write_text(json.dumps(counters), encoding="utf-8")
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def moving(engine: Engine) -> dict[str, Snapshot]:
    """The snapshots that a checkpoint holds: those whose rule moves them."""
    learner = engine.learner
    return {
        name: snapshot
        for name, snapshot in learner.snapshots.items()
        if learner.rules[name].moves and isinstance(snapshot, Snapshot)
    }


def _save_snapshot(snapshot: Snapshot, file: Path) -> None:
    if has_adapter(snapshot.module):
        save_adapter(snapshot.module, file, snapshot.values)
        return
    values = zip(_trained_names(snapshot), snapshot.values, strict=True)
    save_file({name: value.cpu().contiguous() for name, value in values}, file)


def _load_snapshot(snapshot: Snapshot, file: Path) -> None:
    if has_adapter(snapshot.module):
        snapshot.load(load_adapter(snapshot.module, file))
        return
    saved = load_file(file)
    snapshot.load([saved[name] for name in _trained_names(snapshot)])


def _trained_names(snapshot: Snapshot) -> list[str]:
    return [name for name, parameter in snapshot.module.named_parameters() if parameter.requires_grad]


def _load_trained(engine: Engine, folder: Path) -> None:
    """In place: pointers that graphs hold stay good."""
    module = engine.model.module
    if not has_adapter(module):
        load_model(module, str(folder / "model.safetensors"))
        return
    values: list[Tensor] = load_adapter(module, folder / ADAPTER_FILE)
    for parameter, value in zip(trained_parameters(module), values, strict=True):
        parameter.data.copy_(value)


def finished_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step_*") if (path / "state.json").exists())


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint, if any."""
    return next(iter(reversed(finished_checkpoints(run_dir))), None)


def load_checkpoint(engine: Engine, folder: Path) -> None:
    """Restores what `save_checkpoint` wrote; the run goes on as if it had not stopped, to the bit.

    Raises:
        ValueError: the folder is not a checkpoint of this model.
    """
    try:
        _load_trained(engine, folder)
        learner = engine.learner
        for name, snapshot in moving(engine).items():
            _load_snapshot(snapshot, folder / f"{name}.safetensors")
        state = torch.load(folder / "optimizer.pt", map_location=engine.device, weights_only=True)
        learner.optimizer.load_state_dict(state)
        if (folder / "memory.pt").exists():
            memory = torch.load(folder / "memory.pt", map_location="cpu", weights_only=True)
            engine.stage.memory.clear()
            engine.stage.memory.update(memory)
        counters = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        engine.step, learner.num_updates = int(counters["step"]), int(counters["num_updates"])
        engine.refresh()
    except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
        raise ValueError(f"{str(folder)!r} is not a checkpoint of this recipe: {error}") from error
