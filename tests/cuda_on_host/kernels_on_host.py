"""The module `_C` with the CUDA sources compiled for the host: builds it, loads it, and puts it under the ops.

Kinds of build: ``plain``, ``address`` (AddressSanitizer and UndefinedBehaviorSanitizer) and ``thread``
(ThreadSanitizer). The objects stay in ``build/cuda_on_host``; a second build does only what a change asks for.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import recorded_calls
from filelock import FileLock
from sanitized import CXX, SANITIZERS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "cuda_on_host"

# Bits depend on -ffp-contract=off, as in setup.py; on the rest only how fast this runs.
FLAGS = (
    f"-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas "
    f"-I{HERE} -I{CSRC}"
)
KINDS = {"plain": "", **SANITIZERS}
RULES = """# Written by kernels_on_host.py
rule cxx
  command = {cxx} {flags} $more -MMD -MF $out.d -x c++ -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} $more $in -o $out -pthread -ldl
"""


def why_not() -> str:
    """Why the CUDA sources cannot be run here, or nothing."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return "the shim switches stacks on x86-64 Linux only"
    return "" if shutil.which(CXX) else f"{CXX} not found"


def stubs() -> str:
    """The ops on the CPU, which this module lacks: a source that defines them all, none to be called."""
    headers = sorted(
        p.name for p in CSRC.glob("*.h") if re.search(r"^FLOWGRPO_DECLARE_OP", p.read_text(), re.M)
    )
    return "\n".join(
        [
            '#include "declare.h"',
            "#undef FLOWGRPO_DECLARE_OP",
            "#define FLOWGRPO_DECLARE_OP(op, Args) \\",
            "  namespace cpu { void op(const Args&, int); void op(const Args&, int) { __builtin_trap(); } }",
            *(f'#include "{name}"' for name in headers),
            "",
        ]
    )


def ninja_text() -> str:
    """Python's bindings once, the kernels once a kind; block.cpp is told of the sanitizer, not instrumented."""
    lines = [RULES.format(cxx=CXX, flags=FLAGS)]

    def compiled(source: Path, folder: str, more: str) -> str:
        name = f"{folder}/{source.name}.o"
        lines.extend([f"build {name}: cxx {source}", f"  more = {more}"])
        return name

    includes = [sysconfig.get_path("include"), __import__("pybind11").get_include()]
    definitions = ("VERSION", "COMPILER", "CUDA_ARCHS", "NVCC")
    binding_flags = " ".join(
        ["-O0 -DFLOWGRPO_WITH_CUDA", *(f"-isystem {path}" for path in includes)]
        + [rf"-DFLOWGRPO_{name}=\"host\"" for name in definitions]
    )
    bindings = [compiled(CSRC / "bindings.cpp", "bindings", binding_flags)]
    bindings += [
        compiled(source, "bindings", "") for source in (CSRC / "cpu_dispatch.cpp", FOLDER / "stubs.cpp")
    ]
    for kind, sanitizer in KINDS.items():
        told = f"-DCUDA_ON_HOST_{kind.upper()}"
        kernels = [compiled(source, kind, sanitizer) for source in sorted(CSRC.glob("*.cu"))]
        runner = compiled(HERE / "block.cpp", kind, told)
        planted = compiled(HERE / "planted.cu", kind, sanitizer)
        lines += [f"build {kind}/_C.so: link {' '.join([*kernels, runner, *bindings])}"]
        lines += [f"  more = -shared {sanitizer}"]
        lines += [f"build {kind}/planted: link {planted} {runner}", f"  more = {sanitizer}"]
    return "\n".join([*lines, ""])


def built(target: str) -> Path:
    """Brings ``plain/_C.so``, ``thread/planted`` or the like up to date; others who want the same wait for it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    ninja = shutil.which("ninja", path=__import__("ninja").BIN_DIR)
    with FileLock(FOLDER / ".lock"):
        for name, text in (("stubs.cpp", stubs()), ("build.ninja", ninja_text())):
            path = FOLDER / name
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
        done = subprocess.run([ninja, "-C", str(FOLDER), target], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return FOLDER / target


def load(path: Path) -> ModuleType:
    """A module `_C` beside the ordinary one."""
    loader = importlib.machinery.ExtensionFileLoader("kernels_on_host._C", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def launched(path: Path) -> set[str]:
    """Kernels, as nm names them, that this process has launched from the loaded module at `path`."""
    library = ctypes.CDLL(str(path))
    library.cuda_on_host_launched.restype = ctypes.c_size_t
    buffer = (ctypes.c_void_p * 4096)()
    count = library.cuda_on_host_launched(buffer, ctypes.c_size_t(len(buffer)))
    base = min(
        int(line.split("-")[0], 16)
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    )
    offsets = {address - base for address in buffer[:count]}
    return {name for offset, name in functions(path) if offset in offsets}


def functions(path: Path) -> list[tuple[int, str]]:
    """Address and name of the functions of a library."""
    listing = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
    matches = re.finditer(r"^([0-9a-f]+) [tTwW] (.*)$", listing, re.M)
    return [(int(match[1], 16), match[2]) for match in matches]


def kernels(path: Path) -> set[str]:
    """Every instantiation of a __global__ function in a library, as nm names it."""
    sources = "".join(source.read_text() for pattern in ("*.cu", "*.cuh") for source in CSRC.glob(pattern))
    names = set(re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", sources))
    found = {name for _, name in functions(path) if re.search(rf"::({'|'.join(names)})[<(]", name)}
    return {name for name in found if "{lambda" not in name}  # a part of one that was not inlined


@contextmanager
def in_place_of_the_gpu(module: Any) -> Iterator[None]:
    """The ops take CPU tensors for CUDA ones and find `module` in place of the ordinary `_C`."""
    import torch

    import flowgrpo_fast.ops  # noqa: F401

    api = recorded_calls.api_that_says_cuda(torch.Tensor.__dlpack_c_exchange_api__)
    with ExitStack() as patches:
        patched = patches.enter_context
        patched(mock.patch.object(torch.Tensor, "__dlpack_c_exchange_api__", api))
        patched(mock.patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True), create=True))
        for name, loaded in list(sys.modules.items()):
            if name.startswith("flowgrpo_fast.ops.") and hasattr(loaded, "_C"):
                patched(mock.patch.object(loaded, "_C", module))
        yield
