"""Metrics of a run: one JSON object per line, `metrics.jsonl`, and optional trackers."""

from __future__ import annotations

import importlib
import json
import math
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from PIL import Image

from flowgrpo_fast.json_files import write_whole

Record: TypeAlias = dict[str, Any]
TrackerName: TypeAlias = Literal["none", "tensorboard", "wandb", "trackio"]


class Picture(NamedTuple):
    """A sample, or a grid of them, and what stands under it."""

    image: Image.Image
    caption: str


class Tracker(Protocol):
    """Somewhere else that wants the numbers and the pictures."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Records scalars of one step."""
        ...

    def show(self, step: int, grid: Picture, samples: Sequence[Picture]) -> None:
        """Records what an evaluation showed."""
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

    def show(self, step: int, grid: Picture, samples: Sequence[Picture]) -> None:
        """Hands what an evaluation showed to the tracker."""
        if self._tracker is not None:
            self._tracker.show(step, grid, samples)

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
        return _TensorBoard(run_dir) if name == "tensorboard" else _WeightsAndBiases(name, run_dir, config)
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

    def show(self, step: int, grid: Picture, samples: Sequence[Picture]) -> None:
        self._writer.add_image("samples", np.asarray(grid.image), step, dataformats="HWC")
        for place, sample in enumerate(samples):
            self._writer.add_image(f"sample/{place:03d}", np.asarray(sample.image), step, dataformats="HWC")
        # Four blanks make a line of Markdown, which is what the text tab shows, literal.
        lines = [
            f"    {place:03d}  {' '.join(sample.caption.split())}" for place, sample in enumerate(samples)
        ]
        self._writer.add_text("samples", "\n".join(lines), step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """W&B, or trackio, which has the same functions."""

    def __init__(self, package: str, run_dir: Path, config: dict[str, Any]) -> None:
        self._wandb = importlib.import_module(package)
        common = {"project": "flowgrpo-fast", "name": run_dir.name, "config": config, "resume": "allow"}
        # The id stays with the run, so that what is resumed goes on in the same curves. Trackio goes by the name.
        own = {"id": _kept_id(run_dir), "dir": str(run_dir)} if package == "wandb" else {}
        self._run = self._wandb.init(**common, **own)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._wandb.log(values, step=step)

    def show(self, step: int, grid: Picture, samples: Sequence[Picture]) -> None:
        pictures = [self._wandb.Image(picture.image, caption=picture.caption) for picture in samples]
        shown = {"samples": self._wandb.Image(grid.image, caption=grid.caption)}
        shown |= {f"sample/{place:03d}": picture for place, picture in enumerate(pictures)}
        self._wandb.log(shown, step=step)

    def close(self) -> None:
        self._wandb.finish()


def _kept_id(run_dir: Path) -> str:
    """The run's id in a tracker: made once, and kept in its folder."""
    path = run_dir / "tracker_id"
    if not path.exists():
        write_whole(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text(encoding="utf-8").strip()
