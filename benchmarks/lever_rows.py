"""Measures the levers of a training step: seconds, share of the floor, peak memory, launches and syncs.

On the CPU every row has an engine of its own and all of them take turns in one process; the peak of a step's memory is
found in a fresh process. On a GPU one row after another has the memory to itself.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script
    sys.path.insert(0, str(ROOT))

from flowgrpo_fast.sampling.sampler import rollout  # noqa: E402
from flowgrpo_fast.sampling.schedule import ode_schedule  # noqa: E402
from flowgrpo_fast.training.sample import draw  # noqa: E402

from benchmarks.agreement import agreement  # noqa: E402
from benchmarks.counters import Counter  # noqa: E402
from benchmarks.lever_report import COMPILED, EQUAL, FAST, FLASH, LOW, TRAINER, WINDOW  # noqa: E402
from benchmarks.levers import Lever, base, levers  # noqa: E402
from benchmarks.rows import Row, rounded  # noqa: E402
from benchmarks.trainer_loop import wait  # noqa: E402
from flowgrpo_fast.planner.live import Floor, floor_of  # noqa: E402
from flowgrpo_fast.recipe import ClippedRatio, Recipe  # noqa: E402
from flowgrpo_fast.training.engine import Engine  # noqa: E402
from flowgrpo_fast.training.loop import StepReport  # noqa: E402

_FIRST = (LOW, FAST, TRAINER, COMPILED, FLASH, EQUAL, WINDOW)  # on a GPU, where time may run out
_A_ROW = 40.0  # seconds the first one may take, on a GPU with its compilation; then the longest so far
_ENOUGH = 15.0  # seconds of steps, on a GPU
_HELD = 1 << 30  # bytes that may outlive a row there
_LARGE_BLOCKS = "1048576"  # bytes from which freed memory goes back to the system, so that a peak can be seen


@dataclass(frozen=True)
class Job:
    """A network and its batch."""

    network: str
    group_size: int
    num_prompts: int
    precision: str
    rows: int = 0  # a forward; 0: a group
    checkpointing: str = "none"
    distilled: bool = False  # guidance is embedded: one forward a velocity, and trained without a KL

    @property
    def recipe(self) -> Recipe:
        """What the rows start from."""
        recipe = base(self.network, self.group_size, self.num_prompts, self.precision)
        network = replace(recipe.network, checkpointing=self.checkpointing)
        recipe = replace(recipe, network=network, rows_per_forward=self.rows or self.group_size)
        if not self.distilled:
            return recipe
        assert isinstance(recipe.loss, ClippedRatio)
        return replace(recipe, guidance_scale=1.0, loss=replace(recipe.loss, kl_beta=0.0))

    def __str__(self) -> str:
        """As tables name it."""
        images = self.group_size * self.num_prompts
        rows = f", {self.rows} a forward" if self.rows else ""
        return f"{self.network} x{images}, {self.precision}{rows}"


CPU_JOBS = (Job("small_sd3", 12, 2, "bf16"),)
# Rows a forward: what 80 GB hold of the trainers' loop, which keeps both halves of guidance for the backward.
GPU_JOBS = (
    Job("sd35_medium", 24, 1, "bf16", rows=8),
    Job("flux", 24, 1, "bf16", rows=12, checkpointing="full", distilled=True),
)
TINY_JOBS = (
    Job("tiny_sd3", 4, 2, "fp32"),
    Job("tiny_flux", 4, 2, "bf16", checkpointing="full", distilled=True),
)


class Runner:
    """A row under measurement."""

    def __init__(self, lever: Lever, device: torch.device) -> None:
        self.lever, self.device = lever, device
        self.engine: Engine = lever.engine(device)
        self.floor: Floor | None = floor_of(self.engine)  # of the recipe, whoever runs it
        self.step: Callable[[], StepReport] = lever.step(self.engine)
        self.seconds: list[float] = []
        self.phases: list[dict[str, float]] = []
        self.counts: dict[str, int] | None = None
        start = time.perf_counter()
        self.first = self.step()  # compiles, and tests the ratio
        self.first_seconds = time.perf_counter() - start

    def time(self) -> None:
        """One step."""
        wait(self.device)
        start = time.perf_counter()
        report = self.step()
        wait(self.device)
        self.seconds.append(time.perf_counter() - start)
        self.phases.append(report.seconds)

    def count(self) -> None:
        """Launches, bytes and syncs of a step; a compiled block hides its own, so there is no count then."""
        if self.lever.recipe.network.compile:
            self.step()
            return
        with Counter() as counter:
            self.step()
        self.counts = counter.as_dict()

    def row(self, rate: float | None) -> Row:
        """What was found; `rate` in FLOP/s for floors on a machine that no table knows."""
        recipe, middle = self.lever.recipe, statistics.median(self.seconds)
        floor = self.floor and (self.floor.flops / rate if rate else self.floor.seconds)
        names = self.phases[0]
        return {
            "name": self.lever.name,
            "images": self.lever.images,
            "seconds": rounded(middle),
            "seconds_min": rounded(min(self.seconds)),
            "rounds": len(self.seconds),
            "phases": {n: rounded(statistics.median(p[n] for p in self.phases)) for n in names},
            "images_per_s": rounded(self.lever.images / middle),
            "tflop": rounded(self.floor.flops / 1e12) if self.floor else None,
            "floor_s": rounded(floor) if floor else None,
            "counts": self.counts,
            "first_step_s": rounded(self.first_seconds),
            "ratio_error": self.first.metrics.get("ratio_self_test"),
            "compiled": recipe.network.compile,
        }


def measure_levers(
    device: torch.device,
    jobs: tuple[Job, ...] | None = None,
    rounds: int = 3,
    limit: float = 1e9,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
    only: str = "",
) -> dict[str, Any]:
    """All jobs of a device; `keep` is given what there is after every row, for a measurement that is cut short.

    `limit` in seconds is for a GPU: the rows that targets are about come first, and none is begun that may not end.
    `only`: rows whose name contains this.
    """
    jobs = jobs or (GPU_JOBS if device.type == "cuda" else CPU_JOBS)
    found: list[dict[str, Any]] = [{"job": str(job), "rows": [], "failed": {}} for job in jobs]
    result: dict[str, Any] = {"jobs": found, "left": []}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is emulated on")
        if device.type == "cuda":
            one_by_one(jobs, device, rounds, limit, lambda: keep(result), result, only)
            return result
        for job, into in zip(jobs, found, strict=True):
            into["agreement"] = {n: rounded(v) for n, v in agreement(job.recipe, device).items()}
            rows = [lever for lever in levers(job.recipe) if only in lever.name]
            into["rows"] = _in_turns(rows, device, rounds, into["failed"])
            for row in into["rows"]:
                row["peak_bytes"] = _peak_elsewhere(job, row["name"])
            compare(into["rows"])
            keep(result)
    return result


def _say(text: str) -> None:
    print(f"\r{text:70}", end="", file=sys.stderr, flush=True)


def _in_turns(rows: list[Lever], device: torch.device, rounds: int, failed: dict[str, str]) -> list[Row]:
    runners = []
    for lever in rows:
        _say(f"levers: {lever.name}")
        try:
            runners.append(Runner(lever, device))
        except Exception as error:  # the other rows are worth having
            failed[lever.name] = _line(error)
    for runner in runners:
        _say(f"levers: counting {runner.lever.name}")
        runner.count()
    for number in range(rounds):
        for runner in runners:
            _say(f"levers: round {number + 1} of {rounds}, {runner.lever.name}")
            runner.time()
    rates = [runner.floor.rate for runner in runners if runner.floor]
    return [runner.row(max(rates, default=None)) for runner in runners]


def one_by_one(
    jobs: tuple[Job, ...],
    device: torch.device,
    rounds: int,
    limit: float,
    keep: Callable[[], None],
    result: dict[str, Any],
    only: str = "",
) -> None:
    """Each row with the device to itself, into `result`."""
    start, longest = time.perf_counter(), _A_ROW
    order = [(number, lever) for number, job in enumerate(jobs) for lever in levers(job.recipe)]
    names = [lever.name for _, lever in order]
    chosen = [each for each in order if only in each[1].name]
    for number, lever in sorted(chosen, key=lambda each: _turn(each[1])):
        begun, into = time.perf_counter(), result["jobs"][number]
        if begun - start + longest > limit:
            result["left"].append(f"{into['job']}: {lever.name}")
            continue
        _say(f"levers: {into['job']}, {lever.name}")
        try:
            into["rows"].append(_alone(lever, device, rounds))
        except Exception as error:  # out of memory, or no compiler: the other rows are worth having
            into["failed"][lever.name] = _line(error)
        if device.type == "cuda":
            _empty()
        longest = max(longest, time.perf_counter() - begun)
        into["rows"].sort(key=lambda row: names.index(row["name"]))
        compare(into["rows"])
        keep()


def _empty() -> None:
    """Gives a row's memory back; what the compiler's caches hold, too, at the price of compiling again."""
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.memory_allocated() > _HELD:
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _turn(lever: Lever) -> int:
    return _FIRST.index(lever.name) if lever.name in _FIRST else len(_FIRST)


def _alone(lever: Lever, device: torch.device, rounds: int) -> Row:
    """A row that has the device to itself."""
    runner = Runner(lever, device)

    def timed() -> None:
        while len(runner.seconds) < rounds and sum(runner.seconds) < _ENOUGH:
            runner.time()

    row = counted_row(runner, timed)
    if runner.engine.low_precision is not None:
        row["rollouts"] = rollouts(runner.engine, rounds)
    return row


def counted_row(runner: Runner, timed: Callable[[], Any]) -> Row:
    """The row of a runner that `timed` times, with counts and, on CUDA, the peak of its memory."""
    runner.count()
    if runner.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timed()
    row = runner.row(None)
    if runner.device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
        row["counts"] = row["counts"] or {"launches": _launches(runner.step)}
    return row


def _launches(step: Callable[[], Any]) -> int:
    """Kernels, copies and fills of a step, from the device's own trace."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.self_device_time_total > 0)


@torch.no_grad()
def rollouts(engine: Engine, rounds: int = 3) -> dict[str, float]:
    """Seconds of the deterministic walk in the training precision and in the low one, in turns."""
    recipe, device = engine.recipe, engine.device
    draws = draw(recipe, len(engine.prompt_set), 0, device)
    conditioning = engine.conditioning.rows(draws.prompt_index[draws.group_id])
    schedule = ode_schedule(recipe.sigmas, engine.seq_len)
    times: dict[str, list[float]] = {"training": [], "low": []}
    for _ in range(rounds + 1):
        for name, model in (("training", engine.model), ("low", engine.outside)):
            wait(device)
            start = time.perf_counter()
            rollout(model, conditioning, draws, schedule, recipe)
            wait(device)
            times[name].append(time.perf_counter() - start)
    found = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {name: rounded(value) for name, value in found.items()} | {
        "speedup": rounded(found["training"] / found["low"])
    }


def compare(rows: list[Row]) -> None:
    """Adds each row's ratios: to the floor, and to the loop trainers write on Flow-GRPO's recipe, per image."""
    first = next((row for row in rows if row["name"] == TRAINER), None)
    for row in rows:
        row["over_floor"] = rounded(row["seconds"] / row["floor_s"]) if row["floor_s"] else None
        for name, key in (("speedup", "seconds"), ("speedup_by_min", "seconds_min")):
            row[name] = rounded(first[key] / first["images"] * row["images"] / row[key]) if first else None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


# ------------------------------------------------------------------------------------------ memory, CPU


def _peak_elsewhere(job: Job, name: str) -> int | None:
    """What a step adds at most to a fresh process's memory, weights left out; None where the system does not say."""
    _say(f"levers: memory of {name}")
    command = [sys.executable, str(Path(__file__).resolve()), "--peak", job.network, name]
    command += ["--threads", str(torch.get_num_threads())]
    allocator = {"MALLOC_MMAP_THRESHOLD_": _LARGE_BLOCKS, "MALLOC_TRIM_THRESHOLD_": _LARGE_BLOCKS}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | allocator)
    last = done.stdout.split()[-1:] if done.returncode == 0 else []
    return int(last[0]) if last and last[0].isdigit() else None


def _step_peak(lever: Lever) -> int:
    """Bytes of resident memory at the peak of a step, above those before it."""
    runner = Runner(lever, torch.device("cpu"))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = _resident("VmRSS")
    runner.step()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _all_jobs() -> Iterator[Job]:
    yield from (*CPU_JOBS, *GPU_JOBS, *TINY_JOBS)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the bytes that one step of a row needs at its peak.")
    parser.add_argument("--peak", nargs=2, metavar=("network", "row"), required=True)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    network, name = arguments.peak
    job = next(job for job in _all_jobs() if job.network == network)
    lever = next(lever for lever in levers(job.recipe) if lever.name == name)
    print(_step_peak(lever))


if __name__ == "__main__":
    main()
