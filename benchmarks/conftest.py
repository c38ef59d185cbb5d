"""Lets `pytest benchmarks/` collect bench_*.py and their bench_* functions, and gives all of them one device."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from benchmarks.rows import machine, machine_afterwards, measured_row
from benchmarks.timing import Roof

THREADS = min(4, os.cpu_count() or 1)
MACHINE = pytest.StashKey[dict[str, Any]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def measured(request, device, four_threads):
    """Makes rows; what the copy gave over the session stands in the machine's description."""
    before, roof = machine(device), Roof(device)
    yield lambda case, seconds: measured_row(case, device, seconds, roof)
    request.config.stash[MACHINE] = machine_afterwards(before, roof)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info |= config.stash.get(MACHINE, {})


@pytest.fixture
def timed(benchmark, device):
    """Times one contender of a row with pytest-benchmark; the row's numbers stand in extra_info.

    On CUDA the timed call ends with a synchronisation: host, launch and device time of a single call.
    """

    def run(row: dict[str, Any], contender: str, function) -> None:
        benchmark.group = f"{row['operation']} {row['size']} {row['dtype']}"
        benchmark.name = contender
        slower = row["median_ms"][contender] / row["median_ms"]["ours"]
        benchmark.extra_info |= {
            "GB/s": row["gbps"] and round(row["gbps"] / slower, 2),
            "share_of_copy": row["share_of_copy"] and round(row["share_of_copy"] / slower, 3),
            "speedup_of_ours": row["speedup_by_median"],
            "threads": torch.get_num_threads(),
            "device": str(device),
            "counts": row["counts"].get(contender),
        }

        def synchronised() -> None:
            function()
            torch.cuda.synchronize()

        rounds = max(5, min(100, int(100 / row["median_ms"][contender])))
        benchmark.pedantic(
            synchronised if device.type == "cuda" else function, rounds=rounds, warmup_rounds=1
        )

    return run
