"""``make sanitize``: the CPU code of every instruction set under AddressSanitizer, UndefinedBehaviorSanitizer and
ThreadSanitizer.

The tests of the ops run once, and what they ask of `_C` is written down: every op, its awkward sizes, its non-finite
inputs. Then a Python without torch repeats these calls on a sanitized `_C`, on one thread and on four of the own pool,
however small the work; the results must be the same bits. Each sanitizer is first shown a defect it must find.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from sanitized import CXX, ROOT, SANITIZERS, record, repeat

FOLDER = ROOT / "build" / "sanitize"
SLOW = re.compile("benchmark|counters|gpu|compile")  # tests that time or trace what others run
PLANTED = {
    "address": ("short", "AddressSanitizer: heap-buffer-overflow"),
    "thread": ("race", "WARNING: ThreadSanitizer: data race"),
}


def build(kind: str) -> Path:
    """The ordinary build with a sanitizer's flags, in a folder of its own."""
    environment = os.environ | {
        "CXX": f"{CXX} {SANITIZERS[kind]} -DFLOWGRPO_WORTHWHILE=1",
        "FLOWGRPO_FAST_CUDA": "0",
        "FLOWGRPO_FAST_BUILD": str(FOLDER / kind),
    }
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(FOLDER / kind / "lib")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return FOLDER / kind / "_C.so"


def instruction_sets(kind: str, module: Path, calls: Path) -> list[str]:
    """Those that the build and this processor have, as the module itself says."""
    said = repeat(kind, module, calls, FLOWGRPO_FAST_ISA="none").stderr
    found = re.search(r"must be one of: (.*?) \(", said)
    if found is None:
        sys.exit(said)
    return found[1].split(", ")


def check(kind: str, calls: Path) -> bool:
    """Whether the planted defect is found and nothing else is."""
    module = build(kind)
    option, complaint = PLANTED[kind]
    planted = repeat(kind, module, calls, "--planted", option, "--threads", "2")
    clean = planted.returncode != 0 and complaint in planted.stderr
    print(f"{kind}: the planted defect was {'found' if clean else 'NOT FOUND'}", flush=True)
    for isa in instruction_sets(kind, module, calls):
        for threads in ("1", "4"):
            done = repeat(kind, module, calls, "--threads", threads, FLOWGRPO_FAST_ISA=isa)
            clean &= done.returncode == 0
            verdict = done.stdout.strip() if done.returncode == 0 else f"{isa}: FAILED\n{done.stderr}"
            print(f"{kind}, {threads} thread(s), {verdict}", flush=True)
    return clean


def main() -> None:
    tests = sorted((ROOT / "tests" / "ops").glob("test_*.py"))
    done = record(FOLDER, [path for path in tests if not SLOW.search(path.stem)], "not gpu")
    print(done.stdout.strip().splitlines()[-1])
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    clean = [check(kind, FOLDER / "cpu.pickle") for kind in SANITIZERS]
    sys.exit(0 if all(clean) else 1)


if __name__ == "__main__":
    main()
