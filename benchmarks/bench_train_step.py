"""One training step of the default job: ours, the loop trainers write, and that loop with a compiled step.

pytest benchmarks/bench_train_step.py --benchmark-group-by=group --benchmark-columns=median,min,rounds
"""

from __future__ import annotations

import pytest

from benchmarks.loops import train_step_cases

SECONDS = 4.0


@pytest.fixture(scope="session")
def training(device, measured):
    """The case and its interleaved row."""
    (case,) = train_step_cases(device)
    return case, measured(case, SECONDS)


@pytest.mark.parametrize("contender", ["ours", "eager", "compiled"])
def bench_train_step(timed, training, contender):
    case, row = training
    timed(row, contender, case.contenders[contender])
