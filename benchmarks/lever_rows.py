"""Measures the levers of a training step: seconds, share of the floor, peak memory, launches and syncs.

On the CPU the first thing measured says which size the machine manages in the time it has. Every row then has an
engine of its own, the cheapest first, and all of them take turns in one process; the peak of a step's memory is found
in a fresh process. On a GPU one row after another has the memory to itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script
    sys.path.insert(0, str(ROOT))


from benchmarks.agreement import agreement  # noqa: E402
from benchmarks.counters import Counter  # noqa: E402
from benchmarks.lever_report import COMPILED, EQUAL, FAST, FLASH, LOW, TRAINER, WINDOW  # noqa: E402
from benchmarks.levers import Lever, base, levers, without_kl  # noqa: E402
from benchmarks.networks import SCALES  # noqa: E402
from benchmarks.rows import Row, cpu_multiplies_bf16, rounded  # noqa: E402
from benchmarks.trainer_loop import drawn, wait  # noqa: E402
from flowgrpo_fast.planner.live import Floor, floor_of  # noqa: E402
from flowgrpo_fast.recipe import Recipe  # noqa: E402
from flowgrpo_fast.sampling.step import Forwards  # noqa: E402
from flowgrpo_fast.sampling.walk import Sampler, walk  # noqa: E402
from flowgrpo_fast.schedule.topology import ode_plan  # noqa: E402
from flowgrpo_fast.training.engine import Engine  # noqa: E402
from flowgrpo_fast.training.loop import StepReport  # noqa: E402

_FIRST = (LOW, FAST, TRAINER, COMPILED, FLASH, EQUAL, WINDOW)  # on a GPU, where time may run out
_A_ROW = 40.0  # seconds the first one may take, on a GPU with its compilation; then the longest so far
_ENOUGH = 15.0  # seconds of steps, on a GPU
_HELD = 1 << 30  # bytes that may outlive a row there
_STEPS_A_ROW = 9  # that measuring it takes on the CPU: first, counted, timed, and for its memory
_COMPILING = 180.0  # seconds that a row on the CPU may take that compiles
_STARTING = 15.0  # seconds until a fresh process is ready to load
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
    compiles: bool = True  # blocks stay compiled after the row that compiles them

    @property
    def recipe(self) -> Recipe:
        """What the rows start from."""
        recipe = base(self.network, self.group_size, self.num_prompts, self.precision)
        recipe = replace(
            recipe,
            network=replace(recipe.network, checkpointing=self.checkpointing),
            machine=replace(recipe.machine, rows_per_forward=self.rows or self.group_size),
        )
        return without_kl(replace(recipe, guidance_scale=1.0)) if self.distilled else recipe

    @property
    def levers(self) -> list[Lever]:
        """Its rows."""
        return levers(self.recipe, self.compiles)

    def __str__(self) -> str:
        """As tables name it."""
        images = self.group_size * self.num_prompts
        rows = f", {self.rows} a forward" if self.rows else ""
        return f"{self.network} x{images}, {self.precision}{rows}"


# From what an idle server manages to a size for slow, busy cores; two prompts, so that a forward may take both.
CPU_SIZES = (
    ("small_sd3", 12, 2),
    ("small_sd3", 6, 2),
    ("smaller_sd3", 6, 2),
    ("smaller_sd3", 4, 2),
    ("tiny_sd3", 4, 2),
)
# Rows a forward: what 80 GB hold of the trainers' loop, which keeps both halves of guidance for the backward.
GPU_JOBS = (
    Job("sd35_medium", 24, 1, "bf16", rows=8),
    Job("flux", 24, 1, "bf16", rows=12, checkpointing="full", distilled=True),
)
TINY_JOBS = (
    Job("tiny_sd3", 4, 2, "fp32"),
    Job("tiny_flux", 4, 2, "bf16", checkpointing="full", distilled=True),
)


def cpu_jobs() -> list[Job]:
    """The sizes in the precision that the CPU has instructions for."""
    precision = "bf16" if cpu_multiplies_bf16() else "fp32"
    return [Job(*size, precision=precision, compiles=False) for size in CPU_SIZES]


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
            "precision": recipe.machine.precision,
            "rows_per_forward": recipe.rollout_rows,
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

    Without `jobs` a CPU is given the largest of `CPU_SIZES` that it will manage. Within `limit` seconds no row is begun
    that may not end. `only`: rows whose name contains this.
    """
    result: dict[str, Any] = {"jobs": [], "left": []}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is emulated on")
        if device.type == "cuda":
            jobs = jobs or GPU_JOBS
            result["jobs"] = [described(job) for job in jobs]
            one_by_one(jobs, device, rounds, limit, lambda: keep(result), result, only)
            return result
        deadline, size = time.perf_counter() + limit, ""
        if jobs is None:
            job, size = fitting_job(limit)
            jobs = (job,)
        for job in jobs:
            into = described(job) | {"size": size}
            result["jobs"].append(into)
            in_turns(job, rounds, deadline, lambda: keep(result), into, result["left"], only)
    return result


def described(job: Job) -> dict[str, Any]:
    """What a result says of a job, before there are rows."""
    found: dict[str, Any] = {"job": str(job), "precision": job.precision, "rows": [], "failed": {}}
    if job.precision == "fp32":
        found["precision_because"] = (
            "this CPU has no bf16 instructions" if not cpu_multiplies_bf16() else "asked for"
        )
    return found


def _say(text: str) -> None:
    print(f"\r{text:70}", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- in turns, CPU


def work(lever: Lever) -> float:
    """Rows that go through the network in a step of a row, one that also goes back counted thrice."""
    recipe = lever.recipe
    plan, halves = recipe.plan(0), 1 if recipe.guidance_scale == 1 else 2
    edges = [plan.steps[place] for place in plan.kept]
    trained = recipe.num_prompts * sum(
        recipe.group_size if lever.trainer else len(s.kept_heads) for s in edges
    )
    # Trainers take both halves back through the network, whether or not the gradient is of both.
    both = halves if lever.trainer or recipe.unconditional_gradient else 1
    penalised = halves if recipe.requires.snapshots else 0
    return plan.evaluations(recipe.num_prompts) * halves + trained * (3 * both + penalised)


def fitting_job(limit: float) -> tuple[Job, str]:
    """The largest job whose rows will be measured within `limit` seconds, and why that one.

    The cheapest row of a small job is measured; all others are reckoned by the tokens that their steps take through the
    network. Small forwards use a machine worse, so that larger jobs come out rather too expensive.
    """
    jobs, tokens = (
        cpu_jobs(),
        {name: SCALES[name].tokens + SCALES[name].image_tokens for name, *_ in CPU_SIZES},
    )
    known = jobs[-2]  # the last one is overhead alone, which says nothing of the others
    cheapest = min((lever for lever in known.levers if not lever.recipe.network.compile), key=work)
    _say(f"levers: how fast is {known}?")
    runner = Runner(cheapest, torch.device("cpu"))
    for _ in range(2):
        runner.time()
    least = min(runner.seconds)
    unit = least / work(cheapest) / tokens[known.network]
    for job in jobs:
        rows = [lever for lever in job.levers if not lever.recipe.network.compile]
        seconds = unit * tokens[job.network] * sum(map(work, rows))
        if _STEPS_A_ROW * seconds <= limit:
            break
    return job, (
        f"{job}: a step of each of {len(rows)} rows was reckoned to take {seconds:.2g} s in all, {_STEPS_A_ROW} of "
        f"them to be done in {limit:.0f} s; {cheapest.name.removeprefix('+ ')} of {known} took {least:.2g} s"
    )


def in_turns(
    job: Job,
    rounds: int,
    deadline: float,
    keep: Callable[[], None],
    into: dict[str, Any],
    left: list[str],
    only: str = "",
) -> None:
    """All rows of a job on the CPU, the cheapest first, then again and again in turns; last the peaks of memory."""
    device = torch.device("cpu")
    names = [lever.name for lever in job.levers]
    order = sorted(job.levers, key=lambda lever: (lever.recipe.network.compile, work(lever)))
    runners: list[Runner] = []
    unit, peaks = 0.0, dict[str, int | None]()  # seconds a row of the network, the slowest so far

    def has_time(seconds: float) -> bool:
        return time.perf_counter() + seconds < deadline

    def write() -> None:
        rates = [runner.floor.rate for runner in runners if runner.floor]
        rows = [runner.row(max(rates, default=None)) for runner in runners]
        into["rows"] = sorted(rows, key=lambda row: names.index(row["name"]))
        for row in into["rows"]:
            row["peak_bytes"] = peaks.get(row["name"])
        compare(into["rows"])
        keep()

    for lever in order:
        if only not in lever.name:
            continue
        # A first step also tests the ratio, a counted one takes its time.
        expected = _COMPILING if lever.recipe.network.compile else 4 * unit * work(lever)
        if not has_time(expected):
            left.append(f"{job}: {lever.name}")
            continue
        _say(f"levers: {lever.name}")
        try:
            runner = Runner(lever, device)
            runner.count()
            runner.time()
        except Exception as error:  # the other rows are worth having
            into["failed"][lever.name] = _line(error)
            continue
        runners.append(runner)
        unit = max(unit, runner.seconds[0] / work(lever))
        write()
    if not only and has_time(4 * unit * work(order[-1])):
        _say("levers: do both loops compute the same?")
        into["agreement"] = {n: rounded(v) for n, v in agreement(job.recipe, device).items()}
    for number in range(1, rounds):
        for runner in runners:
            if has_time(2 * max(runner.seconds)):
                _say(f"levers: round {number + 1} of {rounds}, {runner.lever.name}")
                runner.time()
        write()
    for runner in runners:
        # A process that starts, loads, and takes two steps.
        if has_time(_STARTING + 2 * runner.first_seconds):
            peaks[runner.lever.name] = _peak_elsewhere(job, runner.lever.name)
            write()


# ---------------------------------------------------------------------------------------------- one by one, GPU


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
    order = [(number, lever) for number, job in enumerate(jobs) for lever in job.levers]
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
    if runner.engine.copies:
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
    recipe, device, sampler = engine.recipe, engine.device, engine.stage.sampler
    draws = drawn(recipe, len(engine.prompts), 0, device)
    conditioning = engine.stage.conditioning.rows(draws.prompt_index[draws.group_id])
    plan = ode_plan(recipe.sigmas.grid(engine.seq_len), group_size=recipe.num_drawn)
    times: dict[str, list[float]] = {"training": [], "low": []}
    for _ in range(rounds + 1):
        for name, policy in (("training", sampler.policy), ("low", sampler.outside)):
            assert policy is not None
            wait(device)
            start = time.perf_counter()
            walk(
                Sampler(policy=policy, forwards=Forwards(rows=recipe.rollout_rows)), plan, conditioning, draws
            )
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


# ---------------------------------------------------------------------------------------------- memory, CPU


def _peak_elsewhere(job: Job, name: str) -> int | None:
    """What a step adds at most to a fresh process's memory, weights left out; None where the system does not say."""
    _say(f"levers: memory of {name}")
    command = [sys.executable, str(Path(__file__).resolve()), "--peak", json.dumps(asdict(job)), name]
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the bytes that one step of a row needs at its peak.")
    parser.add_argument("--peak", nargs=2, metavar=("job", "row"), required=True)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    job, name = Job(**json.loads(arguments.peak[0])), arguments.peak[1]
    print(_step_peak(next(lever for lever in job.levers if lever.name == name)))


if __name__ == "__main__":
    main()
