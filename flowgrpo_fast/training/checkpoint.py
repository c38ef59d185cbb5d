"""Checkpoints: a folder per step, written beside its final name and moved there whole.

    checkpoints/step_000120/model.safetensors     the trained module; of a LoRA run, in its place
                            pytorch_lora_weights.safetensors   the adapter, as diffusers and peft load it
                            <name>.safetensors    every snapshot that moves, alike: average, old, ...
                            optimizer.pt          AdamW's state
                            memory.pt             what the experience keeps, such as a replay buffer
                            state.json            step, counters, recipe, versions, and a checksum of every other file

Noise is a function of (seed, step), so there is no random state to save.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from flowgrpo_fast.json_files import parse_json
from flowgrpo_fast.models.adapters import ADAPTER_FILE, has_adapter, load_adapter, save_adapter
from flowgrpo_fast.training.engine import Engine
from flowgrpo_fast.training.snapshots import Snapshot, trained_parameters

_KEEP = 2  # finished checkpoints; the older one survives whatever happens to the newer
_NAME = re.compile(r"step_(\d{6,})")
_STATE = "state.json"  # written last: a folder without one is no checkpoint
_BLOCK = 1 << 22  # bytes read at a time

# What a resumed run cannot change: saved weights, moments and memories would mean something else, or the samples of a
# step would no longer be those that the run's seed stands for. Everything else may be, and the change is recorded.
_FIXED = ("seed", "num_prompts", "group_size", "network", "experience", "data", "task.model")
# What a memory of stored walks depends on, besides.
_FIXED_WITH_MEMORY = ("sigmas", "dynamics", "solver", "topology", "guidance_scale")
# Of the network, where it is read from matters at the start of a run alone, and an adapter's scale is a factor.
_FREE = ("network.train.alpha", "network.train.path")


def save_checkpoint(engine: Engine, run_dir: Path, recipe: Mapping[str, Any] | None = None) -> Path:
    """Writes the engine's state; an earlier checkpoint is removed only after this one is complete.

    A step that is saved already is left alone.

    Args:
        recipe: the run's recipe as plain values, by which `load_checkpoint` knows its own.

    Raises:
        ValueError: the disk is full or not writable, or a weight is not finite; earlier checkpoints are intact.
    """
    root = run_dir / "checkpoints"
    final = root / f"step_{engine.step:06d}"
    if (final / _STATE).exists() and not damage(final):
        return final
    _require_finite(engine, run_dir)
    partial, replaced = root / f".{final.name}.partial", root / f".{final.name}.replaced"
    try:
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(engine, partial, recipe)
        if final.exists():  # damaged; it makes way, and is gone only once the new one is there
            os.replace(final, replaced)
        os.replace(partial, final)
        _sync(root)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, as each of them reports it
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(
            f"cannot save {str(final)!r}: {error}. {last_complete(run_dir)} "
            "Free some space, then continue with --resume"
        ) from error
    shutil.rmtree(replaced, ignore_errors=True)
    for old in finished_checkpoints(run_dir)[:-_KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def last_complete(run_dir: Path) -> str:
    """A sentence that says which checkpoint a run can go on from."""
    last = latest_checkpoint(run_dir)
    return f"The last complete checkpoint is {str(last)!r}." if last else "No earlier checkpoint exists."


def _require_finite(engine: Engine, run_dir: Path) -> None:
    """Raises ValueError where a weight, an average or a moment is NaN or infinite: nobody could go on from it."""
    tensors = dict(_saved_tensors(engine))
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist()
    bad = [name for name, fine in zip(tensors, finite, strict=True) if not fine]
    if bad:
        raise ValueError(
            f"after step {engine.step} {len(bad)} of {len(tensors)} tensors are not finite, the first {bad[0]}; they "
            f"are not saved. {last_complete(run_dir)} Continue from it with --resume and a lower optimizer.lr"
        )


def _saved_tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds of the learner, by name, all floating-point."""
    named = [(name, p) for name, p in engine.model.module.named_parameters() if p.requires_grad]
    yield from named
    for snapshot_name, snapshot in moving(engine).items():
        yield from (
            (f"{snapshot_name}: {name}", v) for (name, _), v in zip(named, snapshot.values, strict=True)
        )
    moments = engine.learner.optimizer.state
    for name, parameter in named:
        for moment, value in moments.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                yield f"{moment} of {name}", value.to(parameter.device)


def _write(engine: Engine, folder: Path, recipe: Mapping[str, Any] | None) -> None:
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
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)}
        for file in sorted(folder.iterdir())
    }
    state = {
        "step": engine.step,
        "num_updates": learner.num_updates,
        "recipe": recipe,
        "prompts": engine.prompts_digest,
        "versions": {name: version(name) for name in ("flowgrpo-fast", "torch")},
        "files": files,
    }
    (folder / _STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)


def _sync(path: Path) -> None:
    """Sees to it that a file, or the names in a folder, outlive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(file: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


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
    """Complete checkpoints, oldest first: folders of exactly the names that `save_checkpoint` gives."""
    found = [
        (int(match[1]), path)
        for path in (run_dir / "checkpoints").glob("step_*")
        if (match := _NAME.fullmatch(path.name)) and (path / _STATE).exists()
    ]
    return [path for _, path in sorted(found)]


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint, if any."""
    return next(iter(reversed(finished_checkpoints(run_dir))), None)


def read_state(folder: Path) -> dict[str, Any]:
    """What `state.json` of a checkpoint says. Raises ValueError where it is not whole."""
    try:
        state = parse_json((folder / _STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not all(name in state for name in ("step", "num_updates", "files")):
            raise ValueError("it names no step, counters and files")
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(folder / _STATE)!r} cannot be read: {error}") from error
    return state


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files, by their checksums, in words; empty if nothing is."""
    try:
        state = read_state(folder)
        named = _NAME.fullmatch(folder.name)
        if named and int(named[1]) != state["step"]:
            return f"it is of step {state['step']}"
        files = state["files"]
        for name, known in files.items():
            file = folder / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != known["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {known['bytes']}"
            if _digest(file) != known["sha256"]:
                return f"{name} does not have its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return ""


def changed_fields(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields in which two recipes as plain values differ, dotted: what each was, and is."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("is") == new.get("is"):
            found |= {f"{name}.{inner}": pair for inner, pair in changed_fields(old, new).items()}
        else:
            found[name] = (old, new)
    return found


def check_resumable(engine: Engine, folder: Path, recipe: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What the recipe changes of that of a checkpoint, field by field: all of it is such that the run can go on.

    Raises:
        ValueError: a field that a resumed run cannot change, other prompts, or a snapshot that the run did not keep.
    """
    state = read_state(folder)
    changed = changed_fields(state.get("recipe") or recipe, recipe)
    fixed = _FIXED + (_FIXED_WITH_MEMORY if (folder / "memory.pt").exists() else ())
    for name, (old, new) in changed.items():
        if name not in _FREE and any(name == one or name.startswith(f"{one}.") for one in fixed):
            raise ValueError(
                f"{name} was {_short(old)} when {str(folder)!r} was saved and is {_short(new)} now, which a run cannot "
                "change on its way; leave it as it was, or start a new run with --from"
            )
    if state.get("prompts") not in (None, engine.prompts_digest):
        raise ValueError(
            f"data: the prompts, or what is known of them, are not those that {str(folder)!r} was trained on; restore "
            "their file, or start a new run with --from"
        )
    for name in moving(engine):
        if not (folder / f"{name}.safetensors").exists():
            fields = [field for field in changed if field.startswith(("optimizer.ema", "objective"))]
            raise ValueError(
                f"{', '.join(fields) or 'the recipe'}: {str(folder)!r} holds no weights {name!r}, which the run would "
                "have had to keep from its start; leave it as it was, or start a new run with --from"
            )
    return changed


def _short(value: Any) -> str:
    """A value for a message."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def load_checkpoint(engine: Engine, folder: Path) -> None:
    """Restores what `save_checkpoint` wrote; the run goes on as if it had not stopped, to the bit.

    The optimiser's moments are those that were saved; its rates are the recipe's.

    Raises:
        ValueError: the folder is not a checkpoint of this model. Of damage that leaves it readable `damage` knows.
    """
    try:
        state = read_state(folder)
        _load_trained(engine, folder)
        learner = engine.learner
        for name, snapshot in moving(engine).items():
            _load_snapshot(snapshot, folder / f"{name}.safetensors")
        moments = torch.load(folder / "optimizer.pt", map_location=engine.device, weights_only=True)
        groups = learner.optimizer.param_groups
        rates = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        learner.optimizer.load_state_dict(moments)
        for group, own in zip(learner.optimizer.param_groups, rates, strict=True):
            group.update(own)
        if (folder / "memory.pt").exists():
            memory = torch.load(folder / "memory.pt", map_location="cpu", weights_only=True)
            engine.stage.memory.clear()
            engine.stage.memory.update(memory)
        engine.step, learner.num_updates = int(state["step"]), int(state["num_updates"])
        engine.updates_then = learner.num_updates
        engine.refresh()
    except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
        raise ValueError(f"{str(folder)!r} is not a checkpoint of this recipe: {error}") from error


def newest_whole(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files have their checksums, and a line for each newer one that is passed over.

    None where a run had not come to its first: it begins anew, to the bit the same.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    passed: list[str] = []
    for folder in reversed(finished_checkpoints(run_dir)):
        wrong = damage(folder)
        if not wrong:
            return folder, passed
        passed.append(f"{str(folder)!r} is damaged and passed over: {wrong}")
    if passed:
        raise ValueError(f"no checkpoint of {str(run_dir)!r} is whole; {passed[0]}")
    return None, passed
