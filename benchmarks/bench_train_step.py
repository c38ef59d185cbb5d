"""One training step: of the default job, and of transformers lever by lever.

pytest benchmarks/bench_train_step.py --benchmark-group-by=group --benchmark-columns=median,min,rounds

The digits: ours, the loop trainers write, and that loop with a compiled step. A transformer: every row of
`benchmarks/levers.py` for itself, its launches, bytes and syncs (for compiled rows on CUDA the launches alone) and on
CUDA the peak of its memory in extra_info. `make levers` measures these rows in turns and relates them to the first; the
peaks of the CPU, each of a process of its own, are there alone.
"""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch

from benchmarks.lever_rows import GPU_JOBS, Runner, counted_row, cpu_jobs
from benchmarks.loops import train_step_cases

SECONDS = 4.0
JOBS = GPU_JOBS if torch.cuda.is_available() else tuple(cpu_jobs()[-1:])  # the size for every machine


@pytest.fixture(scope="session")
def training(device, measured):
    """The case and its interleaved row."""
    (case,) = train_step_cases(device)
    return case, measured(case, SECONDS)


@pytest.mark.parametrize("contender", ["ours", "eager", "compiled"])
def bench_train_step(timed, training, contender):
    case, row = training
    timed(row, contender, case.contenders[contender])


@pytest.mark.parametrize(
    ("job", "lever"),
    [pytest.param(job, lever, id=f"{job}: {lever.name}") for job in JOBS for lever in job.levers],
)
def bench_lever(benchmark, device, job, lever):
    runner = Runner(lever, device)
    benchmark.group, benchmark.name = f"training step of {job}", lever.name
    benchmark.extra_info |= counted_row(runner, partial(benchmark.pedantic, runner.time, rounds=3))
    del runner
    gc.collect()
