"""Recipes as text: JSON that loads back, `field=value` overrides that name the nearest field."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flowgrpo_fast import recipe as parts
from flowgrpo_fast.data.prompts import read_text
from flowgrpo_fast.names import nearest
from flowgrpo_fast.recipe import Recipe

_PARTS = {
    name: part
    for name, part in vars(parts).items()
    if dataclasses.is_dataclass(part) and isinstance(part, type)
}


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
        ValueError: an unknown part or field, with the nearest known name; a missing field, or one of another type.
    """
    if isinstance(value, list):
        return tuple(from_dict(item) for item in value)
    if not isinstance(value, Mapping):
        return value
    kind = value.get("is")
    if not isinstance(kind, str):
        raise ValueError(f'{json.dumps(value)} has no "is" that names its part, such as "RewardTerm"')
    if kind not in _PARTS:
        raise ValueError(f"unknown recipe part {kind!r}; {nearest(kind, _PARTS)}")
    fields, hints = dataclasses.fields(_PARTS[kind]), get_type_hints(_PARTS[kind])
    values = {name: from_dict(item) for name, item in value.items() if name != "is"}
    for name, item in values.items():
        if name not in hints:
            raise ValueError(f"{kind} has no field {name!r}; {nearest(name, hints)}")
        if not _fits(item, hints[name]):
            raise ValueError(
                f"{kind}.{name} is {_as_text(item)}; it must be a value of type {_described(hints[name])}"
            )
    for field in fields:
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{kind} needs a value for {field.name!r}")
    return _PARTS[kind](**values)


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
        recipe = from_dict(json.loads(read_text(file, "recipe")))
    except FileNotFoundError:
        raise ValueError(f"no recipe at {str(file)!r}; give a run folder or its recipe.json") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(file)!r} is not a JSON recipe: {error}") from None
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
    hint = get_type_hints(type(part))[path[0]]
    new = _assign(old, path[1:], text, full) if len(path) > 1 else _parse(text, hint, old, full)
    return dataclasses.replace(part, **{path[0]: new})  # type: ignore[type-var]


def _parse(text: str, hint: Any, old: Any, full: str) -> Any:
    kinds = {kind.__name__: kind for kind in _alternatives(hint) if kind in _PARTS.values()}
    if text in kinds:
        return kinds[text]()
    if len(kinds) == len(_alternatives(hint)):
        raise ValueError(f"{full} is a part; {text!r} is not one of its kind, {nearest(text, kinds)}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if isinstance(value, list | dict):
        value = from_dict(value)
    if float in _alternatives(hint) and type(value) is int:
        value = float(value)
    if not _fits(value, hint):
        example = "" if old is None else f", such as {_as_text(old)}"
        raise ValueError(f"{full} is {text!r}; it must be a value of type {_described(hint)}{example}")
    return value


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types a field may have: the members of a union, or the one."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has a field's type. An int may stand for a float; which word is known, the part says."""
    if len(_alternatives(hint)) > 1:
        return any(_fits(value, one) for one in _alternatives(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and _items_fit(value, get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str)
    return type(value) is hint or (hint is float and type(value) is int)


def _items_fit(values: tuple[Any, ...], hints: tuple[Any, ...]) -> bool:
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(values)
    return len(values) == len(hints) and all(map(_fits, values, hints))


def _described(hint: Any) -> str:
    """A field's type as a message names it."""
    if len(_alternatives(hint)) > 1:
        return " or ".join(map(_described, _alternatives(hint)))
    if get_origin(hint) is tuple:
        items = ("..." if item is Ellipsis else _described(item) for item in get_args(hint))
        return f"[{', '.join(items)}]"
    if get_origin(hint) is Literal:
        return "str"
    return "null" if hint is NoneType else str(hint.__name__)


def _as_text(value: Any) -> str:
    """A value as a run file and an override spell it."""
    return json.dumps(to_dict(value))
