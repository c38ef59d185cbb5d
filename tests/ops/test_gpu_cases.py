"""Every benchmark case on a GPU: other streams, graph replay, no host sync, and no more kernels than stated."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

from benchmarks.counters import KERNELS, count
from benchmarks.suite import TOY, Maker, requests
from flowgrpo_fast.ops import build_info

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not build_info()["cuda_archs"], reason="built without CUDA: GPU code not run"),
]

REQUESTS = requests(((TOY, torch.float32), (TOY, torch.bfloat16)))
every_case = pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.name)


@pytest.fixture(scope="module")
def made():
    return Maker(torch.device("cuda"))


@pytest.fixture
def ours(made, request):
    return made(request.getfixturevalue("request_")).contenders["ours"]


def values(result):
    """Copies of every tensor a call gave."""
    return [leaf.detach().clone() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def same(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@every_case
def test_another_stream_gives_the_same_bits(ours, request_):
    want = values(ours())
    torch.cuda.synchronize()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream(priority=-1)):
        # Work ahead of it, so that a kernel on the wrong stream would run too early or its result be read too soon.
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)
            got = values(ours())
        stream.synchronize()
        same(got, want)


@every_case
def test_a_graph_replays_the_same_bits(ours, request_):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            want = values(ours())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours()
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        same(values(captured), want)


@every_case
def test_no_call_waits_for_the_device(ours, request_):
    ours()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_case
def test_no_more_kernels_run_than_are_stated(ours, request_):
    stated = sum(KERNELS[name] for name in count(ours).ours)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        ours()
        torch.cuda.synchronize()
    on_device = [
        event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    if not on_device:
        pytest.skip("the profiler sees no kernels on this machine")
    assert 0 < sum("flowgrpo_fast" in name for name in on_device) <= stated, on_device
