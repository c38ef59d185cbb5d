"""A rollout: our sampler, the loop trainers write, that loop with a compiled step, and the network alone.

pytest benchmarks/bench_rollout.py --benchmark-group-by=group --benchmark-columns=median,min,rounds
"""

from __future__ import annotations

import pytest

from benchmarks.loops import rollout_cases

SECONDS = 2.0


@pytest.fixture(scope="session")
def rollouts(device, measured):
    """Cases and their interleaved rows, by the model's name."""
    cases = {case.size.name.split()[0]: case for case in rollout_cases(device)}
    return {name: (case, measured(case, SECONDS)) for name, case in cases.items()}


@pytest.mark.parametrize("contender", ["ours", "eager", "compiled", "network"])
@pytest.mark.parametrize("model", ["digits", "synthetic"])
def bench_rollout(timed, rollouts, model, contender):
    case, row = rollouts[model]
    timed(row, contender, case.contenders[contender])
