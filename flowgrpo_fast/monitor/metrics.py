"""Metrics of a run: one JSON object per line, `metrics.jsonl`, and optional trackers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

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
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(partial, self._path)

    def write(self, record: Record) -> None:
        """Adds one line. The scalars also go to the tracker.

        Raises:
            ValueError: the disk is full or not writable.
        """
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise ValueError(
                f"cannot write {str(self._path)!r}: {error.strerror}; finished checkpoints are intact, "
                "free some space, then continue with --resume"
            ) from None
        if self._tracker is not None:
            scalars = {k: float(v) for k, v in record.items() if isinstance(v, int | float)}
            self._tracker.log(int(record["step"]), scalars)

    def close(self) -> None:
        """Closes the tracker."""
        if self._tracker is not None:
            self._tracker.close()


def read_metrics(run_dir: Path) -> list[Record]:
    """All records of a run, in order; a torn last line is left out."""
    path = run_dir / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
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
