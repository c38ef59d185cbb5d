"""The flags of the sanitizers, and recorded calls repeated by a Python that has a sanitizer's runtime preloaded."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CXX = "g++"  # whose runtimes are libraries that can be preloaded

SANITIZERS = {
    "address": "-g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-g1 -fno-omit-frame-pointer -fsanitize=thread",
}
RUNTIMES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "address": ("libasan.so", "libubsan.so"),
    "thread": ("libtsan.so",),
}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1 atexit_sleep_ms=0",
}


def record(folder: Path, tests: list[Path], marks: str) -> subprocess.CompletedProcess[str]:
    """Runs tests and writes the calls they make to cpu.pickle, cuda.pickle and launched.txt."""
    paths = (ROOT, ROOT / "tests" / "cuda_on_host", ROOT / "tests" / "sanitize")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "record_calls", "--record-calls", str(folder)]
    command += ["-p", "no:cacheprovider", "-m", marks, *map(str, tests)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def run(kind: str, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program with the runtime of a sanitizer preloaded."""
    paths = [
        subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True).stdout
        for name in RUNTIMES[kind]
    ]
    preloaded = {"LD_PRELOAD": " ".join(path.strip() for path in paths)}
    merged = os.environ | OPTIONS | preloaded | environment
    done = subprocess.run(command, env=merged, capture_output=True, text=True)
    if (
        "unexpected memory mapping" in done.stderr
    ):  # more address space randomised than this runtime copes with
        fixed = ["setarch", platform.machine(), "-R", *command]
        done = subprocess.run(fixed, env=merged, capture_output=True, text=True)
    return done


def repeat(
    kind: str, module: Path, calls: Path, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Repeats recorded calls on a sanitized module."""
    script = str(ROOT / "tests" / "sanitize" / "recorded_calls.py")
    return run(kind, [sys.executable, "-S", script, str(module), str(calls), *options], **environment)
