"""Every op once on the GPU against the CPU, a line each; goes on after a failure. Needs torch alone.

python benchmarks/gpu_smoke.py            exit status 1 where something differs; --device cpu rehearses
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(ROOT))

from flowgrpo_fast import ops  # noqa: E402

GENERATOR = torch.Generator().manual_seed(0)
SHAPES = ((3, 41), (2, 16, 64, 64), (3, 16, 9, 9))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Check = tuple[
    str, Callable[..., Any], tuple[Any, ...], float
]  # name, function, arguments, largest difference


def leaves(value: Any) -> list[Tensor]:
    """All tensors of a result."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for each in value for leaf in leaves(each)] if isinstance(value, (tuple, list)) else []


def moved(value: Any, device: torch.device) -> Any:
    """An argument on the device."""
    if isinstance(value, list):
        return [each.to(device) for each in value]
    return value.to(device) if isinstance(value, Tensor) else value


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def gradient(x: Tensor, v: Tensor, n: Tensor, c: Tensor, step: Tensor) -> Tensor:
    """That of the sum of log-probabilities."""
    v = v.detach().requires_grad_()
    return torch.autograd.grad(ops.flow_log_prob(x, v, n, c, step).sum(), v)[0]


def transitions() -> Iterator[Check]:
    """Ops on latents. Reductions may differ by the rounding of an exponent or a square root; all else is equal bits."""
    coeffs = torch.rand(5, 8, generator=GENERATOR) + 0.25
    coeffs[:, 2] *= -0.2
    for shape in SHAPES:
        for dtype in DTYPES:
            x, v, n, old = (normal(*shape).to(dtype) for _ in range(4))
            seed, step = torch.arange(shape[0]) * 7 - 3, torch.arange(shape[0]) % 5
            label = f"{list(shape)} {str(dtype).removeprefix('torch.')}"

            def guided(x: Tensor, v: Tensor, c: Tensor, k: Tensor, s: Tensor) -> Any:
                return ops.flow_step(x, v, c, k, s, ops.Guidance(v, 3.0), return_x0_pred=True)[::2]

            yield f"flow_step {label}", guided, (x, v, coeffs, step, seed), 0.0
            yield (
                f"flow_step log_prob {label}",
                lambda *a: ops.flow_step(*a)[1],
                (x, v, coeffs, step, seed),
                1e-5,
            )
            yield f"flow_log_prob {label}", ops.flow_log_prob, (x, v, n, coeffs, step), 2e-5
            yield f"its backward {label}", gradient, (x, v, n, coeffs, step), 0.0
            yield (
                f"matching {label}",
                lambda v, t, o: ops.matching(v, t, old_velocity=o, reference_velocity=t),
                (v, n, old),
                1e-4,
            )


def matrices() -> Iterator[Check]:
    """Codes and scales, bit for bit."""
    for dtype in (torch.float32, torch.bfloat16):
        weight, a, b = normal(130, 1536).to(dtype), normal(32, 1536).to(dtype), normal(130, 32).to(dtype)
        yield f"quantize_fp8_rows {dtype}", ops.quantize_fp8_rows, (weight,), 0.0
        yield f"quantize_nvfp4 {dtype}", ops.quantize_nvfp4, (weight,), 0.0

        def merged(w: Tensor, a: Tensor, b: Tensor) -> Any:
            return ops.merge_lora_quantize_(ops.quantize_fp8_rows(w), w, a, b, 0.5)

        yield f"merge_lora_quantize_ {dtype}", merged, (weight, a, b), 0.0


def groups() -> Iterator[Check]:
    """Ops on rewards, and the noise."""
    rewards, ids = normal(48, 3), torch.arange(48) % 4
    for aggregate in ("sum", "per_objective", "gdpo", "separate"):

        def advantages(r: Tensor, i: Tensor, aggregate: Any = aggregate) -> Tensor:
            return ops.group_advantages(r, i, 4, None, aggregate, clip=ops.Clip(5.0, 3.0))

        yield f"group_advantages {aggregate}", advantages, (rewards, ids), 1e-6
    candidates = normal(4, 24)
    yield "best_variance_subset", lambda r: ops.best_variance_subset(r, 5), (candidates,), 0.0
    yield "top_bottom", lambda r: ops.top_bottom(r, 3, 3), (candidates,), 0.0
    yield "pareto_fronts", ops.pareto_fronts, (normal(4, 24, 3),), 0.0
    yield (
        "compact",
        lambda i, buffers: ops.compact(i, *buffers),
        (torch.tensor([3, 1]), [normal(5, 7), torch.arange(5)]),
        0.0,
    )
    yield "philox_normal", lambda s: ops.philox_normal(s, (1000,), 3, 1), (torch.tensor([5, -7]),), 0.0


def run(check: Check, device: torch.device) -> bool:
    """Prints a line; whether the device's results are those of the CPU."""
    name, function, arguments, tolerance = check
    start = time.perf_counter()
    try:
        here = leaves(function(*arguments))
        there = leaves(function(*(moved(each, device) for each in arguments)))
        worst, differing = 0.0, 0
        for host, found in zip(here, there, strict=True):
            mine, theirs = host.detach(), found.detach().cpu()
            if mine.dtype.itemsize == 1:
                mine, theirs = mine.view(torch.uint8), theirs.view(torch.uint8)
            differing += int((mine != theirs).sum())
            if mine.is_floating_point() and mine.numel():
                worst = max(worst, float((mine.double() - theirs.double()).abs().max()))
    except Exception as error:  # the other ops are worth knowing
        line = (str(error).splitlines() or [""])[0][:160]
        print(f"FAIL {name:44} {type(error).__name__}: {line}", flush=True)
        return False
    good = differing == 0 or 0 < worst <= tolerance
    took = 1e3 * (time.perf_counter() - start)
    print(
        f"{'ok  ' if good else 'DIFF'} {name:44} differing {differing:8} worst {worst:.2e} {took:8.1f} ms",
        flush=True,
    )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    print(torch.__version__, ops.build_info(), flush=True)
    results = [run(check, device) for part in (transitions, matrices, groups) for check in part()]
    bad = results.count(False)
    print(
        f"smoke: {len(results)} lines, {bad} differ or failed"
        if bad
        else f"smoke: {len(results)} lines, all equal"
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
