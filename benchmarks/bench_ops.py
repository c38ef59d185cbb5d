"""The ops next to what they replace, grouped by operation; `speedup` stands in extra_info.

pytest benchmarks/bench_ops.py --benchmark-columns=median,min,rounds
"""

from __future__ import annotations

import pytest
import torch
from baselines import contenders, make_workload
from measure import interleaved

from flowgrpo_fast.ops import flow_log_prob, flow_step, philox_normal

OPERATIONS = ("sampling", "replay", "replay_and_backward")
SHAPE = (24, 16, 64, 64)
THREADS = 4


@pytest.fixture(scope="module", autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def functions():
    return contenders(make_workload(SHAPE))


@pytest.fixture(scope="module")
def medians(functions):
    """Medians of all contenders, taken in turns."""
    return {operation: interleaved(functions[operation], rounds=15)["median"] for operation in OPERATIONS}


@pytest.mark.parametrize("contender", ["ours", "eager", "compiled"])
@pytest.mark.parametrize("operation", OPERATIONS)
def bench_transition(benchmark, functions, medians, operation, contender):
    benchmark.group = f"{operation} {list(SHAPE)} float32"
    benchmark.name = contender
    times = medians[operation]
    benchmark.extra_info["speedup_of_ours"] = round(times[contender] / times["ours"], 2)
    benchmark(functions[operation][contender])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("what", ["stochastic step", "deterministic step", "replay"])
def bench_storage(benchmark, dtype, what):
    """Bytes moved are counted once: latents, velocity and next latents."""
    w = make_workload(SHAPE, dtype)
    deterministic = w.coeffs.clone()
    deterministic[:, 3] = 0
    run = {
        "stochastic step": lambda: flow_step(w.latents, w.velocity, w.coeffs, 4, w.seed),
        "deterministic step": lambda: flow_step(w.latents, w.velocity, deterministic, 4, w.seed),
        "replay": lambda: flow_log_prob(w.latents, w.velocity, w.next_latents, w.coeffs, 4),
    }[what]
    benchmark.group = f"{what} {list(SHAPE)}"
    benchmark(run)
    moved = 3 * w.latents.numel() * w.latents.element_size()
    benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.median / 1e9, 1)


@pytest.mark.parametrize("source", ["philox_normal", "torch.randn"])
def bench_noise(benchmark, source):
    seed = torch.arange(SHAPE[0])
    benchmark.group = f"noise {list(SHAPE)}"
    benchmark(
        (lambda: philox_normal(seed, SHAPE[1:]))
        if source == "philox_normal"
        else (lambda: torch.randn(SHAPE))
    )


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("contender", ["ours", "eager", "compiled"])
def bench_call_overhead(benchmark, operation, contender):
    """One sample of four elements: what a call costs before it moves any data."""
    benchmark.group = f"overhead of {operation}"
    benchmark.name = contender
    benchmark(contenders(make_workload((1, 4)))[operation][contender])
