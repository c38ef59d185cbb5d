"""Interleaved timing: every contender once a round, so that all of them meet the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Functions = dict[str, Callable[[], Any]]
CPU = torch.device("cpu")
_COPY_BYTES = 1 << 29  # read and written together, far above any cache
_CUDA_SAMPLE = 2e-3  # seconds between two events, so that their resolution does not show


def interleaved(
    functions: Functions, rounds: int, warmup: int = 3, device: torch.device = CPU
) -> dict[str, dict[str, float]]:
    """Median and minimum seconds of each function.

    On the CPU each is called twice a round and the second call counts: the first puts its data into the caches and
    lets the threads of the one before settle, as in a loop that repeats one of them. On CUDA the second is a queue of
    calls between two events, and the time is that of one of them: device time, or launch time where that is longer.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    repeats = {name: _queue_length(function, device) for name, function in functions.items()}
    for number in range(warmup + rounds):
        for name, function in functions.items():
            function()
            seconds = _seconds(function, repeats[name], device)
            if number >= warmup:
                samples[name].append(seconds)
    return {
        "median": {name: statistics.median(times) for name, times in samples.items()},
        "min": {name: min(times) for name, times in samples.items()},
    }


def rounds_within(functions: Functions, seconds: float, most: int, device: torch.device = CPU) -> int:
    """How many rounds of `interleaved` fit into a time, at least five; compiles what is to be compiled."""
    for function in functions.values():
        function()
    _wait(device)
    start = time.perf_counter()
    for function in functions.values():
        function()
    _wait(device)
    a_pass = max(time.perf_counter() - start, 1e-7)
    if device.type == "cuda":
        a_pass += len(functions) * _CUDA_SAMPLE
    return max(5, min(most, int(seconds / (2 * a_pass))))


def graph_seconds(function: Callable[[], Any], calls: int = 20) -> float | None:
    """Device seconds of a call replayed from a CUDA graph of several; None where it cannot be captured."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return interleaved({"graph": graph.replay}, 11, device=torch.device("cuda"))["median"]["graph"] / calls


def host_seconds(function: Callable[[], Any], rounds: int, calls: int = 50) -> float:
    """Median host seconds of a call, the device's work not waited for (unless the call waits itself)."""
    samples = []
    for _ in range(3 + rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        samples.append((time.perf_counter() - start) / calls)
    return statistics.median(samples[3:])


class Roof:
    """torch's copy of a large tensor, the roof of a memory-bound op, measured again and again next to what it is for.

    Memory bandwidth is shared with whatever else the machine does, so one number for a session would be luck.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copy = copy_of(_COPY_BYTES, device)
        self.samples: list[float] = []

    def sample(self) -> float:
        """Bytes a second, read and written, now."""
        seconds = interleaved({"copy": self._copy}, 3, 1, self._device)["median"]["copy"]
        self.samples.append(_COPY_BYTES / seconds)
        return self.samples[-1]


def copy_of(moved: int, device: torch.device) -> Callable[[], Any]:
    """A copy that reads and writes `moved` bytes together."""
    # Written, not only allocated: pages of zeros that nobody has touched are all one page, read from the cache.
    source = torch.full((max(moved // 8, 1),), 1.0, device=device)
    target = torch.full_like(source, 2.0)
    return lambda: target.copy_(source)


def _queue_length(function: Callable[[], Any], device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    function()
    return max(1, min(200, int(_CUDA_SAMPLE / max(_seconds(function, 3, device), 1e-7))))


def _seconds(function: Callable[[], Any], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            function()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
