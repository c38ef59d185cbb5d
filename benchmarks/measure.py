"""Interleaved timing: every contender once a round, so that all of them meet the same machine."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flowgrpo_fast.monitor.cost import cpu_name
from flowgrpo_fast.ops import build_info

if __package__:
    from benchmarks.baselines import contenders, make_workload
else:
    from baselines import contenders, make_workload

Functions = dict[str, Callable[[], Any]]
RESULTS = Path(__file__).parent / "results"


def interleaved(functions: Functions, rounds: int, warmup: int = 3) -> dict[str, dict[str, float]]:
    """Median and minimum seconds of each function.

    Each is called twice a round and the second call counts: the first puts its data into the caches and lets the
    threads of the one before settle, as in a loop that repeats one of them.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warmup + rounds):
        for name, function in functions.items():
            function()
            start = time.perf_counter()
            function()
            if number >= warmup:
                samples[name].append(time.perf_counter() - start)
    return {
        "median": {name: statistics.median(times) for name, times in samples.items()},
        "min": {name: min(times) for name, times in samples.items()},
    }


def speedups(times: dict[str, float]) -> dict[str, float]:
    """How many times ours is faster than each other contender."""
    return {name: round(times[name] / times["ours"], 2) for name in times if name != "ours"}


def measure(rounds: int) -> dict[str, Any]:
    """Medians and ratios of all operations, with what they were measured on."""
    workload = make_workload()
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": build_info()["isa"],
        "torch": torch.__version__,
        "latents": [*workload.latents.shape],
        "dtype": str(workload.latents.dtype),
        "rounds": rounds,
        # Runnable processes: other work on the machine slows both sides.
        "load_before": round(os.getloadavg()[0], 2),
        "operations": {},
        "call_overhead_us": {},
    }
    for operation, functions in contenders(workload).items():
        times = interleaved(functions, rounds)
        report["operations"][operation] = {
            f"{kind}_ms": {name: round(1e3 * t, 4) for name, t in times[kind].items()} for kind in times
        } | {f"speedup_by_{kind}": speedups(times[kind]) for kind in times}
    for operation, functions in contenders(make_workload((1, 4))).items():
        overhead = interleaved(functions, 10 * rounds)["median"]
        report["call_overhead_us"][operation] = {name: round(1e6 * t, 2) for name, t in overhead.items()}
    report["load_after"] = round(os.getloadavg()[0], 2)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS / "ops_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = measure(arguments.rounds)
    for operation, result in report["operations"].items():
        for kind in ("median", "min"):
            times = ", ".join(f"{name} {value:.3f} ms" for name, value in result[f"{kind}_ms"].items())
            ratios = ", ".join(f"{ratio:.1f}x {name}" for name, ratio in result[f"speedup_by_{kind}"].items())
            print(f"{operation:20} {kind:6} {times}  ->  {ratios}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
