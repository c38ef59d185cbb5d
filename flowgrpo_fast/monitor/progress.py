"""The progress bar: reward, judge, ratio, seconds per step, and how far that is from the floor."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from flowgrpo_fast.monitor.metrics import Record


class _Outliving:
    """A text stream whose reader may go away: a closed pipe or terminal must not end the run that writes to it."""

    def __init__(self, stream: Any) -> None:
        # A process started with its output closed has no stream at all.
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """The stream's own, until it fails."""
        try:
            return int(self._stream.write(text))
        except (OSError, ValueError):  # a closed file says it by a ValueError
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for as long as the run goes on
            return len(text)

    def flush(self) -> None:
        """The stream's own, until it fails."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def run_console() -> Console:
    """A console on the standard output that goes quiet where that is closed."""
    return Console(file=_Outliving(sys.stdout))  # type: ignore[arg-type]


class TrainingProgress:
    """A context manager around the loop; `show` after each step.

    Where the output is no terminal, a plain line every `plain_every` steps takes the bar's place.
    """

    def __init__(self, console: Console, num_steps: int, done: int = 0, plain_every: int = 10) -> None:
        self._console, self._num_steps, self._plain_every = console, num_steps, plain_every
        self._judge: float | None = None
        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=num_steps, completed=done, numbers="")

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, record: Record) -> None:
        """Updates the bar with one step's record."""
        self._judge = record.get("eval/judge", self._judge)
        numbers = f"reward {record['reward']:+.3f}"
        if self._judge is not None:
            numbers += f"  judge {100 * self._judge:.1f} %"
        # Ratio on the step's own rollout, before its first update: exactly 1 is the promise.
        if "first_ratio_error" in record:
            numbers += f"  |ratio-1| {record['first_ratio_error']:.1e}"
        # Most steps go without an evaluation; those that are printed may all have one.
        seconds = record["seconds_step"] - record.get("seconds/evaluation", 0.0)
        numbers += f"  {seconds:.2f} s/step"
        if "time_over_floor" in record:  # measured time over what the step's own FLOPs need here
            numbers += f"  {record['time_over_floor']:.3g}x floor"
        self._progress.update(self._task, completed=record["step"], numbers=numbers)
        last = record["step"] == self._num_steps
        if not self._console.is_terminal and (record["step"] % self._plain_every == 0 or last):
            line = f"step {record['step']:4d}/{self._num_steps}  {numbers}"
            self._console.print(line, highlight=False, soft_wrap=True)
