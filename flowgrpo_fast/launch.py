"""A whole run: folder, evaluation, checkpoints, signals, report. The mathematics is in `training.loop`.

However a run ends, its last whole step is saved: at its end, at Ctrl-C, SIGTERM and SIGHUP after the step under way, at
any failure outside of an update at once. An update that fails in its middle leaves weights of no step; the checkpoint
before it then stands.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from flowgrpo_fast.json_files import check_links, parse_json, write_whole
from flowgrpo_fast.monitor.cost import CostMeter, device_name
from flowgrpo_fast.monitor.metrics import MetricsLog, Picture, TrackerName, make_tracker, read_metrics
from flowgrpo_fast.monitor.pictures import picture_of, sample_grid, save_picture, save_samples, still
from flowgrpo_fast.monitor.progress import TrainingProgress, run_console
from flowgrpo_fast.monitor.report import write_report
from flowgrpo_fast.planner.live import (
    Floor,
    check_memory,
    floor_of,
    memory_of,
    out_of_memory_in_one_line,
    with_forwards,
)
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.recipe_io import save_recipe, to_dict
from flowgrpo_fast.rewards.calls import RewardFailed
from flowgrpo_fast.training.checkpoint import (
    check_resumable,
    finished_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    newest_whole,
    read_state,
    save_checkpoint,
)
from flowgrpo_fast.training.engine import Engine, build_engine
from flowgrpo_fast.training.evaluate import evaluate
from flowgrpo_fast.training.loop import StepReport, train

_ANY_LENGTH = 1024  # image tokens, for a look at a plan whose shift is known only with the model
_GRACE = 20.0  # seconds that a step has left after SIGTERM; schedulers kill after 30
TRACEBACK = "traceback.txt"  # of the failure that ended a run, for who wants more than its line
_PACKAGE = Path(__file__).parent
CHANGES = "resumed.json"  # which fields of the recipe a resume has changed, and at which step


def new_folder(name: str, root: Path = Path("runs")) -> Path:
    """Makes `root/name-<date>-<time>`, with a number behind it where another run began in the same second."""
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for turn in range(1, 1000):
        folder = root / (stem if turn == 1 else f"{stem}-{turn}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(
                f"cannot write to {str(root)!r}: {error.strerror}; choose another --out"
            ) from None
        return folder
    raise ValueError(f"{str(root / stem)!r} and a thousand like it exist; choose another --out")


@dataclass(slots=True)
class Run:
    """Where a run goes and how it is watched."""

    recipe: Recipe
    folder: Path
    device: torch.device
    resume: bool = False
    checkpoint_every: int = 50
    tracker: TrackerName = "none"
    console: Console = field(default_factory=run_console)

    def start(self) -> Path:
        """Trains to the end, or to Ctrl-C; returns the report's path. Any thread may call it.

        Raises:
            ValueError: a user's mistake or a failed run, in one line. What was finished is saved.
        """
        try:
            self._check()
            with self._locked():
                with out_of_memory_in_one_line(self.recipe, self.device):
                    engine = build_engine(self.recipe, self.device)
                with closing(engine):
                    return self._train(engine)
        except OSError as error:  # of files beside the weights: those that fail to be saved say so themselves
            self._leave_nothing_empty()
            what = (
                f"cannot read or write {error.filename!r}: {error.strerror}" if error.filename else str(error)
            )
            saved = f"; what was saved stands, go on with: {self._resume_command}"
            raise ValueError(what + (saved if self.folder.exists() else "")) from error
        except BaseException:
            self._leave_nothing_empty()
            raise

    def _check(self) -> None:
        """Refuses, before anything is loaded, what cannot run and another run's folder; makes the folder."""
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every is {self.checkpoint_every}; it must be at least 1")
        if os.environ.get("WORLD_SIZE", "") not in ("", "0", "1"):
            raise ValueError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: a run has one process and one device, and each of these "
                "would train by itself; start flowgrpo-fast without torchrun"
            )
        self.recipe.plan(0, _ANY_LENGTH)  # a topology that does not fit
        capacity = memory_of(self.device)
        # The run folder keeps what was chosen: a resumed run has the same forwards, and so the same bits.
        self.recipe = with_forwards(self.recipe, capacity)
        check_memory(self.recipe, self.device, capacity)
        check_links(self.folder)
        # Checkpoints count, too: a new run would take those of its own steps for its own, and leave them as they are.
        begun = (self.folder / "metrics.jsonl").exists() or bool(finished_checkpoints(self.folder))
        if self.resume and not (begun or (self.folder / "recipe.json").exists()):
            raise ValueError(f"{str(self.folder)!r} holds no run to resume; give a folder that `train` made")
        if begun and not self.resume:
            raise ValueError(
                f"{str(self.folder)!r} already holds a run; choose another --out, or --resume it"
            )
        try:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write to {str(self.folder)!r}: {error.strerror}") from None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """No other process or thread runs in this folder, inside."""
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:  # only of this lock: code of the user may wait for others
            raise ValueError(
                f"{str(self.folder)!r} is in use by another run; wait for it, or choose another --out"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _leave_nothing_empty(self) -> None:
        """Removes the folder of a run that failed before it had anything to keep."""
        kept = ("recipe.json", "metrics.jsonl", "checkpoints")
        if self.resume or not self.folder.is_dir() or any((self.folder / name).exists() for name in kept):
            return
        with suppress(ValueError), self._locked():  # else another run is loading its model for this folder
            (self.folder / ".lock").unlink(missing_ok=True)
            for empty in (self.folder / "samples", self.folder):
                with suppress(OSError):  # what else may be there is the user's
                    empty.rmdir()

    def _train(self, engine: Engine) -> Path:
        self._begin(engine)
        earlier = sum(r.get("seconds_step", 0.0) for r in read_metrics(self.folder))
        tracker = make_tracker(self.tracker, self.folder, to_dict(self.recipe))
        # A run that begins writes its own line for step 0.
        log = MetricsLog(self.folder, engine.step or -1, tracker)
        cost = CostMeter(self.device, earlier)
        floor = floor_of(engine)
        self._announce(engine, floor)
        signals = Signals(self.console, lambda: engine.is_whole)
        with signals:  # around the saves, too: what asks twice to stop must not lose the last steps
            try:
                self._steps(engine, log, floor, signals)
                with signals.held():
                    self._save(engine)
            except BaseException as error:
                with signals.held():
                    kept = self._save_whole(engine)
                    with suppress(OSError, ValueError):  # a full disk, say; the error on its way tells more
                        self._conclude(cost)
                if not isinstance(error, Exception):  # a second Ctrl-C, say
                    self._say(escape(kept))
                    raise
                raise ValueError(f"{self._in_one_line(error, engine)}; {kept}") from (
                    error.__cause__ or error
                )
            finally:
                log.close()
        report = self._conclude(cost)
        if signals.stop:
            self._say(f"stopped after step {engine.step}; continue with: {escape(self._resume_command)}")
        return report

    def _steps(self, engine: Engine, log: MetricsLog, floor: Floor | None, signals: Signals) -> None:
        """The first look and every step, each of them recorded."""
        with (
            out_of_memory_in_one_line(self.recipe, self.device),
            TrainingProgress(self.console, self.recipe.num_steps, engine.step) as progress,
        ):
            if engine.step == 0:
                log.write({"step": 0, **self._evaluate(engine, log)})

            def on_step(report: StepReport) -> None:
                record = self._record(engine, report, floor, log, last=signals.stop)
                log.write(record)
                progress.show(record)
                due = engine.step % self.checkpoint_every == 0 and engine.step < self.recipe.num_steps
                if due or signals.take_save():
                    with signals.held():
                        self._save(engine)

            train(engine, on_step, lambda: signals.stop)

    @property
    def _resume_command(self) -> str:
        return f"flowgrpo-fast train --resume {self.folder}"

    def _save(self, engine: Engine) -> None:
        save_checkpoint(engine, self.folder, to_dict(self.recipe))

    def _save_whole(self, engine: Engine) -> str:
        """Saves the last whole step after a failure; says from where the run can go on, and how."""
        reason = f"step {engine.step + 1} failed in the middle of its update"
        if engine.is_whole:
            try:
                self._save(engine)
            except (OSError, ValueError) as error:
                reason = f"step {engine.step} could not be saved, {str(error).split('. ')[0]}"
            else:
                return f"step {engine.step} is saved; continue with: {self._resume_command}"
        last = latest_checkpoint(self.folder)
        step = read_state(last)["step"] if last else 0
        return f"{reason}, step {step} is the last that stands; continue with: {self._resume_command}"

    def _in_one_line(self, error: Exception, engine: Engine) -> str:
        """A failure for the user; the traceback of any but a `ValueError` that this package raised goes to a file."""
        text = " ".join(str(error).split())
        told = isinstance(error, RewardFailed)  # it names what the reward's own code raised, and holds where
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if isinstance(error, ValueError) and not told and _PACKAGE in raised_in.parents:
            return text  # it says what to do; a reward's own, or a library's, may not
        line = text if told else f"step {engine.step + 1}: {type(error).__name__}: {text}"
        trace = error.traceback_text if isinstance(error, RewardFailed) else ""
        where = self.folder / TRACEBACK
        try:
            where.write_text(trace or "".join(traceback.format_exception(error)), encoding="utf-8")
        except OSError:
            return line
        return f"{line} (traceback in {str(where)!r})"

    def _say(self, text: str) -> None:
        """Prints lines that are not broken at a terminal's width, and no numbers coloured."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def _begin(self, engine: Engine) -> None:
        """Goes on from the newest whole checkpoint, if this is a resume; the folder then holds this recipe."""
        recipe = to_dict(self.recipe)
        if self.resume:
            checkpoint, passed_over = newest_whole(self.folder)
            for line in passed_over:
                self._say(escape(line))
            if checkpoint is None:
                self._say("no checkpoint yet: the run begins again at its start")
            else:
                state, changed = read_state(checkpoint), check_resumable(engine, checkpoint, recipe)
                load_checkpoint(engine, checkpoint)
                self._record_changes(engine.step, state["recipe"], changed)
                for name, then in state.get("versions", {}).items():
                    if then != version(name):
                        self._say(
                            f"step {engine.step} was saved with {name} {then}, this is {version(name)}: "
                            "bits may differ from those of an uninterrupted run"
                        )
        try:
            save_recipe(self.recipe, self.folder / "recipe.json")
        except OSError as error:
            raise ValueError(f"cannot write to {str(self.folder)!r}: {error.strerror}") from None

    def _record_changes(self, step: int, before: dict[str, Any], changed: dict[str, tuple[Any, Any]]) -> None:
        """Keeps the recipe up to `step` beside the one from there on, and what differs, for the report."""
        file = self.folder / CHANGES
        earlier = parse_json(file.read_text(encoding="utf-8")) if file.exists() else []
        kept = [entry for entry in earlier if entry["step"] < step]
        if changed:
            kept.append({"step": step, "changed": {name: list(pair) for name, pair in changed.items()}})
            write_whole(self.folder / f"recipe_to_step_{step:06d}.json", json.dumps(before, indent=2) + "\n")
            for name, (old, new) in changed.items():
                self._say(
                    escape(f"from step {step + 1} on, {name} is {json.dumps(new)}; it was {json.dumps(old)}")
                )
        if kept or file.exists():
            write_whole(file, json.dumps(kept, indent=2) + "\n")

    def _announce(self, engine: Engine, floor: Floor | None) -> None:
        recipe = self.recipe
        parameters = sum(p.numel() for p in engine.model.module.parameters() if p.requires_grad)
        self._say(
            f"[bold]{escape(recipe.name)}[/] on {escape(recipe.task.model)}: {parameters:,} trained parameters, "
            f"{recipe.num_prompts} prompts x {recipe.group_size} samples a step, {recipe.machine.precision}, "
            f"{recipe.rollout_rows} rows a forward\n"
            f"{device_name(self.device)}\n{floor or 'floor unknown: the operations of this model cannot be counted'}\n"
            f"{escape(str(self.folder))}"
        )
        if engine.step >= recipe.num_steps:
            self._say(
                f"nothing to train: step {engine.step} of {recipe.num_steps} is done; to go on, raise num_steps"
            )
        for copy in engine.copies:
            self._say(f"low precision: {escape(copy.description)}")

    def _record(
        self, engine: Engine, report: StepReport, floor: Floor | None, log: MetricsLog, last: bool
    ) -> dict[str, float]:
        """One line of metrics; every `eval_every` steps and at the end with an evaluation."""
        evaluation: dict[str, float] = {}
        if report.step % self.recipe.task.eval_every == 0 or last or report.step == self.recipe.num_steps:
            with report.phase("evaluation"):
                evaluation = self._evaluate(engine, log)
        return {
            "step": report.step,
            **report.metrics,
            "lr": engine.learner.optimizer.param_groups[0]["lr"],
            **evaluation,
            **{f"seconds/{name}": round(value, 4) for name, value in report.seconds.items()},
            "seconds_step": round(sum(report.seconds.values()), 4),
            **({"time_over_floor": round(floor.over(report.seconds), 3)} if floor else {}),
        }

    def _evaluate(self, engine: Engine, log: MetricsLog) -> dict[str, float]:
        """A look's numbers; its pictures go to the folder and the tracker."""
        look = evaluate(engine)
        grid = sample_grid(look.images, look.prompts, look.rewards, look.correct)
        name, few = f"step_{engine.step:06d}", slice(self.recipe.task.evaluation.num_saved)
        images, prompts, rewards = look.images[few], look.prompts[few], look.rewards[few]
        try:
            save_picture(grid, self.folder / "samples" / f"{name}.png")
            save_samples(images, prompts, self.folder / "samples" / name, rewards)
        except OSError as error:
            raise ValueError(
                f"cannot write to {str(self.folder / 'samples')!r}: {error.strerror}; finished checkpoints are intact, "
                "free some space, then continue with --resume"
            ) from None
        captions = [
            f"{prompt} [{reward:+.3f}]" for prompt, reward in zip(prompts, rewards.tolist(), strict=True)
        ]
        shown = [
            Picture(picture_of(still(image)), text) for image, text in zip(images, captions, strict=True)
        ]
        log.show(engine.step, Picture(grid, f"step {engine.step}"), shown)
        return look.metrics

    def _conclude(self, cost: CostMeter) -> Path:
        """Summary and report from whatever was recorded."""
        records = read_metrics(self.folder)
        steps = [r for r in records if "reward" in r]
        looks = [r for r in records if "eval/reward" in r]
        if not looks:
            return self.folder / "report.html"
        summary: dict[str, Any] = {
            "recipe": self.recipe.name,
            "model": self.recipe.task.model,
            "seed": self.recipe.seed,
            "steps": records[-1]["step"],
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "device": device_name(self.device),
            "versions": {name: version(name) for name in ("flowgrpo-fast", "torch", "diffusers")},
            "reward_before": looks[0]["eval/reward"],
            "reward_after": looks[-1]["eval/reward"],
            "judge_before": looks[0].get("eval/judge"),
            "judge_after": looks[-1].get("eval/judge"),
            "ratio_self_test": next((r["ratio_self_test"] for r in steps if "ratio_self_test" in r), None),
            "cost": cost.read(),
        }
        write_whole(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return write_report(self.folder)


class Signals:
    """SIGINT (Ctrl-C), SIGTERM and SIGHUP ask the loop to stop after its step, SIGUSR1 to save and go on.

    A second one that stops interrupts at once, but never a save. Who sends SIGTERM kills soon after: a step that has
    not ended some seconds later, in a reward that hangs, say, is interrupted as if by a second one, unless its update
    has begun. What the process ignores stays ignored, as `nohup` asks of SIGHUP. In another thread than the main
    one there are no signals to listen for.
    """

    def __init__(self, console: Console, is_whole: Callable[[], bool]) -> None:
        self.stop = False
        self._is_whole = is_whole  # whether the state is that of a finished step, which can be saved
        self._over = threading.Event()
        self._sending = threading.Lock()
        self._save = False
        self._held = False
        self._console = console
        self._previous: dict[int, Any] = {}

    def take_save(self) -> bool:
        """Whether a save was asked for since the last call."""
        asked, self._save = self._save, False
        return asked

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals are noted, and interrupt nothing, inside."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
                if name in signal.Signals.__members__:  # Windows knows the first two alone
                    number = signal.Signals[name]
                    if signal.getsignal(number) != signal.SIG_IGN:
                        self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        with self._sending:
            self._over.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _hurry(self) -> None:
        """Interrupts the step under way, some seconds from now."""
        wait = _GRACE
        while not self._over.wait(wait):
            wait = 0.2
            with self._sending:
                if not self._over.is_set() and not self._held and self._is_whole():
                    os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._over.is_set():
            return
        if signal.Signals(number).name == "SIGUSR1":
            self._save = True
            return
        if self.stop and not self._held:
            raise KeyboardInterrupt
        if self.stop:
            return
        self.stop = True
        self._console.print("stopping after this step; once more to interrupt it")
        if number == signal.SIGTERM:
            threading.Thread(target=self._hurry, daemon=True).start()
