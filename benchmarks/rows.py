"""A measured case as a row of the results, and the machine it was measured on."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, Run
from benchmarks.counters import count
from benchmarks.timing import Roof, copy_of, graph_seconds, interleaved, rounds_within
from flowgrpo_fast.ops import build_info

MOST_ROUNDS = 200
Row = dict[str, Any]


def measured_row(case: Case, device: torch.device, seconds: float, roof: Roof) -> Row:
    """Medians and minima of the contenders in turns, and what follows from them.

    The large copy is measured just before and just after; the share of its bandwidth may exceed 1 for what fits into
    a cache. In turns with the contenders runs a copy of as many bytes ("copy"): the share of that equal copy tells how
    far the op is from one pass over its data, wherever that lies.
    """
    functions, failed = runnable(case)
    if case.bytes:
        functions["copy"] = copy_of(case.bytes, device)
    rounds = rounds_within(functions, seconds, MOST_ROUNDS, device)
    before = roof.sample()
    times = interleaved(functions, rounds, min(3, rounds // 5), device)
    copy_gbps = (before + roof.sample()) / 2e9
    row: Row = {
        "operation": case.operation,
        "size": case.size.name,
        "shape": list(case.size.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes": case.bytes,
        "rounds": rounds,
        "copy_gbps": rounded(copy_gbps),
    }
    for kind in ("median", "min"):
        row[f"{kind}_ms"] = {name: rounded(1e3 * t) for name, t in times[kind].items()}
        row[f"speedup_by_{kind}"] = speedups(times[kind])
    ours = times["median"]["ours"]
    row["gbps"] = rounded(case.bytes / ours / 1e9) if case.bytes else None
    row["share_of_copy"] = rounded(case.bytes / ours / 1e9 / copy_gbps) if case.bytes else None
    row["share_of_equal_copy"] = rounded(times["median"]["copy"] / ours) if case.bytes else None
    row["counts"] = {n: count(f).as_dict() for n, f in functions.items() if n in ("ours", "eager")}
    if device.type == "cuda" and case.bytes:
        graph = graph_seconds(case.contenders["ours"])
        row["graph_us"] = None if graph is None else rounded(1e6 * graph)
    return row | ({"failed": failed} if failed else {})


def runnable(case: Case) -> tuple[dict[str, Run], dict[str, str]]:
    """The contenders that run here, compiled by now, and why another does not. Ours must."""
    functions, failed = dict(case.contenders), {}
    for name, function in case.contenders.items():
        try:
            function()
        except Exception as error:  # torch.compile fails in many ways
            if name == "ours":
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            del functions[name]
    return functions, failed


def speedups(times: dict[str, float]) -> dict[str, float]:
    """How many times ours is faster than each other contender."""
    return {name: rounded(t / times["ours"]) for name, t in times.items() if name not in ("ours", "copy")}


def rounded(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


def machine(device: torch.device) -> Row:
    """What a result is measured on; load is the number of runnable processes."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": build_info()["isa"],
        "torch": torch.__version__,
        "load_before": load(),
    }


def machine_afterwards(before: Row, roof: Roof) -> Row:
    """Adds the load at the end, and the large copy in GB/s over the session: median, least and most."""
    copies = [sample / 1e9 for sample in roof.samples]
    found = [rounded(function(copies)) for function in (statistics.median, min, max)] if copies else None
    return before | {"load_after": load(), "copy_gbps": found}


def load() -> float:
    """Runnable processes, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


def cpu_model() -> str:
    """The CPU's model as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has bf16 instructions; without them torch converts on the way, many times slower than fp32."""
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
