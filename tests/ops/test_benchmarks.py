"""The benchmarks' baselines compute what the ops compute, and the ops stay clearly faster. Real ratios: benchmarks/."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest
import torch

from flowgrpo_fast.ops import flow_log_prob

BASELINES = Path(__file__).resolve().parents[2] / "benchmarks" / "baselines.py"


@pytest.fixture(scope="module")
def baselines():
    import sys

    spec = importlib.util.spec_from_file_location("flowgrpo_fast_baselines", BASELINES)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_baselines_agree_with_the_op(baselines):
    w = baselines.make_workload((3, 4, 16, 16))
    ours = flow_log_prob(w.latents, w.velocity, w.next_latents, w.coeffs, w.step_index)
    _, unfused = baselines.unfused_step(w, w.velocity, w.next_latents)
    torch.testing.assert_close(unfused, ours, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(baselines.same_log_prob(w, w.velocity), ours, rtol=1e-5, atol=2e-6)
    functions = baselines.contenders(w)["replay_and_backward"]
    torch.testing.assert_close(functions["eager"](), functions["ours"](), rtol=1e-4, atol=1e-8)
    fresh, log_prob = baselines.unfused_step(w, w.velocity)
    replayed = flow_log_prob(w.latents, w.velocity, fresh, w.coeffs, w.step_index)
    torch.testing.assert_close(log_prob, replayed, rtol=1e-5, atol=2e-6)


def best_seconds(function, repeats=7):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "at_least"), [("sampling", 2), ("replay", 3), ("replay_and_backward", 2)]
)
def test_faster_than_eager(baselines, operation, at_least):
    """Best of several on one thread, three tries: measured 7, 9 and 6 times, asked for a fraction of it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        functions = baselines.contenders(baselines.make_workload((8, 16, 64, 64)))[operation]
        ratios = []
        while len(ratios) < 3 and max(ratios, default=0) < at_least:
            ratios.append(best_seconds(functions["eager"]) / best_seconds(functions["ours"]))
    finally:
        torch.set_num_threads(before)
    assert max(ratios) >= at_least, f"{operation}: {ratios}"
