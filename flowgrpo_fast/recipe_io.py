"""Recipes as text: JSON that loads back, `field=value` overrides that name the nearest field, names of objects."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowgrpo_fast import recipe as parts
from flowgrpo_fast.recipe import Recipe

_PARTS = {
    name: part
    for name, part in vars(parts).items()
    if dataclasses.is_dataclass(part) and isinstance(part, type)
}


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest of `known`, or the whole list where nothing is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def to_dict(part: Any) -> Any:
    """A part as plain JSON values; each dataclass names its type under `is`."""
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        values = {f.name: to_dict(getattr(part, f.name)) for f in dataclasses.fields(part)}
        return {"is": type(part).__name__, **values}
    if isinstance(part, tuple):
        return [to_dict(item) for item in part]
    return part


def from_dict(value: Any) -> Any:
    """Inverse of `to_dict`.

    Raises:
        ValueError: an unknown part or field, with the nearest known name.
    """
    if isinstance(value, list):
        return tuple(from_dict(item) for item in value)
    if not isinstance(value, Mapping):
        return value
    kind = value.get("is")
    if kind not in _PARTS:
        raise ValueError(f"unknown recipe part {kind!r}; {nearest(str(kind), _PARTS)}")
    known = {f.name for f in dataclasses.fields(_PARTS[kind])}
    for name in value:
        if name != "is" and name not in known:
            raise ValueError(f"{kind} has no field {name!r}; {nearest(name, known)}")
    return _PARTS[kind](**{k: from_dict(v) for k, v in value.items() if k != "is"})


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the whole resolved recipe, defaults included, as indented JSON."""
    path.write_text(json.dumps(to_dict(recipe), indent=2) + "\n")


def load_recipe(path: Path) -> Recipe:
    """Reads what `save_recipe` wrote; `path` is the file or a run folder that holds `recipe.json`.

    Raises:
        ValueError: no such file, not JSON, not a recipe, or a bad value.
    """
    file = path / "recipe.json" if path.is_dir() else path
    try:
        recipe = from_dict(json.loads(file.read_text()))
    except FileNotFoundError:
        raise ValueError(f"no recipe at {str(file)!r}; give a run folder or its recipe.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(file)!r} is not a JSON recipe: {error}") from None
    except TypeError as error:
        raise ValueError(f"{str(file)!r} holds a value of the wrong type: {error}") from None
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{str(file)!r} holds a {type(recipe).__name__}, not a Recipe")
    return recipe


def override(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """Applies `a.b=value` assignments in order; `window=FrozenWindow` swaps a part for another's defaults.

    Values are JSON where they parse as JSON, else strings.

    Raises:
        ValueError: not an assignment, an unknown field (nearest named), or a value of the wrong type.
    """
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator or not path:
            raise ValueError(f"{assignment!r} is not an assignment; write field=value, e.g. group_size=12")
        recipe = _assign(recipe, path.strip().split("."), text.strip(), path)
    return recipe


def _assign(part: Any, path: list[str], text: str, full: str) -> Any:
    if not dataclasses.is_dataclass(part):
        raise ValueError(f"{full!r} goes into a plain value; {path[0]!r} is not a field of it")
    known = {f.name for f in dataclasses.fields(part)}
    if path[0] not in known:
        raise ValueError(f"{type(part).__name__} has no field {path[0]!r}; {nearest(path[0], known)}")
    old = getattr(part, path[0])
    new = _assign(old, path[1:], text, full) if len(path) > 1 else _parse(text, old, full)
    return dataclasses.replace(part, **{path[0]: new})  # type: ignore[type-var]


def _parse(text: str, old: Any, full: str) -> Any:
    if dataclasses.is_dataclass(old):
        if text in _PARTS:
            return _PARTS[text]()
        if not isinstance(old, parts.DynamicShift):
            raise ValueError(f"{full} is a part; {text!r} is not one, {nearest(text, _PARTS)}")
    if isinstance(old, float) and text in _PARTS:
        return _PARTS[text]()
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if isinstance(value, list | dict):
        value = from_dict(value)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if old is not None and not isinstance(old, parts.DynamicShift) and type(value) is not type(old):
        raise ValueError(
            f"{full} is {text!r}; it must be a value of type {type(old).__name__}, such as {old!r}"
        )
    return value


def resolve(path: str) -> Any:
    """The object at `package.module:name`.

    Raises:
        ValueError: not such a path, no such module, or no such name in it.
    """
    module_name, separator, name = path.partition(":")
    if not separator:
        raise ValueError(f"{path!r} is not package.module:name")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something it needs is not
        raise ValueError(f"{path!r}: there is no module {error.name!r}") from None
    try:
        return getattr(module, name)
    except AttributeError:
        raise ValueError(f"{path!r}: module {module_name} has no {name!r}") from None
