"""Builds ``flowgrpo_fast._C`` from ``csrc/`` with ninja. Needs a C++17 compiler; neither torch nor a GPU.

Environment:
    CXX                    the C++ compiler (default: the first of c++, g++, clang++)
    FLOWGRPO_FAST_CUDA     1 or 0: build the CUDA code or not (default: 1 where nvcc is found and there is something to
                           compile for: architectures asked for, a GPU, or a build before that had CUDA)
    FLOWGRPO_FAST_ARCHS    GPU architectures, e.g. "80;90", or "all" for "80;90;100;120"; PTX of the last is added
                           (default: what the build before had, if the GPUs here can run it; else these GPUs' own; else,
                           where FLOWGRPO_FAST_CUDA is 1, all)
    FLOWGRPO_FAST_BUILD    folder of build.ninja and the objects (default: build/flowgrpo_fast next to this file)

So `make demo` compiles CUDA only for a GPU that is there, `make test` asks for all architectures, and `make demo` after
`make test` has nothing to do. An architecture with a letter (90a) runs on that one alone, one without on all later ones
of its generation too, so no letter is the default: no source here needs one.

Objects stay in the build folder, with header dependencies and one log a compilation (warnings, and what ptxas says of
registers and spills), so a second build does only what a change asks for. What the CUDA kernels use is printed when it
has changed, and kept in kernels.txt.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ALL_ARCHS = "80;90;100;120"

# Contraction off: a multiply and an add round separately everywhere, so every instruction set gives the same bits.
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra "
    "-ffp-contract=off -fno-math-errno -fno-trapping-math"
)
NVCC_FLAGS = (
    "-std=c++17 -O3 -fmad=false -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra --threads 2"
)
ISA_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
}

RULES = """
rule cxx
  command = {cxx} {cxx_flags} $flags -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 || {{ cat $out.log >&2; exit 1; }}
  depfile = $out.d
  deps = gcc
  description = c++ $out
rule nvcc
  command = {nvcc} {nvcc_flags} $flags -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || {{ cat $out.log >&2; exit 1; }}
  depfile = $out.d
  deps = gcc
  description = nvcc $out
rule link
  command = {linker} -o $out $in {link_flags}
  description = link $out
"""


def fail(message: str) -> None:
    """Ends the build with one line."""
    raise SystemExit(f"flowgrpo_fast build: {message}")


def find_cxx() -> str:
    """The C++ compiler as a shell command."""
    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        if shutil.which(shlex.split(chosen)[0]) is None:
            fail(f"CXX is '{chosen}', which is not a program on PATH")
        return chosen
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        fail("no C++ compiler found (looked for c++, g++, clang++); install one or set CXX")
    return str(found)


def find_nvcc() -> str | None:
    """nvcc's path, unless there is none or the CUDA code is not to be built."""
    wanted = os.environ.get("FLOWGRPO_FAST_CUDA", "").strip()
    if wanted not in ("", "0", "1"):
        fail(f"FLOWGRPO_FAST_CUDA is '{wanted}', must be 0 or 1")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which(os.path.join(home, "bin", "nvcc"))
    if nvcc is None and wanted == "1":
        fail("FLOWGRPO_FAST_CUDA is 1 but nvcc was not found on PATH or under CUDA_HOME")
    return nvcc


def archs_asked_for() -> list[str]:
    """What FLOWGRPO_FAST_ARCHS says."""
    text = os.environ.get("FLOWGRPO_FAST_ARCHS", "").strip()
    archs = [arch.strip() for arch in (ALL_ARCHS if text == "all" else text).split(";")] if text else []
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            fail(f"FLOWGRPO_FAST_ARCHS has '{arch}', must be all, or numbers like 80;90;120 separated by ';'")
    return archs


def archs_here() -> list[str]:
    """Architectures of the GPUs in this machine, as the driver tells them."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True).stdout
    return sorted({major + minor for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", said, re.M)}, key=int)


def runs_on(gpu: str, archs: list[str]) -> bool:
    """Whether code compiled for these runs on a GPU: its own, or plain code of its generation up to its number."""
    older = [arch for arch in archs if arch.isdigit() and arch[:-1] == gpu[:-1] and int(arch) < int(gpu)]
    return bool(older) or gpu in [arch.rstrip("af") for arch in archs]


def cuda_archs(built: list[str]) -> list[str]:
    """GPU architectures to compile for, none: no CUDA; `built` is what the build before had."""
    asked = archs_asked_for()
    if asked:
        return asked
    here = archs_here()
    if built and all(runs_on(gpu, built) for gpu in here):
        return built
    return here or (ALL_ARCHS.split(";") if os.environ.get("FLOWGRPO_FAST_CUDA", "").strip() == "1" else [])


def find_ninja() -> str:
    """ninja, from its Python package or from PATH."""
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")
    if found is None:
        fail("ninja not found; pip install ninja")
    return str(found)


def pybind11_include() -> str:
    """Folder of pybind11's headers."""
    try:
        import pybind11
    except ImportError:
        fail("pybind11 not found; pip install pybind11")
    return str(pybind11.get_include())


def isas() -> dict[str, str]:
    """Instruction sets of the target and the compiler flags of each."""
    is_x86_64 = platform.machine().lower() in ("x86_64", "amd64")
    return ISA_FLAGS if is_x86_64 else {"baseline": ""}


def sources(pattern: str) -> list[str]:
    """Files of csrc: bindings.cpp makes the module, cpu_*.cpp drive the kernels, and every other .cpp holds kernels,
    which are compiled once an instruction set."""
    return sorted(path.name for path in (ROOT / "csrc").glob(pattern))


def quoted(text: object) -> str:
    """A shell word inside a ninja variable."""
    return shlex.quote(str(text)).replace("$", "$$")


def escaped(path: object) -> str:
    """A path inside a ninja build line."""
    return re.sub(r"([$: ])", r"$\1", str(path))


@dataclass
class NinjaFile:
    """Collects the edges of build.ninja."""

    folder: Path
    lines: list[str]
    objects: list[str]

    def compile(self, rule: str, source: str, flags: str = "", tag: str = "") -> None:
        """Adds one object; `tag` tells apart the objects of one source."""
        name = f"{Path(source).name}.{tag}.o" if tag else f"{Path(source).name}.o"
        self.lines += [f"build {name}: {rule} {escaped(ROOT / 'csrc' / source)}", f"  flags = {flags}"]
        self.objects.append(name)

    def write(self) -> bool:
        """Writes the file if it differs, so that an unchanged build stays untouched; whether it did."""
        text = "\n".join([*self.lines, f"build _C.so: link {' '.join(self.objects)}", "default _C.so", ""])
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "build.ninja"
        differs = not path.exists() or path.read_text() != text
        if differs:
            path.write_text(text)
        return differs


def write_ninja(folder: Path, version: str, nvcc: str | None, archs: list[str]) -> bool:
    """Writes build.ninja for this machine and environment; whether it is another than before."""
    cxx = find_cxx()
    gencode = " ".join(f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs)
    link_flags = "-undefined dynamic_lookup" if sys.platform == "darwin" else "-pthread -ldl"
    linker = f"{cxx} -shared"
    if nvcc:
        gencode += f" -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"
        # Static cudart: the module then imports on a machine without a driver.
        linker, link_flags = f"{quoted(nvcc)} -shared --cudart static", "-Xcompiler -pthread -ldl"
    host = f"-ccbin {quoted(shlex.split(cxx)[-1])}" if os.environ.get("CXX") else ""
    rules = RULES.format(
        cxx=cxx.replace("$", "$$"),
        cxx_flags=CXX_FLAGS,
        nvcc=quoted(nvcc or "nvcc"),
        nvcc_flags=f"{NVCC_FLAGS} {host} {gencode}",
        linker=f"{linker} {host}" if nvcc else linker,
        link_flags=link_flags,
    )
    ninja = NinjaFile(folder, ["# Written by setup.py", rules], [])
    compiler = subprocess.run([*shlex.split(cxx), "--version"], capture_output=True, text=True).stdout
    module_flags = bindings_flags(version, compiler.split("\n")[0], nvcc, archs)
    for source in sources("*.cu") if nvcc else ():  # first: they take longest
        ninja.compile("nvcc", source)
    for source in sources("*.cpp"):
        if source == "bindings.cpp":
            ninja.compile("cxx", source, flags=module_flags)
        elif source.startswith("cpu_"):
            ninja.compile("cxx", source)
        else:
            for isa, flags in isas().items():
                ninja.compile("cxx", source, flags=f"-DFLOWGRPO_ISA={isa} {flags}", tag=isa)
    return ninja.write()


def bindings_flags(version: str, compiler: str, nvcc: str | None, archs: list[str]) -> str:
    """Flags of the source that knows Python: include folders and what build_info() tells.

    It only unpacks arguments: -O1 compiles a quarter faster than -O3, and a call takes the same time to a percent.
    """
    definitions = {
        "FLOWGRPO_VERSION": version,
        "FLOWGRPO_COMPILER": compiler,
        "FLOWGRPO_CUDA_ARCHS": " ".join(archs),
        "FLOWGRPO_NVCC": nvcc or "",
    }
    flags = [
        f"-D{name}=" + quoted('"' + value.replace('"', "'") + '"') for name, value in definitions.items()
    ]
    flags += [f"-isystem {quoted(path)}" for path in (sysconfig.get_path("include"), pybind11_include())]
    return " ".join(["-O1", *flags, *(["-DFLOWGRPO_WITH_CUDA"] if nvcc else [])])


def demangled(symbols: list[str]) -> list[str]:
    """Names of kernels with their template arguments, as far as c++filt is there to tell."""
    filt = shutil.which("c++filt")
    if filt is None:
        return symbols
    said = subprocess.run(
        [filt], input="\n".join(symbols), capture_output=True, text=True
    ).stdout.splitlines()
    plain = [re.sub(r"\([\w:]+\)(?=\d)", "", line) for line in said]  # (bool)1 is 1
    names = [re.search(r"::(\w+(?:<[^:]*?>)?)\(", line) for line in plain]
    return [name[1] if name else symbol for name, symbol in zip(names, symbols, strict=True)]


def kernel_table(folder: Path) -> str:
    """A line a kernel, a column an architecture: what ptxas said of each, from the logs."""
    pattern = r"'(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for source in sources("*.cu"):
        log = (folder / f"{source}.o.log").read_text()
        found = re.findall(r"Compiling entry function " + pattern, log, re.S)
        names = demangled([symbol for symbol, *_ in found])
        for name, (_, arch, stores, loads, registers, rest) in zip(names, found, strict=True):
            shared = re.search(r"(\d+) bytes smem", rest)
            cell = f"{registers} {shared[1] if shared else 0} {int(stores) + int(loads)}"
            rows.setdefault((source, name), {})[arch] = cell
    archs = sorted(
        {arch for row in rows.values() for arch in row}, key=lambda arch: int(re.sub(r"\D", "", arch))
    )
    lines = [
        f"{'registers, bytes of shared memory, bytes spilled':68}" + "".join(f"{arch:>14}" for arch in archs)
    ]
    for (source, name), row in sorted(rows.items()):
        label = f"{source} {name.replace(', ', ',')}"
        lines.append(f"{label:68}" + "".join(f"{row.get(arch, '-'):>14}" for arch in archs))
    return "\n".join([*lines, ""])


class NinjaBuild(build_ext):
    """`build_ext` that hands the compilation to ninja and copies the module to where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        folder = Path(os.environ.get("FLOWGRPO_FAST_BUILD") or ROOT / "build" / "flowgrpo_fast")
        kept = folder / "archs.txt"  # of the last build that succeeded
        nvcc = find_nvcc()
        archs = cuda_archs(kept.read_text().split() if kept.exists() else []) if nvcc else []
        nvcc = nvcc if archs else None
        if write_ninja(folder, self.distribution.get_version(), nvcc, archs):
            cuda = f"CUDA for {' '.join(archs)}" if archs else "no CUDA"
            print(f"flowgrpo_fast build: C++ for {', '.join(isas())}; {cuda}", flush=True)
        quiet = not self.verbose and not sys.stdout.isatty()  # a terminal has one line for how far it is
        flags = ["-v"] if self.verbose > 1 else ["--quiet"] if quiet else []
        if subprocess.run([find_ninja(), "-C", str(folder), *flags]).returncode:
            fail("compilation failed; the compiler's messages are above")
        kept.write_text(" ".join(archs))
        if nvcc:
            self.show_kernels(folder)
        target = Path(self.get_ext_fullpath(ext.name))
        built = folder / "_C.so"
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.stat().st_mtime < built.stat().st_mtime:
            replacement = target.with_name(target.name + ".new")
            shutil.copy2(built, replacement)  # never written in place: a running process may have it mapped
            replacement.replace(target)

    def show_kernels(self, folder: Path) -> None:
        """Prints what the CUDA kernels use, if that has changed."""
        table, kept = kernel_table(folder), folder / "kernels.txt"
        if not kept.exists() or kept.read_text() != table:
            kept.write_text(table)
            print(table, end="")


setup(ext_modules=[Extension("flowgrpo_fast._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
