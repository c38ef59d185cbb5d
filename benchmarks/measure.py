"""Measures ours, unfused eager PyTorch and torch.compile side by side, prints a table and writes JSON.

python benchmarks/measure.py                       every level, into benchmarks/results/<level>_<device>.json
python benchmarks/measure.py ops --only replay     a part, printed only
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(ROOT))

from benchmarks import lever_report, report, suite  # noqa: E402
from benchmarks.cases import SIZES, Case  # noqa: E402
from benchmarks.rows import Row, machine, machine_afterwards, measured_row, rounded  # noqa: E402
from benchmarks.timing import Roof, host_seconds, interleaved  # noqa: E402

LEVELS = ("ops", "rollout", "train_step", "levers")
RESULTS = ROOT / "benchmarks" / "results"
LOOP_SECONDS = 4.0  # a rollout or a training step is long; this gives them some rounds
SIZE_NAMES = [size.name for size in SIZES]


@dataclass(frozen=True)
class Options:
    """What is measured, and for how long."""

    device: torch.device
    only: str = ""  # cases whose name contains this
    compiled: str = ""  # torch.compile for cases whose name contains this; compiling is what takes the time
    seconds: float = 0.3  # for the rounds of one op case
    limit: float | None = None  # seconds for the rows of a level; None = what is usual

    @property
    def seconds_of_rows(self) -> float:
        """For ops, rollouts and training steps."""
        return 390.0 if self.limit is None else self.limit

    @property
    def seconds_of_levers(self) -> float:
        """For the levers: on a CPU they take turns, and want longer."""
        return 780.0 if self.limit is None and self.device.type == "cpu" else self.seconds_of_rows


def cases_of(level: str, options: Options) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names of a level's cases, and what makes each: it frees the one before.

    Those to be compiled come first where some are named: of all rows they say most, and a measurement may be cut short.
    """
    if level == "ops":
        make = suite.Maker(options.device)
        requests = suite.requests(device=options.device)
        for request in sorted(requests, key=lambda request: options.compiled not in request.name):
            if options.only in request.name:
                yield request.name, partial(make, request)
        return
    from benchmarks import loops  # which needs diffusers and peft

    for case in loops.LEVELS[level](options.device):
        if options.only in case.group:
            yield case.group, partial(replace, case)


def fitted(case: Case, options: Options) -> Case:
    """Without the compiled contender, where it is not asked for."""
    if options.compiled in case.group:
        return case
    return replace(case, contenders={n: run for n, run in case.contenders.items() if n != "compiled"})


def call_overhead(options: Options) -> dict[str, dict[str, float]]:
    """Microseconds a call costs before it moves any data: the toy size. On CUDA the host's part alone."""
    found = {}
    torch._dynamo.reset()
    for case in suite.toy_cases(options.device):
        if case.size != suite.TOY:
            continue
        case = fitted(case, options)
        if options.device.type == "cuda":
            times = {name: host_seconds(run, 21) for name, run in case.contenders.items()}
        else:
            times = interleaved(case.contenders, 300)["median"]
        found[case.operation] = {name: rounded(1e6 * seconds) for name, seconds in times.items()}
    return found


def measure(level: str, options: Options, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Machine, rows and, for ops, the cost of a call; what could not be measured, and why.

    `keep` is given what there is, after every row.
    """
    device = options.device
    before, roof, start = machine(device), Roof(device), time.perf_counter()
    seconds = options.seconds if level == "ops" else LOOP_SECONDS
    rows: list[Row] = []
    failed: dict[str, str] = {}
    left: list[str] = []
    calls = {}
    if level == "ops" and not options.only:
        calls = {"call_overhead_us": call_overhead(options)}

    def whole() -> dict[str, Any]:
        order = {name: place for place, name in enumerate(SIZE_NAMES)}
        ordered = sorted(rows, key=lambda row: order.get(row["size"], len(order)))
        found = {"machine": machine_afterwards(before, roof), "rows": ordered, "failed": failed, "left": left}
        return found | calls

    for name, make in cases_of(level, options):
        if time.perf_counter() - start > options.seconds_of_rows:
            left.append(name)
            continue
        print(f"\r{name:70}", end="", file=sys.stderr, flush=True)
        try:
            rows.append(measured_row(fitted(make(), options), device, seconds, roof))
        except Exception as error:  # the other cases are worth having
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        keep(whole())
    print(f"\r{'':70}\r", end="", file=sys.stderr)
    return whole()


def levers(options: Options, command: str, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Training steps lever by lever; `keep` is given what there is, after every row."""
    from benchmarks.lever_rows import measure_levers  # which needs diffusers and peft

    before, roof = machine(options.device), Roof(options.device)

    def whole(found: dict[str, Any]) -> dict[str, Any]:
        return {"machine": machine_afterwards(before, roof), "command": command} | found

    found = measure_levers(
        options.device,
        limit=options.seconds_of_levers,
        keep=lambda found: keep(whole(found)),
        only=options.only,
    )
    return whole(found)


def show(level: str, result: dict[str, Any]) -> None:
    """The tables on the terminal."""
    if level == "levers":
        print(f"{level}: {report.described(result['machine'])}")
        for job in result["jobs"]:
            print("\n".join(lever_report.notes(job)))
            print_table(*lever_report.table(job), labels=1)
        return
    header, lines = report.table(result)
    print(f"{level}: {report.described(result['machine'])}")
    for line in report.unmeasured(result):
        print(line)
    print_table(header, lines, labels=3)


def print_table(header: list[str], lines: list[list[str]], labels: int) -> None:
    """With rich where it is."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # a bare machine
        print("\n".join(" | ".join(line) for line in [header, *lines]))
        return
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(header):
        table.add_column(column, justify="left" if number < labels else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 180).print(table, highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("levels", nargs="*", metavar="level", default=LEVELS, help=", ".join(LEVELS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument(
        "--seconds", type=float, default=Options.seconds, help="for the rounds of one op case"
    )
    parser.add_argument("--limit", type=float, help="seconds for the rows of a level")
    parser.add_argument("--only", default="", help="cases whose name contains this; nothing is written")
    parser.add_argument(
        "--compiled", default="", help="torch.compile only for cases whose name contains this"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--print-only", action="store_true")
    arguments = parser.parse_args()
    unknown = [level for level in arguments.levels if level not in LEVELS]
    if unknown:
        parser.error(f"level is {unknown[0]!r}, must be one of {', '.join(LEVELS)}")
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    options = Options(device, arguments.only, arguments.compiled, arguments.seconds, arguments.limit)
    failed = False
    for level in arguments.levels:
        path = arguments.output / f"{level}_{device.type}.json"
        write = (
            partial(write_result, path) if not (arguments.only or arguments.print_only) else lambda _: None
        )
        if level == "levers":
            command = (
                f"python benchmarks/measure.py levers --device {device.type} --threads {arguments.threads}"
            )
            result = levers(options, command, write)
            failed |= any(job["failed"] for job in result["jobs"]) and device.type == "cpu"
        else:
            result = measure(level, options, write)
            failed |= bool(result["failed"])
            if not (result["rows"] or result["failed"] or result["left"]):
                parser.exit(2, f"error: no case of {level} has {arguments.only!r} in its name\n")
        write(result)
        show(level, result)
    return int(failed)


def write_result(path: Path, result: dict[str, Any]) -> None:
    """As JSON; whoever is stopped while writing leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    half.write_text(json.dumps(result, indent=1) + "\n")
    half.replace(path)


if __name__ == "__main__":
    sys.exit(main())
