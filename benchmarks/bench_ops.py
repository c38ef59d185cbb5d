"""Every op next to what it replaces, on every size: grouped by operation, size and dtype, one row a contender.

pytest benchmarks/bench_ops.py --benchmark-group-by=group --benchmark-columns=median,min,rounds
pytest benchmarks/bench_ops.py -k "replay and FLUX"
"""

from __future__ import annotations

import pytest

from benchmarks.suite import Maker, requests

SECONDS = 0.2  # for the interleaved rounds of one case


@pytest.fixture(scope="session")
def made(device):
    return Maker(device)


@pytest.fixture(scope="session")
def rows():
    """Interleaved medians of this session, by case."""
    return {}


@pytest.mark.parametrize("contender", ["ours", "eager", "compiled"])
@pytest.mark.parametrize("request_", requests(), ids=lambda request: request.name)
def bench_op(timed, measured, made, rows, request_, contender):
    case = made(request_)
    if contender not in case.contenders:
        pytest.skip(f"{request_.name}: nothing to compare as {contender!r}")
    if request_.name not in rows:
        rows[request_.name] = measured(case, SECONDS)
    timed(rows[request_.name], contender, case.contenders[contender])
