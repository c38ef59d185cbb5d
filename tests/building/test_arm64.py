"""The baseline kernels built for arm64 and run under emulation give the bits they give here."""

from __future__ import annotations

import ast
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def flags_of_the_build() -> list[str]:
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CXX_FLAGS":
            return ast.literal_eval(node.value).split()
    raise AssertionError("setup.py has no CXX_FLAGS")


def bits(compiler: str, folder: Path, *prefix: str) -> str:
    program = folder / Path(compiler).name
    sources = [Path(__file__).parent / "bits.cpp", ROOT / "csrc/flow_step.cpp"]
    command = [compiler, *flags_of_the_build(), "-DFLOWGRPO_ISA=baseline", f"-I{ROOT / 'csrc'}", "-static"]
    subprocess.run([*command, *map(str, sources), "-o", str(program)], check=True)
    return subprocess.run([*prefix, str(program)], check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not (shutil.which(CROSS) and shutil.which(EMULATOR)),
    reason=f"{CROSS} and {EMULATOR} not found: the arm64 build is not compared here",
)
def test_arm64_gives_the_same_bits(tmp_path: Path) -> None:
    here = bits("g++", tmp_path)
    assert here.startswith("normals ")
    assert bits(CROSS, tmp_path, EMULATOR) == here
