"""Metrics of a run: one JSON object per line, `metrics.jsonl`, and optional trackers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from flowgrpo_fast.json_files import write_whole

Record: TypeAlias = dict[str, Any]
TrackerName: TypeAlias = Literal["none", "tensorboard", "wandb"]


class Tracker(Protocol):
    """Somewhere else that wants the numbers."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Records scalars of one step."""
        ...

    def close(self) -> None:
        """Flushes."""
        ...


class MetricsLog:
    """Appends records to `metrics.jsonl`; what a crash leaves behind is whole lines."""

    def __init__(self, run_dir: Path, last_step: int = 0, tracker: Tracker | None = None) -> None:
        """Opens the log; after a resume at `last_step`, records of later steps are dropped first."""
        self._path = run_dir / "metrics.jsonl"
        self._tracker = tracker
        kept = [record for record in read_metrics(run_dir) if record["step"] <= last_step]
        write_whole(self._path, "".join(_line(record) for record in kept))

    def write(self, record: Record) -> None:
        """Adds one line. The scalars also go to the tracker.

        A number that is NaN or infinite has no place in JSON: it is left out, and named in the line's `not_finite`.

        Raises:
            ValueError: the disk is full or not writable.
        """
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(record))
        except OSError as error:
            raise ValueError(
                f"cannot write {str(self._path)!r}: {error.strerror}; finished checkpoints are intact, "
                "free some space, then continue with --resume"
            ) from None
        if self._tracker is not None:
            scalars = {k: float(v) for k, v in _finite(record).items() if isinstance(v, int | float)}
            self._tracker.log(int(record["step"]), scalars)

    def close(self) -> None:
        """Closes the tracker."""
        if self._tracker is not None:
            self._tracker.close()


def _finite(record: Record) -> Record:
    """The record without its numbers that are NaN or infinite; `not_finite` names them, if there are any."""
    lost = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
    kept = {name: value for name, value in record.items() if name not in lost}
    return kept | {"not_finite": lost} if lost else kept


def _line(record: Record) -> str:
    """A record as one line of strict JSON; also one that an earlier edition has written with NaN in it."""
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def read_metrics(run_dir: Path) -> list[Record]:
    """All records of a run, in order; lines that a crash has torn are left out."""
    path = run_dir / "metrics.jsonl"
    records = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # no JSON, or no UTF-8
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def make_tracker(name: TrackerName, run_dir: Path, config: dict[str, Any]) -> Tracker | None:
    """The tracker of that name.

    Raises:
        ValueError: its package is not installed.
    """
    if name == "none":
        return None
    try:
        return _TensorBoard(run_dir) if name == "tensorboard" else _WeightsAndBiases(run_dir, config)
    except ImportError:
        raise ValueError(
            f"tracker {name!r} is not installed; pip install 'flowgrpo-fast[trackers]'"
        ) from None


class _TensorBoard:
    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(project="flowgrpo-fast", dir=str(run_dir), name=run_dir.name, config=config)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
