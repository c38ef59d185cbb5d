"""The twelve numbers to have first of a GPU, in the order they matter; each is printed and kept as soon as it is there.

python benchmarks/gpu_numbers.py --output FOLDER      writes FOLDER/numbers_<device>.json; --device cpu rehearses
python benchmarks/gpu_numbers.py --once               every kernel once, for a profiler

Medians of replays of a CUDA graph over buffers in rotation, so that no call finds its data in the L2 cache but the one
that says so. Bytes are the least a call has to move.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(ROOT))

from benchmarks.timing import copy_of  # noqa: E402
from flowgrpo_fast import ops  # noqa: E402

Call = Callable[[], Any]
Number = tuple[str, Sequence[Call], int]  # name; calls on buffers of their own; bytes of a call or 0
IMAGE, VIDEO = (24, 16, 64, 64), (24, 16, 21, 60, 104)
SMALL = {IMAGE: (2, 4, 8, 8), VIDEO: (2, 4, 3, 8, 8)}  # to rehearse on a CPU
REPLAYS = 15


def seconds(calls: Sequence[Call], device: torch.device) -> float:
    """Median seconds of a call."""
    if device.type != "cuda":
        samples = []
        for _ in range(3):
            start = time.perf_counter()
            for call in calls:
                call()
            samples.append((time.perf_counter() - start) / len(calls))
        return statistics.median(samples)
    side, rounds = torch.cuda.Stream(), max(1, 8 // len(calls))
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(rounds):
            for call in calls:
                call()
    samples = []
    for _ in range(3 + REPLAYS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        samples.append(first.elapsed_time(last) / 1e3 / (rounds * len(calls)))
    return statistics.median(samples[3:])


def host_seconds(call: Call, device: torch.device) -> float:
    """Median seconds that a call keeps the host."""
    samples = []
    for _ in range(REPLAYS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(50):
            call()
        samples.append((time.perf_counter() - start) / 50)
    return statistics.median(samples)


def backward(x: Tensor, v: Tensor, n: Tensor, coeffs: Tensor, grad: Tensor) -> Any:
    """The backward's kernel alone, of log_prob."""
    op = torch.ops.flowgrpo_fast.flow_log_prob_backward
    return op(x, v, coeffs, 2, None, None, 1.0, None, n, grad, None, None, None, None, None, 0, True, False)


def on_latents(shape: tuple[int, ...], num_sets: int, label: str, device: torch.device) -> Iterator[Number]:
    """Numbers 2 to 7 on latents of one size."""
    coeffs = (torch.rand(5, 8) + 0.25).to(device)
    coeffs[:, 2] *= -0.2
    noiseless = coeffs.clone()
    noiseless[:, 3] = 0
    seed, grad = torch.arange(shape[0], device=device), torch.ones(shape[0], device=device)
    for dtype in (torch.bfloat16, torch.float32):
        size, name = (
            torch.Size(shape).numel() * dtype.itemsize,
            f"{label} {str(dtype).removeprefix('torch.')}",
        )
        sets = [tuple(torch.randn(shape, device=device).to(dtype) for _ in range(3)) for _ in range(num_sets)]

        def calls(function: Callable[..., Any], sets: Any = sets) -> list[Call]:
            return [lambda s=each: function(*s) for each in sets]  # type: ignore[misc]

        yield (
            f"2 flow_step with noise {name}",
            calls(lambda x, v, n: ops.flow_step(x, v, coeffs, 2, seed)),
            3 * size,
        )
        yield (
            f"3 flow_step without {name}",
            calls(lambda x, v, n: ops.flow_step(x, v, noiseless, 2, seed)),
            3 * size,
        )
        yield (
            f"4 flow_log_prob {name}",
            calls(lambda x, v, n: ops.flow_log_prob(x, v, n, coeffs, 2)),
            3 * size,
        )
        yield f"5 its backward {name}", calls(lambda x, v, n: backward(x, v, n, coeffs, grad)), 4 * size
        yield f"6 matching {name}", calls(lambda x, v, n: ops.matching(v, x)), 2 * size

        def mapped(x: Tensor, v: Tensor, n: Tensor) -> Any:
            return ops.flow_log_prob(x, v, n, coeffs, 2, extras=ops.Extras(map_axis=1))

        yield f"7 flow_log_prob with map {name}", calls(mapped), 3 * size
    one = tuple(torch.randn(1, *shape[1:], device=device, dtype=torch.bfloat16) for _ in range(3))
    if label == "video":
        moved = 3 * one[0].numel() * 2
        yield "8 flow_log_prob of one video, in the L2", [lambda: ops.flow_log_prob(*one, coeffs, 2)], moved


def on_matrices(device: torch.device) -> Iterator[Number]:
    """Numbers 9 and 10."""
    sizes = ((18432, 1536), (3072, 12288)) if device.type == "cuda" else ((32, 64),)
    for rows, columns in sizes:
        x, a, b = (
            torch.randn(shape, device=device, dtype=torch.bfloat16)
            for shape in ((rows, columns), (32, columns), (rows, 32))
        )
        out, moved = ops.quantize_fp8_rows(x), 3 * x.numel()
        yield f"9 quantize_fp8_rows {rows}x{columns}", [lambda x=x, o=out: ops.quantize_fp8_rows(x, o)], moved  # type: ignore[misc]

        def merge(o: Any = out, x: Tensor = x, a: Tensor = a, b: Tensor = b) -> Any:
            return ops.merge_lora_quantize_(o, x, a, b, 0.5)

        yield f"10 merge_lora_quantize_ of rank 32 {rows}x{columns}", [merge], moved


def on_rewards(device: torch.device) -> Iterator[Number]:
    """Number 11."""
    rewards = torch.randn(48 * 24, 3, device=device)
    ids = torch.arange(48, device=device).repeat_interleave(24)
    for aggregate in ("sum", "gdpo"):

        def call(aggregate: Any = aggregate) -> Tensor:
            return ops.group_advantages(rewards, ids, 48, None, aggregate)

        yield f"11 group_advantages {aggregate} 48x24", [call], 0


def numbers(device: torch.device) -> Iterator[Number]:
    """Numbers 1 to 11. The data of each lives while it is measured."""
    count = 1 << 28 if device.type == "cuda" else 1 << 16
    yield "1 copy", [copy_of(8 * count, device)], 8 * count
    for label, shape, num_sets in (("image", IMAGE, 8), ("video", VIDEO, 2)):
        yield from on_latents(shape if device.type == "cuda" else SMALL[shape], num_sets, label, device)
    yield from on_matrices(device)
    yield from on_rewards(device)


def host_numbers(device: torch.device) -> Iterator[tuple[str, Call]]:
    """Number 12: what a call costs before it moves any data, beside torch's simplest."""
    x, v, n = (torch.randn(8, 1, 8, 8, device=device) for _ in range(3))
    coeffs, seed = torch.ones(5, 8, device=device), torch.arange(8, device=device)
    yield "12 host: flow_step", lambda: ops.flow_step(x, v, coeffs, 2, seed)
    yield "12 host: flow_log_prob", lambda: ops.flow_log_prob(x, v, n, coeffs, 2)
    yield "12 host: matching", lambda: ops.matching(v, x)
    yield "12 host: torch.add", lambda: x + v


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=Path())
    parser.add_argument("--once", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.once:
        for name, calls, _ in numbers(device):
            print(name, flush=True)
            calls[0]()
        return 0
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "numbers": {}}
    path, roof, failed = arguments.output / f"numbers_{device.type}.json", 0.0, 0

    def keep(name: str, measure: Callable[[], float], moved: int) -> None:
        nonlocal roof, failed
        try:
            took = measure()
        except Exception as error:  # the other numbers are worth having
            failed += 1
            found["numbers"][name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            print(f"{name:50} {found['numbers'][name]['failed']}", flush=True)
        else:
            rate = moved / took / 1e9
            roof = roof or rate
            found["numbers"][name] = {"us": 1e6 * took} | (
                {"gbps": rate, "of_copy": rate / roof} if moved else {}
            )
            share = f"{rate:8.0f} GB/s {100 * rate / roof:6.1f} % of copy" if moved else ""
            print(f"{name:50} {1e6 * took:10.2f} us {share}", flush=True)
        half = path.with_suffix(".part")
        half.write_text(json.dumps(found, indent=1) + "\n")
        half.replace(path)

    for name, calls, moved in numbers(device):
        keep(name, lambda calls=calls: seconds(calls, device), moved)  # type: ignore[misc]
    for name, call in host_numbers(device):
        keep(name, lambda call=call: host_seconds(call, device), 0)  # type: ignore[misc]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
