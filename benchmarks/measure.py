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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(ROOT))

from benchmarks import loops, report, suite  # noqa: E402
from benchmarks.cases import SIZES, Case  # noqa: E402
from benchmarks.rows import Row, machine, machine_afterwards, measured_row, rounded  # noqa: E402
from benchmarks.timing import Roof, host_seconds, interleaved  # noqa: E402

LEVELS = ("ops", "rollout", "train_step")
RESULTS = ROOT / "benchmarks" / "results"
LOOP_SECONDS = 4.0  # a rollout or a training step is long; this gives them some rounds
SIZE_NAMES = [size.name for size in SIZES]


def cases_of(level: str, only: str, device: torch.device) -> Iterator[Case]:
    """The cases of a level whose name contains `only`, one after another: each frees the one before."""
    if level == "ops":
        make = suite.Maker(device)
        for request in suite.requests(device=device):
            if only in request.name:
                yield make(request)
        return
    for case in loops.LEVELS[level](device):
        if only in case.group:
            yield case


def call_overhead(device: torch.device) -> dict[str, dict[str, float]]:
    """Microseconds a call costs before it moves any data: the toy size. On CUDA the host's part alone."""
    found = {}
    for case in suite.toy_cases(device):
        if case.size != suite.TOY:
            continue
        if device.type == "cuda":
            times = {name: host_seconds(run, 21) for name, run in case.contenders.items()}
        else:
            times = interleaved(case.contenders, 300)["median"]
        found[case.operation] = {name: rounded(1e6 * seconds) for name, seconds in times.items()}
    return found


def measure(level: str, only: str, device: torch.device, seconds: float, limit: float) -> dict[str, Any]:
    """Machine, rows and, for ops, the cost of a call; cases left when `limit` seconds are over are not measured."""
    before, roof, start = machine(device), Roof(device), time.perf_counter()
    rows: list[Row] = []
    for case in cases_of(level, only, device):
        if time.perf_counter() - start > limit:
            print("\nout of time: the cases that are left are not measured", file=sys.stderr)
            break
        print(f"\r{case.group:70}", end="", file=sys.stderr, flush=True)
        rows.append(measured_row(case, device, seconds if level == "ops" else LOOP_SECONDS, roof))
    print(f"\r{'':70}\r", end="", file=sys.stderr)
    rows.sort(key=lambda row: SIZE_NAMES.index(row["size"]) if row["size"] in SIZE_NAMES else len(SIZE_NAMES))
    result = {"machine": machine_afterwards(before, roof), "rows": rows}
    return result | {"call_overhead_us": call_overhead(device)} if level == "ops" and not only else result


def show(level: str, result: dict[str, Any]) -> None:
    """The table on the terminal."""
    header, lines = report.table(result)
    print(f"{level}: {report.described(result['machine'])}")
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # a bare machine
        print("\n".join(" | ".join(line) for line in [header, *lines]))
        return
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(header):
        table.add_column(column, justify="left" if number < 3 else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 140).print(table, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("levels", nargs="*", metavar="level", default=LEVELS, help=", ".join(LEVELS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=0.6, help="for the rounds of one op case")
    parser.add_argument("--limit", type=float, default=360, help="seconds for the rows of a level")
    parser.add_argument("--only", default="", help="cases whose name contains this; nothing is written")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--print-only", action="store_true")
    arguments = parser.parse_args()
    unknown = [level for level in arguments.levels if level not in LEVELS]
    if unknown:
        parser.error(f"level is {unknown[0]!r}, must be one of {', '.join(LEVELS)}")
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    for level in arguments.levels:
        result = measure(level, arguments.only, device, arguments.seconds, arguments.limit)
        show(level, result)
        if not (arguments.only or arguments.print_only):
            arguments.output.mkdir(parents=True, exist_ok=True)
            path = arguments.output / f"{level}_{device.type}.json"
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
