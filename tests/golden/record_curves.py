"""Records golden curves: how each recipe learns, number by number, so that a rebuilt product learns the same.

    python tests/golden/record_curves.py                  # all
    python tests/golden/record_curves.py flow_grpo ...    # some
    python tests/golden/record_curves.py --list           # which there are (golden_cases.py)
    python tests/golden/record_curves.py --out DIR ...    # elsewhere than tests/golden/curves

Each file holds one curve as text: the arithmetic it was recorded with, the recipe, a line of metrics a training step
(`repr` of a float: it reads back to the same bits), and checksums of what was trained. `tests/training/
test_golden_curves.py` trains again and compares. Record again only what was meant to change, and say why in the
commit; `git diff` shows which steps moved.

The same bits on every x86-64: one thread, and the plainest code of every library (`PORTABLE`), set before it is loaded.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CURVES = Path(__file__).parent / "curves"

PORTABLE = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX,-AVX2,-FMA,-FMA4,-AVX512F",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "CUDA_VISIBLE_DEVICES": "",
}


@dataclass(frozen=True, slots=True)
class Curve:
    """What a recipe did."""

    steps: tuple[dict[str, float], ...]  # metrics, by name
    checksums: dict[str, str]  # of weights after the last step


def run(name: str) -> Curve:
    """Trains a case. The one place that knows the product's insides: a redesign changes this and nothing else."""
    import torch

    from flowgrpo_fast.training.checkpoint import moving
    from flowgrpo_fast.training.engine import build_engine
    from flowgrpo_fast.training.loop import train_step
    from tests.golden.golden_cases import make, num_steps

    engine = build_engine(make(name), torch.device("cpu"))
    try:
        steps = [dict(train_step(engine).metrics) for _ in range(num_steps(name))]
    finally:
        engine.close()
    trained = [p.detach() for p in engine.model.module.parameters() if p.requires_grad]
    weights = {"weights": trained}
    saved = {"average": "averaged"}  # names of the first recordings
    weights |= {saved.get(name, name): snapshot.values for name, snapshot in sorted(moving(engine).items())}
    kept = tuple({k: v for k, v in step.items() if "/step_" not in k} for step in steps)
    return Curve(kept, {key: checksum(tensors) for key, tensors in weights.items()})


def checksum(tensors: Iterable) -> str:
    """Of the bytes of tensors, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def to_text(curve: Curve, header: dict[str, str]) -> str:
    """A curve as its file."""
    lines = [f"{key}: {value}" for key, value in header.items()]
    for number, step in enumerate(curve.steps, 1):
        lines.append(f"step {number}: " + " ".join(f"{key}={value!r}" for key, value in sorted(step.items())))
    lines += [f"sha256 {key}: {value}" for key, value in curve.checksums.items()]
    return "\n".join(lines) + "\n"


def from_text(text: str) -> tuple[Curve, dict[str, str]]:
    """Inverse of `to_text`."""
    steps, checksums, header = [], {}, {}
    for line in text.splitlines():
        key, _, value = line.partition(": ")
        if key.startswith("step "):
            pairs = (word.partition("=") for word in value.split())
            steps.append({metric: float(number) for metric, _, number in pairs})
        elif key.startswith("sha256 "):
            checksums[key.removeprefix("sha256 ")] = value
        else:
            header[key] = value
    return Curve(tuple(steps), checksums), header


def fingerprint() -> str:
    """What this machine's arithmetic makes of fixed numbers: torch's version and a checksum, part by part.

    Nothing of the product is in it. Where two machines agree here, their curves must agree to the bit.
    """
    import torch

    parts = {name: checksum(part())[:8] for name, part in _ARITHMETIC.items()}
    return " ".join([f"torch={torch.__version__}", *(f"{name}={value}" for name, value in parts.items())])


def _numbers(*shape: int) -> object:
    """Values in (-2, 2) from integers, exact on every machine."""
    import torch

    count = math.prod(shape)
    whole = (torch.arange(1, count + 1, dtype=torch.int64) * 2654435761) % 65536
    return (whole - 32768).float().div(16384).view(*shape)


def _scalars() -> list:
    import torch

    values = [
        function(0.01 + index / 997)
        for index in range(5000)
        for function in (math.exp, math.log, math.sin, math.cos, math.sqrt, math.tanh)
    ]
    return [torch.tensor([*values, *(v**0.3 for v in range(1, 50))], dtype=torch.float64)]


def _pointwise() -> list:
    import torch
    from torch.nn import functional

    x = _numbers(37, 129)
    functions = (torch.exp, torch.sin, torch.cos, torch.tanh, torch.sigmoid, functional.silu, torch.erf)
    results = [function(x) for function in functions]
    results += [functional.gelu(x, approximate="tanh"), x.abs().log(), x.abs().sqrt(), x.abs().rsqrt()]
    results += [x.bfloat16().float(), x.square().std(1), x.sum(), x.mean(0), x.mean(1), x.var(1), x.norm()]
    return [*results, torch.log_softmax(x, 1), torch.softmax(x, 1), x.abs().pow(0.7), x.lerp(x + 1, 0.1)]


def _products() -> list:
    import torch

    results = []
    for rows, inner, columns in (
        (8, 64, 64),
        (8, 64, 384),
        (16, 32, 64),
        (4, 1, 64),
        (128, 256, 64),
        (450, 64, 10),
    ):
        a, b = _numbers(rows, inner), _numbers(inner, columns)
        results += [
            a @ b,
            torch.nn.functional.linear(a, b.T.contiguous(), b[0]),
            torch.baddbmm(a[None, :, :1], a[None], b[None]),
        ]
        half = torch.nn.functional.linear(a.bfloat16(), b.T.contiguous().bfloat16(), b[0].bfloat16())
        results.append(half.float())
    return results


def _network() -> list:
    """Forward, backward and an optimiser's steps of a small transformer block."""
    import torch
    from torch import nn
    from torch.nn import functional

    shapes = [(64, 1, 2, 2), (192, 64), (64, 64), (256, 64), (64, 256), (64,), (384, 64)]
    weights = [(_numbers(*shape) / 8).requires_grad_(True) for shape in shapes]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=1e-4, fused=True)
    results = []
    for precision in (torch.float32, torch.bfloat16):
        for turn in range(2):
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                patch, qkv, out, up, down, bias, shift = weights
                x = functional.conv2d(_numbers(8, 1, 8, 8) + turn, patch, bias, stride=2).flatten(2).mT
                gate, move = functional.linear(functional.silu(x.mean(1)), shift).chunk(6, 1)[:2]
                h = functional.layer_norm(x, (64,)) * (1 + gate[:, None]) + move[:, None]
                q, k, v = (
                    t.unflatten(2, (2, 32)).transpose(1, 2) for t in functional.linear(h, qkv).chunk(3, 2)
                )
                attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
                x = x + functional.linear(attended, out, bias)
                x = x + functional.linear(functional.gelu(functional.linear(x, up), approximate="tanh"), down)
            x.float().square().mean().backward()
            results += [x.detach().float(), nn.utils.clip_grad_norm_(weights, 1.0)]
            results += [w.grad.clone() for w in weights]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return [*results, *weights]


_ARITHMETIC = {"libm": _scalars, "pointwise": _pointwise, "products": _products, "network": _network}


def prepare() -> None:
    """One thread, one order of every sum, no library that chooses its code by the processor."""
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.backends.mkldnn.enabled = False  # its bf16 products ask the processor what it can do
    warnings.filterwarnings("ignore", message=".*is emulated on a CPU.*")


def header_of(name: str, arithmetic: str) -> dict[str, str]:
    """The lines above a curve: the recipe as the override command line would spell it, and the arithmetic."""
    from tests.golden.golden_cases import overrides

    return {"recipe": " ".join([name.partition("+")[0], *overrides(name)]), "arithmetic": arithmetic}


def divide(names: Sequence[str], out: Path, jobs: int) -> int:
    """Shares the curves among processes; which one a curve comes from makes no difference to it."""
    command = [sys.executable, str(Path(__file__)), "--jobs", "1", "--out", str(out)]
    shares = [names[first::jobs] for first in range(jobs) if names[first::jobs]]
    return max(process.wait() for process in [subprocess.Popen([*command, *share]) for share in shares])


def main() -> int:
    if os.environ.get("GOLDEN_CURVES_NATIVE") != "1" and any(
        os.environ.get(k) != v for k, v in PORTABLE.items()
    ):
        command = [sys.executable, str(Path(__file__)), *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **PORTABLE})
    sys.path[:0] = [str(ROOT)]  # this checkout, whatever is installed
    from tests.golden.golden_cases import NAMES

    parser = argparse.ArgumentParser(description="Records golden curves of training on the digits.")
    parser.add_argument("names", nargs="*", metavar="name", help="cases; none = all")
    parser.add_argument("--out", type=Path, default=CURVES, help="folder of the curves")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes at a time")
    parser.add_argument("--arithmetic", action="store_true", help="print this machine's arithmetic and end")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; see --list")
    names = arguments.names or NAMES
    if arguments.list:
        print("\n".join(NAMES))
        return 0
    if arguments.jobs > 1 and len(names) > 1 and not arguments.arithmetic:
        return divide(names, arguments.out, arguments.jobs)
    prepare()
    arithmetic, failed = fingerprint(), 0
    if arguments.arithmetic:
        print(arithmetic)
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        try:
            text = to_text(run(name), header_of(name, arithmetic))
        except Exception:  # the other curves are of interest all the same
            print(f"{name}: no curve", file=sys.stderr)
            traceback.print_exc()
            failed += 1
        else:
            (arguments.out / f"{name}.txt").write_text(text)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
