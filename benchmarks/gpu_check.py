"""Builds, tests and measures on a machine with a GPU, in four parts. Needs torch and nvcc, no network.

make gpu-check                                  all four, half an hour; PART=first one of them. The same:
python benchmarks/gpu_check.py first --output FOLDER

first     environment, smoke test, the twelve numbers, the quick tests
checks    large tests, a failed capture, the sanitizers, the profiler's counters
tables    every op against eager and compiled PyTorch, rollouts, training steps
levers    a training step of a transformer, lever by lever

A part takes seven minutes at most, stands alone and is worth having if it is the last. Its stages run one after
another, each with a time limit: a failing one does not stop the others, one that overruns is stopped, one with no time
left is skipped. After every stage FOLDER has gpu_check_<part>.json and, with the logs of all stages,
gpu_check_<part>.tar.gz; stages write their own results row by row.

Packages that the machine lacks, or has older than pyproject.toml needs, are taken from a folder of wheels, by default
`wheels/` next to the Makefile, made where there is a network with

    pip download --dest wheels --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 diffusers ...

and installed beside the machine's own, into build/gpu_check/site. What is still missing is skipped and listed. Exit
status: 0 all passed, 1 something failed, 2 no CUDA device.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(ROOT))

from benchmarks import lever_report, report  # noqa: E402
from benchmarks.gpu_stages import NEEDED, Stage, read_levers, read_sanitizer, read_tests  # noqa: E402

WORK = ROOT / "build" / "gpu_check"
PARTS = ("first", "checks", "tables", "levers")
BUDGET = 420  # seconds of a part from its first line to its last stage; one that can use it gets what the others left
INSTALLING = 60  # of these for the packages
LEAST = 10  # with less a stage is not worth starting
# In a process of its own, since what a capture that fails leaves behind can fail every test after it.
FAILING_CAPTURE = "tests/sampling/test_graphs.py::test_a_failed_capture_does_not_fail_the_next"


@dataclass(frozen=True)
class Command:
    """One program with a limit, and how its result is read beyond the exit status."""

    name: str
    arguments: list[str]
    limit: int  # seconds
    environment: dict[str, str] = field(default_factory=dict)
    read: Callable[[Stage, str], None] | None = None
    starting: int = 0  # seconds before and after what it measures: it is told the rest, and does what fits
    stretches: bool = False  # it can use more than its limit

    @property
    def least(self) -> int:
        """Seconds that the stages before it leave to it."""
        return self.limit if self.stretches else min(self.limit, self.starting + LEAST)

    @property
    def told(self) -> list[str]:
        """The arguments, with its own limit where it heeds one."""
        return self.arguments + (["--limit", str(self.limit - self.starting)] if self.starting else [])

    def within(self, seconds: float) -> Command:
        """With no more than the time that is left, or all of it where it can use that."""
        return replace(self, limit=int(seconds if self.stretches else min(self.limit, seconds)))


def run(command: Command, folder: Path) -> Stage:
    """Runs a command to its end or its limit; its output goes to <folder>/<name>.log, and the tail into the result."""
    stage, start = Stage(command.name), time.perf_counter()
    log = folder / f"{command.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command.told,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment() | command.environment,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=command.limit)
            stage.status = "passed" if code == 0 else "failed"
            stage.detail = "" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            stage.status, stage.detail = "timed out", f"stopped after {command.limit} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)  # the session this process started, with everything in it
                process.wait()
    text = log.read_text(errors="replace")
    if command.read:
        read(command.read, stage, text)
    if stage.status in ("failed", "timed out"):
        stage.detail += "; " + " | ".join(text.strip().splitlines()[-8:])
    stage.seconds = round(time.perf_counter() - start, 1)
    return stage


def read(reader: Callable[[Stage, str], None], stage: Stage, text: str) -> None:
    """What a stage has written; half a file, of one that was stopped, fails it and nothing else."""
    try:
        reader(stage, text)
    except Exception as error:
        stage.status = "failed" if stage.status == "passed" else stage.status
        stage.detail = f"{stage.detail}; result not read: {type(error).__name__}: {error}".lstrip("; ")


def environment() -> dict[str, str]:
    """This process's, with the checkout and the unpacked wheels importable."""
    path = [str(ROOT), str(WORK / "site"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}


def install(wheels: Path) -> Stage:
    """Installs the wheels whose packages the machine lacks or has too old, and lists what is still missing."""
    stage, start = Stage("packages"), time.perf_counter()
    wanted = [str(path) for path in sorted(wheels.glob("*.whl")) if not installed(path.name.split("-")[0])]
    if wanted:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        # Compiling bytecode takes longer than all else, and what is imported is compiled then.
        command += ["--no-compile", "--no-cache-dir", "--target", str(WORK / "site"), *wanted]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALLING)
            if done.returncode:
                stage.status, stage.detail = "failed", done.stderr.strip()[-500:]
        except subprocess.TimeoutExpired:
            stage.status, stage.detail = "timed out", f"stopped after {INSTALLING} s"
    stage.numbers = {"installed": [Path(name).name for name in wanted], "missing": missing()}
    stage.seconds = round(time.perf_counter() - start, 1)
    return stage


def numbers_of(version: str) -> list[int]:
    """A release's numbers, to compare: 77, 84.2.1."""
    return [int(number) for number in re.findall(r"\d+", version.split("+")[0])]


def needed(distribution: str) -> str:
    """The oldest version of a package that pyproject.toml allows; 0 where it does not say."""
    project = (ROOT / "pyproject.toml").read_text()
    found = re.search(rf'"{re.escape(distribution)}[>=]=([\d.]+)', project.replace("_", "-"))
    return found[1] if found else "0"


def installed(distribution: str) -> bool:
    """Whether the machine itself, or a part before, has a package, and not too old a one."""
    name = distribution.replace("_", "-")
    places = [*sys.path, str(WORK / "site")]
    versions = [found.version for found in importlib.metadata.distributions(name=name, path=places)]
    return any(numbers_of(version) >= numbers_of(needed(name)) for version in versions)


def missing() -> dict[str, str]:
    """Packages that cannot be imported, and what goes without them."""
    code = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"
    found = subprocess.run(
        [sys.executable, "-c", code, *NEEDED], capture_output=True, text=True, env=environment(), cwd=ROOT
    )
    return {name: NEEDED[name] for name in found.stdout.split()}


def commands(part: str, folder: Path, arch: str, lacking: Collection[str] = ()) -> list[Command]:
    """The stages of a part after the packages; with theirs, limits add up to the budget."""
    python, script = sys.executable, str(ROOT / "benchmarks")
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-v"]
    if "xdist" not in lacking:
        pytest += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadfile"]
    # Where a conftest lacks a package, pytest runs nothing at all.
    folders = "tests/ops" if {"diffusers", "transformers", "peft", "safetensors"} & {*lacking} else "tests"
    # One line a test as it ends, so that a stage that was stopped says which have run.

    def tests(name: str, limit: int, *chosen: str) -> Command:
        junit = folder / f"{name}.xml"
        return Command(name, [*pytest, f"--junitxml={junit}", *chosen], limit, read=read_tests(junit))

    if part == "first":
        stages = [
            Command("smoke", [python, f"{script}/gpu_smoke.py"], 50),
            Command("numbers", [python, f"{script}/gpu_numbers.py", "--output", str(folder)], 60),
            tests("tests", 130, "-m", "gpu and not slow", f"--deselect={FAILING_CAPTURE}", folders),
        ]
    elif part == "checks":
        plain = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        smoke, once = [python, f"{script}/gpu_smoke.py"], [python, f"{script}/gpu_numbers.py", "--once"]
        stages = [
            tests("capture", 30, FAILING_CAPTURE),
            tests("large", 75, "-m", "gpu and slow", folders),
            Command("memcheck", [*sanitizer("memcheck"), *smoke], 55, plain, read_sanitizer),
            Command("racecheck", [*sanitizer("racecheck"), *smoke], 50, plain, read_sanitizer),
            Command("counters", [*profiler(), *once], 30),
        ]
    elif part == "tables":
        measure = [
            python,
            f"{script}/measure.py",
            "--device",
            "cuda",
            "--output",
            str(folder),
            "--seconds",
            "0.1",
        ]
        stages = [
            Command("ops", [*measure, "ops", "--compiled", "SD3.5 512 x24 bfloat16"], 140, starting=30),
            Command("rollout", [*measure, "rollout"], 50, starting=15),
            Command("train_step", [*measure, "train_step"], 50, starting=15),
        ]
    else:
        measure = [python, f"{script}/measure.py", "--device", "cuda", "--output", str(folder), "levers"]
        stages = [Command("levers", measure, 240, read=read_levers(folder), starting=25, stretches=True)]
    # A build that there is takes a second, and what it leaves goes to the stages after it.
    build = {
        "FLOWGRPO_FAST_ARCHS": arch,
        "FLOWGRPO_FAST_BUILD": str(WORK / "objects"),
        "FLOWGRPO_FAST_CUDA": "1",
    }
    return [Command("build", [python, "setup.py", "--quiet", "build_ext", "--inplace"], 120, build), *stages]


def sanitizer(tool: str) -> list[str]:
    """compute-sanitizer on our kernels alone, where it can tell them apart; empty where there is none."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    program = shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")
    if program is None:
        return []
    known = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    only = ["--kernel-name", "kernel_substring=flowgrpo_fast"] if "--kernel-name" in known else []
    quiet = (
        ["--report-api-errors", "no"] if "--report-api-errors" in known else []
    )  # torch probes what it may not
    return [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *quiet, *only]


def profiler() -> list[str]:
    """Nsight Compute on our kernels, the clock as it is in use; empty where there is none."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    program = shutil.which("ncu") or shutil.which(f"{home}/bin/ncu")
    if program is None:
        return []
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy")
    kernels = ["--kernel-name", "regex:flow_step|flow_log_prob|matching|quantize", "--launch-count", "24"]
    return [
        program,
        "--clock-control",
        "none",
        *kernels,
        *(word for s in sections for word in ("--section", s)),
    ]


def absent(command: Command, lacking: dict[str, str]) -> str:
    """Why a stage cannot run here, or nothing."""
    program = {"memcheck": "compute-sanitizer", "racecheck": "compute-sanitizer", "counters": "ncu"}.get(
        command.name
    )
    if program and not command.arguments[0].endswith(program):
        return f"{program} not found"
    needs = {
        "build": ("pybind11", "ninja"),
        "tests": ("pytest",),
        "capture": ("pytest",),
        "large": ("pytest",),
        "ops": ("numpy",),
        "rollout": ("numpy", "diffusers", "peft"),
        "train_step": ("numpy", "diffusers", "peft", "sklearn"),
        "levers": ("numpy", "diffusers", "transformers", "peft"),
    }
    names = [name for name in needs.get(command.name, ()) if name in lacking]
    return f"needs {', '.join(names)}" if names else ""


def run_all(commands: list[Command], lacking: dict[str, str], deadline: float) -> Iterator[Stage]:
    """The stages in order, each within what is left when the least of those after it is set aside."""
    for number, command in enumerate(commands):
        later = sum(each.least for each in commands[number + 1 :])
        fitted = command.within(deadline - later - time.perf_counter())
        why = absent(command, lacking)
        if not why and fitted.limit < command.least:
            why = f"out of time: {max(fitted.limit, 0)} s are left of {BUDGET}"
        yield Stage(command.name, "skipped", detail=why) if why else run(fitted, WORK)


def gpu() -> dict[str, str] | None:
    """The GPU and what drives it; None without one."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "arch": f"{major}{minor}",
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }


def summary(part: str, machine: dict[str, str], stages: list[Stage]) -> dict[str, Any]:
    """What is written: machine, date, every stage, and in one place everything that was skipped."""
    skipped = {stage.name: stage.detail for stage in stages if stage.status == "skipped"}
    for stage in stages:
        skipped |= stage.numbers.get("skipped_for_packages", {})
        skipped |= {f"package {name}": why for name, why in stage.numbers.get("missing", {}).items()}
    return {
        "part": part,
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "seconds": round(sum(stage.seconds for stage in stages), 1),
        "failed": [stage.name for stage in stages if stage.status in ("failed", "timed out")],
        "skipped": skipped,
        "targets": targets(),
        "stages": [asdict(stage) for stage in stages],
    }


def targets() -> list[dict[str, str]]:
    """The GPU's goals against what was measured just now."""
    ops, levers = (
        json.loads(path.read_text()) if path.exists() else None
        for path in (WORK / "ops_cuda.json", WORK / "levers_cuda.json")
    )
    keys = ("target", "verdict", "rows", "worst")
    lines = report.targets(ops, "cuda") + lever_report.targets(levers, "cuda")
    return [dict(zip(keys, line, strict=True)) for line in lines]


def show(stage: Stage) -> None:
    """One line a stage, at once."""
    counts = {k: v for k, v in stage.numbers.items() if isinstance(v, int)}
    numbers = "  ".join(f"{name} {value}" for name, value in counts.items())
    print(
        f"{stage.name:12} {stage.status:10} {stage.seconds:6.1f} s  {numbers}  {stage.detail[:600]}",
        flush=True,
    )


def keep(part: str, machine: dict[str, str], stages: list[Stage], output: Path) -> dict[str, Any]:
    """Writes what there is by now: the part's file, the measurements, and all logs in one archive."""
    result = summary(part, machine, stages)
    path = output / f"gpu_check_{part}.json"
    half = path.with_suffix(".part")
    half.write_text(json.dumps(result, indent=1) + "\n")
    half.replace(path)
    for measured in WORK.glob("*_cuda.json"):
        shutil.copy(measured, output)
    archive = output / f"gpu_check_{part}.tar.gz"
    half = archive.with_suffix(".part")
    with tarfile.open(half, "w:gz") as file:
        for log in sorted({*WORK.glob("*.log"), *WORK.glob("*.xml"), *WORK.glob("*_cuda.json"), path}):
            file.add(log, log.name)
    half.replace(archive)
    return result


def check(part: str, machine: dict[str, str], wheels: Path, output: Path) -> list[str]:
    """One part from the packages to its last stage; the stages that failed."""
    deadline = time.perf_counter() + BUDGET
    for folder in (WORK, output):
        folder.mkdir(parents=True, exist_ok=True)
    for stale in [*WORK.glob("*_cuda.json"), *WORK.glob("*.xml"), *WORK.glob("*.log")]:
        stale.unlink()
    stages = [install(wheels)]
    show(stages[0])
    result = keep(part, machine, stages, output)
    lacking = stages[0].numbers["missing"]
    for stage in run_all(commands(part, WORK, machine["arch"], lacking), lacking, deadline):
        stages.append(stage)
        show(stage)
        result = keep(part, machine, stages, output)
    for name, why in result["skipped"].items():
        print(f"skipped: {name}: {why}")
    for target in result["targets"] if part in ("tables", "levers") else ():
        print("  ".join(target.values()))
    failed: list[str] = result["failed"]
    path = output / f"gpu_check_{part}.json"
    print(
        f"wrote {path} after {result['seconds']:.0f} s; failed: {', '.join(failed) or 'nothing'}", flush=True
    )
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", default=PARTS, help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels")
    parser.add_argument("--dry-run", action="store_true", help="list the stages, run nothing")
    arguments = parser.parse_args()
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        parser.error(f"part is {unknown[0]!r}, must be one of {', '.join(PARTS)}")
    machine = gpu()
    if arguments.dry_run:
        for part in arguments.parts:
            print(f"{part:8} {'packages':12} {INSTALLING:4} s  {arguments.wheels}")
            for command in commands(part, WORK, machine["arch"] if machine else "<arch>"):
                print(f"{part:8} {command.name:12} {command.limit:4} s  {' '.join(command.told)}")
        return 0
    if machine is None:
        print("gpu-check: no CUDA device", file=sys.stderr)
        return 2
    print(f"{machine['gpu']}, torch {machine['torch']}, Python {machine['python']}, sm_{machine['arch']}")
    failed = [check(part, machine, arguments.wheels, arguments.output) for part in arguments.parts]
    return int(any(failed))


if __name__ == "__main__":
    sys.exit(main())
