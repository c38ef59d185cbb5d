"""setup.py: rebuilds what a change asks for and nothing else, and says in one line what it lacks."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD_INPUTS = ("csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")
HAS_NVCC = shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()


def copy_tree(target: Path) -> Path:
    for name in BUILD_INPUTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name)
        elif source.exists():
            shutil.copy2(source, target / name)
    (target / "flowgrpo_fast").mkdir()
    (target / "flowgrpo_fast" / "__init__.py").touch()
    return target


def build(tree: Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, "FLOWGRPO_FAST_CUDA": "0", **environment}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        env={name: value for name, value in merged.items() if value is not None},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = copy_tree(tmp_path_factory.mktemp("tree"))
    result = build(tree)
    assert result.returncode == 0, result.stdout + result.stderr
    return tree


def object_times(tree: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (tree / "build" / "flowgrpo_fast").glob("*.o")}


def rebuilt_by_touching(tree: Path, header: str) -> set[str]:
    before = object_times(tree)
    (tree / "csrc" / header).touch()
    result = build(tree)
    assert result.returncode == 0, result.stdout + result.stderr
    after = object_times(tree)
    return {name for name in after if after[name] != before[name]}


@pytest.mark.slow
def test_module_lands_in_the_package_and_imports_without_torch(built):
    code = (
        "import sys; import flowgrpo_fast._C as c; assert 'torch' not in sys.modules; "
        "info = c.build_info(); assert info['cuda_archs'] == [] and 'baseline' in info['isas']; print(info['isa'])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=built, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_second_build_does_nothing(built):
    before = object_times(built)
    result = build(built)
    assert "no work to do" in result.stdout
    assert object_times(built) == before


@pytest.mark.slow
def test_touched_header_rebuilds_what_includes_it(built):
    kernels = {name for name in object_times(built) if re.match(r"\w+\.cpp\.\w+\.o", name)}
    assert kernels
    others = object_times(built).keys() - kernels
    assert rebuilt_by_touching(built, "tensor.h") == {name for name in others if name.startswith("bind")}
    drivers = {name for name in others if name.startswith("cpu_")}
    assert rebuilt_by_touching(built, "parallel.h") == drivers | {"bindings.cpp.o"}
    by_tile = rebuilt_by_touching(built, "cpu_tile.h")
    assert {name for name in kernels if name.startswith("flow_")} <= by_tile <= kernels


def symbols(path: Path, *flags: str) -> list[str]:
    listing = subprocess.run(
        ["nm", "-C", *flags, str(path)], capture_output=True, text=True, check=True
    ).stdout
    return [line.split(maxsplit=2)[-1] for line in listing.splitlines() if line.strip()]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm not found")
def test_instruction_sets_share_no_symbol(built):
    """A function two objects define could be taken from the AVX-512 one and run where there is no AVX-512."""
    objects = list((built / "build" / "flowgrpo_fast").glob("*.cpp.*.o"))
    assert objects
    for path in objects:
        isa = path.name.split(".")[2]
        for symbol in symbols(path, "--defined-only", "--extern-only"):
            assert f"::{isa}::" in symbol, f"{path.name} defines {symbol}"


@pytest.mark.slow
def test_compilers_have_no_warnings(built):
    for log in (built / "build" / "flowgrpo_fast").glob("*.log"):
        assert "warning" not in log.read_text(), log.read_text()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "no-such-compiler"}, "CXX is 'no-such-compiler', which is not a program on PATH"),
        ({"FLOWGRPO_FAST_CUDA": "yes"}, "FLOWGRPO_FAST_CUDA is 'yes', must be 0 or 1"),
        (
            {"CXX": None, "PATH": ""},
            "no C++ compiler found (looked for c++, g++, clang++); install one or set CXX",
        ),
        (
            {
                "FLOWGRPO_FAST_CUDA": "1",
                "PATH": "",
                "CUDA_HOME": "/nonexistent",
                "CXX": shutil.which("c++") or "c++",
            },
            "FLOWGRPO_FAST_CUDA is 1 but nvcc was not found on PATH or under CUDA_HOME",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_missing_is_one_line(tmp_path, environment, message):
    result = build(copy_tree(tmp_path), **environment)
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1] == f"flowgrpo_fast build: {message}"
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(not HAS_NVCC, reason="nvcc not found: CUDA code not compiled")
def test_bad_architecture_is_one_line(tmp_path):
    result = build(copy_tree(tmp_path), FLOWGRPO_FAST_CUDA="1", FLOWGRPO_FAST_ARCHS="80;hopper")
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "flowgrpo_fast build: FLOWGRPO_FAST_ARCHS has 'hopper', must be all, or numbers like 80;90;120 separated by ';'"
    )


@pytest.mark.parametrize(
    ("gpus", "built", "environment", "archs"),
    [
        (None, "", {}, ""),
        (None, "", {"CUDA": "1"}, "80 90 100 120"),
        (None, "", {"ARCHS": "all"}, "80 90 100 120"),
        (None, "80 90", {}, "80 90"),  # what `make test` compiled stays
        (None, "80 90", {"ARCHS": "90; 120"}, "90 120"),
        ("", "", {}, ""),  # a driver without a GPU
        ("9.0", "", {}, "90"),
        ("12.0\n8.9\n12.0", "", {}, "89 120"),
        ("8.9", "80 90 100 120", {}, "80 90 100 120"),  # sm_80's code runs on it
        ("10.3", "80 90 100 120", {}, "80 90 100 120"),
        ("10.3", "80 100a 120", {}, "103"),  # sm_100a's does not
        ("9.0", "90a", {}, "90a"),
        ("8.0", "89", {}, "80"),
        ("9.0\n12.0", "80 90", {}, "90 120"),
    ],
)
def test_architectures_are_those_asked_for_or_the_last_ones_or_the_gpus(
    tmp_path, monkeypatch, gpus, built, environment, archs
):
    if gpus is not None:
        smi = tmp_path / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\n/bin/cat <<END\n{gpus}\nEND\n")
        smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA", "ARCHS"):
        monkeypatch.setenv(f"FLOWGRPO_FAST_{name}", environment.get(name, ""))
    with mock.patch("setuptools.setup"):
        setup = runpy.run_path(str(ROOT / "setup.py"))
    assert setup["cuda_archs"](built.split()) == archs.split()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_NVCC, reason="nvcc not found: CUDA code not compiled")
def test_cuda_compiles_for_every_architecture_without_spills(built):
    result = build(built, FLOWGRPO_FAST_CUDA="1", FLOWGRPO_FAST_ARCHS="all")
    assert result.returncode == 0, result.stdout + result.stderr
    folder = built / "build" / "flowgrpo_fast"
    header, *rows = (folder / "kernels.txt").read_text().splitlines()
    assert header.split()[-4:] == ["sm_80", "sm_90", "sm_100", "sm_120"]
    assert "flow_step_kernel<float>" in result.stdout
    sources = {path.name: path.read_text() for path in (built / "csrc").glob("*.cu")}
    with_kernels = {name for name, text in sources.items() if "__global__" in text}
    assert {row.split()[0] for row in rows} == with_kernels
    for row in rows:
        numbers = [int(number) for number in row.split()[2:]]
        assert len(numbers) == 4 * 3, row
        assert max(numbers[0::3]) <= 128, f"two blocks of 256 threads must fit on a multiprocessor: {row}"
        assert max(numbers[1::3]) <= 48 << 10, row
        assert max(numbers[2::3]) == 0, row
    for name in sources:
        assert "warning" not in (folder / f"{name}.o.log").read_text(), name
    # As `make demo` does after `make test`: nothing, and the CUDA code stays.
    before = object_times(built)
    again = build(built, FLOWGRPO_FAST_CUDA=None, FLOWGRPO_FAST_ARCHS=None)
    assert "no work to do" in again.stdout, again.stdout + again.stderr
    assert object_times(built) == before
    code = "import flowgrpo_fast._C as c; print(*c.build_info()['cuda_archs'])"
    said = subprocess.run([sys.executable, "-c", code], cwd=built, capture_output=True, text=True)
    assert said.stdout.split() == ["80", "90", "100", "120"], said.stderr
