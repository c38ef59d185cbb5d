"""The CUDA sources themselves, compiled for the host: every kernel runs, gives the CPU's bits, and is clean under the
sanitizers, which find what is planted. What each kernel computes is compared in tests/ops, see the fixture `device`."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
from pathlib import Path

import kernels_on_host
import numpy as np
import pytest
import recorded_calls
import sanitized

from flowgrpo_fast import _C

pytestmark = pytest.mark.skipif(bool(kernels_on_host.why_not()), reason=kernels_on_host.why_not() or "runs")
TOOLKIT = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda")

BARRIER = "cuda_on_host: kernel: a barrier is not reached by all threads of a block"
PLANTED = [
    ("plain", "one leaves", BARRIER),
    ("plain", "half a warp", BARRIER),
    ("plain", "two operations", "cuda_on_host: kernel: lanes of a warp wait at different operations"),
    ("plain", "no blocks", "refused"),
    ("address", "outside", "AddressSanitizer: heap-buffer-overflow"),
    ("address", "outside shared", "index 64 out of bounds for type 'int [64]'"),
    ("address", "undefined shift", "shift exponent 40 is too large"),
    ("thread", "reverse without barrier", "ThreadSanitizer: data race"),
    ("thread", "neighbour without barrier", "ThreadSanitizer: data race"),
]


def planted(kind: str, name: str) -> subprocess.CompletedProcess[str]:
    return sanitized.run(kind, [str(kernels_on_host.built(f"{kind}/planted")), name])


@pytest.mark.parametrize(("kind", "name", "complaint"), PLANTED, ids=str)
def test_a_planted_defect_is_found(kind, name, complaint):
    done = planted(kind, name)
    assert done.returncode != 0
    assert complaint in done.stderr


@pytest.mark.parametrize("kind", kernels_on_host.KINDS)
@pytest.mark.parametrize("name", ["reverse", "neighbour", "inside", "all stay"])
def test_the_same_without_the_defect_is_clean(kind, name):
    done = planted(kind, name)
    assert (done.returncode, done.stderr) == (0, "")
    if name == "reverse":
        assert done.stdout.split() == [str(i) for i in [*range(63, -1, -1), *range(127, 63, -1)]]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the witness tests call."""
    folder = tmp_path_factory.mktemp("recorded")
    tests = [
        p for p in Path(sanitized.ROOT, "tests/ops").glob("test_*.py") if "mark.witness" in p.read_text()
    ]
    done = sanitized.record(folder, tests, "witness and not gpu")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def calls(recorded: Path) -> list[recorded_calls.Call]:
    return pickle.loads((recorded / "cuda.pickle").read_bytes())


def test_witness_tests_run_every_kernel(recorded):
    kernels = kernels_on_host.kernels(kernels_on_host.built("plain/_C.so"))
    assert any("flow_step_kernel<float>" in name for name in kernels)
    assert kernels - set((recorded / "launched.txt").read_text().splitlines()) == set()


def is_sum(call: recorded_calls.Call, array: recorded_calls.Array) -> bool:
    """Floating-point values that are not one an element of the first argument, or made with sums over them."""
    per_element = array.shape == call.arrays[0].shape and call.op != "group_advantages"
    return array.dtype[:2] in ((2, 32), (2, 64)) and not per_element


def test_results_are_the_cpu_s(calls):
    """Bit by bit, except for sums, which the devices add up in orders of their own."""
    equal = 0
    for call in calls:
        contents = recorded_calls.repeat(_C, call, 1) or [array.before for array in call.arrays]
        for array, content in zip(call.arrays, contents, strict=True):
            if content in (array.before, array.after):  # the CPU leaves a GPU's workspaces alone
                equal += content == array.after != array.before
                continue
            assert is_sum(call, array), call.op
            dtype = np.float32 if array.dtype[1] == 32 else np.float64
            ours, theirs = np.frombuffer(array.after, dtype), np.frombuffer(content, dtype)
            np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6 * (1 + np.nanmax(np.abs(theirs))))
    assert equal > len(calls)


@pytest.mark.parametrize("kind", sanitized.SANITIZERS)
def test_every_kernel_is_clean(recorded, kind):
    module = kernels_on_host.built(f"{kind}/_C.so")
    done = sanitized.repeat(kind, module, recorded / "cuda.pickle", "--cuda")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert re.search(r"\d+ calls repeated", done.stdout)


def test_an_array_one_byte_short_is_found(recorded):
    module = kernels_on_host.built("address/_C.so")
    done = sanitized.repeat("address", module, recorded / "cuda.pickle", "--cuda", "--planted", "short")
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


@pytest.mark.skipif(
    not (TOOLKIT / "include/cuda_fp4.h").exists(), reason="no CUDA toolkit: its conversions not compared"
)
def test_conversions_are_the_toolkit_s(tmp_path):
    program = tmp_path / "conversions"
    source = Path(__file__).with_name("conversions.cpp")
    flags = ["-std=c++17", "-O1", f"-isystem{TOOLKIT}/include", f"-I{kernels_on_host.CSRC}"]
    subprocess.run([sanitized.CXX, *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
