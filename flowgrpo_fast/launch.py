"""A whole run: folder, evaluation, checkpoints, signals, report. The mathematics is in `training.loop`."""

from __future__ import annotations

import json
import signal
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from flowgrpo_fast.json_files import check_links, write_whole
from flowgrpo_fast.monitor.cost import CostMeter, device_name
from flowgrpo_fast.monitor.metrics import MetricsLog, Picture, TrackerName, make_tracker, read_metrics
from flowgrpo_fast.monitor.pictures import picture_of, sample_grid, save_picture, save_samples, still
from flowgrpo_fast.monitor.progress import TrainingProgress
from flowgrpo_fast.monitor.report import write_report
from flowgrpo_fast.planner.live import Floor, check_memory, floor_of, memory_of, out_of_memory_in_one_line
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.recipe_io import save_recipe, to_dict
from flowgrpo_fast.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from flowgrpo_fast.training.engine import Engine, build_engine
from flowgrpo_fast.training.evaluate import evaluate
from flowgrpo_fast.training.loop import StepReport, train

_ANY_LENGTH = 1024  # image tokens, for a look at a plan whose shift is known only with the model


@dataclass(slots=True)
class Run:
    """Where a run goes and how it is watched."""

    recipe: Recipe
    folder: Path
    device: torch.device
    resume: bool = False
    checkpoint_every: int = 50
    tracker: TrackerName = "none"
    console: Console = field(default_factory=Console)

    def start(self) -> Path:
        """Trains to the end, or to Ctrl-C; returns the report's path.

        Raises:
            ValueError: a user's mistake or a failed run, in one line. What was finished is saved.
        """
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every is {self.checkpoint_every}; it must be at least 1")
        self.recipe.plan(0, _ANY_LENGTH)  # a topology that does not fit is refused before anything is loaded
        check_memory(self.recipe, self.device, memory_of(self.device))
        one_line = out_of_memory_in_one_line(self.recipe, self.device)
        with one_line, closing(build_engine(self.recipe, self.device)) as engine:
            return self._train(engine)

    def _train(self, engine: Engine) -> Path:
        self._prepare_folder(engine)
        earlier = sum(r.get("seconds_step", 0.0) for r in read_metrics(self.folder))
        tracker = make_tracker(self.tracker, self.folder, to_dict(self.recipe))
        log = MetricsLog(self.folder, engine.step, tracker)
        cost = CostMeter(self.device, earlier)
        floor = floor_of(engine)
        self._announce(engine, floor)
        stop = StopSignal(self.console)
        try:
            with stop, TrainingProgress(self.console, self.recipe.num_steps, engine.step) as progress:
                if engine.step == 0:
                    log.write({"step": 0, **self._evaluate(engine, log)})

                def on_step(report: StepReport) -> None:
                    record = self._record(engine, report, floor, log, last=stop.requested)
                    log.write(record)
                    progress.show(record)
                    if engine.step % self.checkpoint_every == 0 and engine.step < self.recipe.num_steps:
                        save_checkpoint(engine, self.folder)

                train(engine, on_step, lambda: stop.requested)
            save_checkpoint(engine, self.folder)
        except BaseException:
            with suppress(OSError):  # a full disk, say; the error that is on its way tells more
                self._conclude(cost)
            raise
        finally:
            log.close()
        report = self._conclude(cost)
        if stop.requested:
            self._say(
                f"stopped after step {engine.step}; "
                f"continue with: flowgrpo-fast train --resume {escape(str(self.folder))}"
            )
        return report

    def _say(self, text: str) -> None:
        """Prints lines that are not broken at a terminal's width, and no numbers coloured."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def _prepare_folder(self, engine: Engine) -> None:
        check_links(self.folder)
        if self.resume:
            checkpoint = latest_checkpoint(self.folder)
            if checkpoint is None:
                raise ValueError(f"{str(self.folder)!r} holds no checkpoint to resume from")
            load_checkpoint(engine, checkpoint)
        elif (self.folder / "metrics.jsonl").exists():
            raise ValueError(
                f"{str(self.folder)!r} already holds a run; choose another --out, or --resume it"
            )
        try:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            save_recipe(self.recipe, self.folder / "recipe.json")
        except OSError as error:
            raise ValueError(f"cannot write to {str(self.folder)!r}: {error.strerror}") from None

    def _announce(self, engine: Engine, floor: Floor | None) -> None:
        recipe = self.recipe
        parameters = sum(p.numel() for p in engine.model.module.parameters() if p.requires_grad)
        self._say(
            f"[bold]{escape(recipe.name)}[/] on {escape(recipe.task.model)}: {parameters:,} trained parameters, "
            f"{recipe.num_prompts} prompts x {recipe.group_size} samples a step, {recipe.machine.precision}\n"
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


class StopSignal:
    """Ctrl-C or SIGTERM asks the loop to stop after its step; a second one interrupts at once."""

    def __init__(self, console: Console) -> None:
        self.requested = False
        self._console = console
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._console.print("stopping after this step; once more to interrupt it")
