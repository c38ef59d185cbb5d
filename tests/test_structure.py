"""The house rules of CONTRIBUTING.md, checked on the source itself."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flowgrpo_fast"
SOURCES = sorted(PACKAGE.rglob("*.py"))
CSRC = sorted(path for path in (ROOT / "csrc").iterdir() if path.suffix in (".h", ".cuh", ".cpp", ".cu"))

# Data flows one way: a room imports only from rooms above it. The number is the room's floor.
FLOORS = {
    "ops": 1,
    "checks": 1,
    "names": 1,
    "types": 2,
    "data": 2,
    "rewards.terms": 2,
    "recipe": 2,
    "recipe_io": 2,
    "sampling": 3,
    "precision": 4,
    "models": 5,
    "rewards": 6,
    "credit": 7,
    "losses": 8,
    "training": 9,
    "monitor": 10,
    "planner": 10,
    "recipes": 11,
    "compat": 12,
    "launch": 12,
    "cli": 13,
}
RECORDS = {"types", "data", "rewards.terms", "recipe", "recipe_io"}  # may import each other
LONG = {"train_step": 80, "rollout": 80}


def room(path: Path) -> str:
    return room_of(path.relative_to(PACKAGE).with_suffix("").parts)


def room_of(names: Sequence[str]) -> str:
    """The folder or file; the part that names a reward is a room of its own, which recipes import."""
    return "rewards.terms" if tuple(names[:2]) == ("rewards", "terms") else names[0]


def imported_rooms(tree: ast.AST) -> set[str]:
    rooms = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "flowgrpo_fast":
                names = [f"flowgrpo_fast.{alias.name}" for alias in node.names]
        rooms |= {room_of(name.split(".")[1:]) for name in names if name.startswith("flowgrpo_fast.")}
    return rooms - {"_C"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_one_way(path: Path) -> None:
    own = room(path)
    if own == "__init__":
        return
    for other in imported_rooms(ast.parse(path.read_text())) - {own}:
        assert FLOORS[other] <= FLOORS[own], f"{own} must not import {other}"
        assert FLOORS[other] < FLOORS[own] or {own, other} <= RECORDS


def test_ops_stand_alone() -> None:
    allowed = {"torch", "flowgrpo_fast", *sys.stdlib_module_names}
    for path in (PACKAGE / "ops").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= allowed, path


def nesting(node: ast.AST, depth: int = 0) -> int:
    deeper = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
    below = []
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        below.append(nesting(child, depth + (isinstance(child, deeper) and not is_elif)))
    return max([depth, *below])


@pytest.mark.parametrize("path", [*SOURCES, ROOT / "setup.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_python_stays_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        arguments = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
        body = node.body[1:] if ast.get_docstring(node) else node.body
        lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
        assert lines <= LONG.get(node.name, 60), f"{node.name} has {lines} lines"
        assert nesting(node) <= 4, f"{node.name} nests too deeply"
        # A signature that another trainer dictates is as long as theirs.
        assert arguments <= 8 + (node.args.args[:1] != [] and node.args.args[0].arg == "self") or (
            room(path) == "compat" or path.name == "scheduler.py"
        ), f"{node.name} takes {arguments} arguments"


@pytest.mark.parametrize("path", CSRC, ids=lambda p: p.name)
def test_native_files_stay_small_and_know_no_torch(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert "torch/" not in text
    assert "ATen" not in text


def test_kernels_are_launched_through_one_macro() -> None:
    """Which the host's build replaces, see tests/cuda_on_host; and they use nothing that it lacks."""
    for path in CSRC:
        text = path.read_text()
        assert ("<<<" in text) == (path.name == "launch.cuh"), path
        for word in ("extern __shared__", "atomic", "cooperative_groups", "asm("):
            assert path.suffix not in (".cu", ".cuh") or word not in text, f"{path}: {word}"


def test_every_op_has_exactly_one_reference() -> None:
    """Each op of `ops` has one function of the same name (without a trailing `_`) in `ops/reference/`, free of `_C`."""
    from flowgrpo_fast import ops
    from flowgrpo_fast.ops import reference

    noise = {"philox_normal", "philox_uint32"}  # their references are `philox4x32_10` and `normal_of_words`
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))} - {"build_info"}
    assert {"flow_step", "flow_log_prob"} <= functions
    for op in functions - noise:
        assert callable(getattr(reference, op.rstrip("_")))
        defined = [p for p in SOURCES if f"def {op.rstrip('_')}(" in p.read_text() and "ops" not in p.parts]
        assert not defined, f"{op} is defined again in {defined}"
    for path in (PACKAGE / "ops" / "reference").glob("*.py"):
        tree = ast.parse(path.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any("_C" in ast.dump(node) for node in imports)


def test_no_rooms_for_odds_and_ends() -> None:
    for path in [*SOURCES, *CSRC]:
        for word in ("util", "helper", "manager", "misc", "common"):
            assert word not in path.stem.lower(), path


def test_the_sources_are_ascii_and_whole() -> None:
    for path in [*SOURCES, *CSRC]:
        text = path.read_text()
        assert text.isascii(), path
        for word in ("TODO", "FIXME", "XXX", "NotImplementedError"):
            assert word not in text, f"{path}: {word}"
