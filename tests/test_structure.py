"""The house rules of CONTRIBUTING.md, checked on the source itself."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flowgrpo_fast"
SOURCES = sorted(PACKAGE.rglob("*.py"))
CSRC = sorted(path for path in (ROOT / "csrc").iterdir() if path.suffix in (".h", ".cuh", ".cpp", ".cu"))

# Data flows one way: a room imports only from rooms below it. The number is the room's floor.
FLOORS = {
    "ops": 1,
    "checks": 1,
    "names": 1,
    "json_files": 1,
    "field_types": 1,
    "device": 1,
    "schedule": 2,
    "run_files": 2,
    "confirm": 2,
    "types": 3,
    "objectives": 4,
    "precision": 4,
    "models": 5,
    "credit": 5,
    "compat": 5,
    "sampling": 6,
    "rewards": 6,
    "data": 6,
    "experience": 7,
    "recipe": 8,
    "recipes": 9,
    "recipe_io": 9,
    "training": 9,
    "planner": 10,
    "monitor": 10,
    "launch": 11,
    "cli": 12,
}

# What asks an object what it can do, or tells objects by address, each with its reason: (file, source) -> why.
ASKED = {
    ("field_types.py", "getattr(kind, '_is_protocol', False)"): "typing.is_protocol came with Python 3.13",
    ("field_types.py", "getattr(part, name, None)"): "the one check of a user's part against its protocol",
    ("field_types.py", "hasattr(part, name)"): "the one check of a user's part against its protocol",
    ("field_types.py", "getattr(kind, '__name__', kind)"): "a type in words: some of typing's have no name",
    (
        "run_files.py",
        "getattr(found, attribute, None)",
    ): "a class that a run file names, which may not be there",
    ("models/loading.py", "hasattr(model, part)"): "the one check of what a user's loader made",
    (
        "models/loading.py",
        "inspect.signature(loader)",
    ): "a user's loader that cannot be called is refused by it",
    ("models/pipeline.py", "getattr(pipe, name, None)"): "diffusers' pipelines leave out optional parts",
    ("models/sana.py", "inspect.signature(SanaPipeline.__call__)"): "the published default of an argument",
    (
        "models/execution.py",
        "inspect.signature(block.forward)",
    ): "names of what diffusers hands its blocks in order",
    ("models/execution.py", "getattr(module, 'processor', None)"): "diffusers has no type for what attends",
    (
        "models/execution.py",
        "hasattr(processor, '_attention_backend')",
    ): "diffusers sets no backend without it",
    ("models/execution.py", "getattr(op, 'namespace', '')"): "torch's higher-order operators have none",
    ("precision/apply.py", "id(tensor)"): "copy.deepcopy takes what it shall not copy by id",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


BELOW_RECIPE = [path for path in SOURCES if FLOORS.get(room(path), 0) < FLOORS["recipe"]]
OUR_OWN = [path for path in SOURCES if room(path) not in ("ops", "compat")]  # compat's inside is the peers'


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
        rooms |= {name.split(".")[1] for name in names if name.startswith("flowgrpo_fast.")}
    return rooms - {"_C"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_flow_one_way(path: Path) -> None:
    own = room(path)
    if own == "__init__":
        return
    for other in imported_rooms(ast.parse(path.read_text())) - {own}:
        assert FLOORS[other] < FLOORS[own], f"{own} must not import {other}"


def words(node: ast.AST) -> set[str]:
    """Names, last names of attributes, and strings of an expression."""
    found = {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
    found |= {x.attr for x in ast.walk(node) if isinstance(x, ast.Attribute)}
    return found | {
        x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and isinstance(x.value, str)
    }


def asks_for_the_class(node: ast.AST) -> set[str]:
    """The words of an expression that chooses by a class or by its name; empty for any other."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
        return words(node)
    if isinstance(node, ast.MatchClass):
        return words(node.cls)
    if isinstance(node, ast.MatchValue | ast.Compare):
        return words(node)
    if isinstance(node, ast.Dict):  # a table of what to do with each
        keys = [key for key in node.keys if isinstance(key, ast.Name | ast.Attribute)]
        return set().union(*(words(key) for key in keys))
    return set()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_what_a_part_does_is_written_beside_it(path: Path) -> None:
    """Nobody else asks for the type of a recipe's part, nor for its name: a user's own is used like ours."""
    from flowgrpo_fast.recipe import PARTS

    elsewhere = {name for name, part in PARTS.items() if Path(inspect.getfile(part)) != path} - {"Recipe"}
    for node in ast.walk(ast.parse(path.read_text())):
        asked = asks_for_the_class(node) & elsewhere
        assert not asked, f"{name_of(path)}:{node.lineno}: {ast.unparse(node)} asks for {asked}"


def test_the_classes_of_parts_are_recognised() -> None:
    """The check above sees every way to ask."""
    for text in (
        "isinstance(recipe.solver, Euler)",
        "isinstance(x, (int, dynamics.Euler))",
        "type(solver) is Euler",
        "type(solver) == dynamics.Euler",
        "type(solver) in (Euler, Heun)",
        "type(solver).__name__ == 'Euler'",
        "{Euler: 1}[type(solver)]",
        "match solver:\n    case Euler():\n        pass",
        "match type(solver).__name__:\n    case 'Euler':\n        pass",
    ):
        assert any("Euler" in asks_for_the_class(node) for node in ast.walk(ast.parse(text))), text
    for text in (
        "Euler()",
        "part: Euler | None = None",
        "field(default_factory=Euler)",
        "rule = solver or Euler()",
    ):
        assert not any("Euler" in asks_for_the_class(node) for node in ast.walk(ast.parse(text))), text


@pytest.mark.parametrize("path", BELOW_RECIPE, ids=name_of)
def test_below_the_recipe_nobody_knows_it(path: Path) -> None:
    """A function takes what it needs, never a whole recipe or engine."""
    for node in ast.walk(ast.parse(path.read_text())):
        named = set()
        if isinstance(node, ast.Name):
            named = {node.id}
        elif isinstance(node, ast.Attribute):
            named = {node.attr}
        elif isinstance(node, ast.alias):
            named = {node.name, node.asname}
        elif isinstance(node, ast.arg) and isinstance(node.annotation, ast.Constant):
            named = set(re.findall(r"\w+", str(node.annotation.value)))
        assert not named & {"Recipe", "Engine"}, f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}"


def asking(tree: ast.AST) -> list[str]:
    """Expressions that find out what an object can do, or what a function takes, or that tell objects by address."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        by_default = name == "getattr" and len(node.args) + len(node.keywords) > 2
        if by_default or name in ("hasattr", "inspect.signature", "signature", "id"):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", OUR_OWN, ids=name_of)
def test_abilities_are_written_in_protocols(path: Path) -> None:
    """No getattr with a default, no hasattr, no arguments chosen by signature, no caches by address."""
    allowed = {text for name, text in ASKED if name == name_of(path)}
    assert set(asking(ast.parse(path.read_text()))) - allowed == set()


def test_every_exception_is_still_needed() -> None:
    for name, text in ASKED:
        assert text in asking(ast.parse((PACKAGE / name).read_text())), f"{name}: {text}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_text_is_utf8_whatever_the_locale(path: Path) -> None:
    """Whoever opens text names its encoding."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        literals = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        binary = any(isinstance(value, str) and "b" in value for value in literals)
        owner = ast.unparse(node.func)
        if name in ("read_text", "write_text") or (
            name == "open" and not binary and owner not in ("Image.open", "os.open")
        ):
            named = {keyword.arg for keyword in node.keywords}
            ours = owner == "read_text"  # `json_files.read_text`, which decodes UTF-8 itself
            assert ours or owner == "safe_open" or "encoding" in named, f"{name_of(path)}:{node.lineno}"


def test_ops_stand_alone() -> None:
    allowed = {"torch", "flowgrpo_fast", *sys.stdlib_module_names}
    for path in (PACKAGE / "ops").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= allowed, path


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
