"""Recipes of any root class as text: run files that load back, `field=value` overrides, lines that say what is wrong.

A part is a frozen dataclass. Known parts go by their short name, anyone else's by `package.module:Class`; what a
field takes is its type alone, see `field_types`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Generic, TypeVar

from flowgrpo_fast.field_types import (
    accepts,
    alternatives,
    choices_of,
    field_types,
    fits,
    is_part,
    item_type,
    lacks,
    listed,
    must_be,
    protocol_of,
    sequence_type,
    takes_mapping,
    takes_parts,
)
from flowgrpo_fast.json_files import CODE, parse_json, read_json, shortened, write_whole
from flowgrpo_fast.names import nearest, resolve

Root = TypeVar("Root")
_LARGEST = 1e15  # of a number in a recipe; the products of two such are far from fp32's 3e38


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in a recipe a value stands: what messages call it, and where suggestions are looked for."""

    root: Any  # the recipe, or its class while it is being read
    label: str  # how paths begin: with the class's name in a file, with nothing on the command line
    path: tuple[str, ...] = ()

    def at(self, name: str | int) -> _Place:
        """The place of a field or an item of the value here."""
        return dataclasses.replace(self, path=(*self.path, str(name)))

    def __str__(self) -> str:
        return ".".join((self.label, *self.path) if self.label else self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles(Generic[Root]):
    """Reads, writes and changes recipes of one root class.

    `parts` are the classes that go by a short name. `replaced` says what became of an older edition's names: a part's
    name, or (part, field), -> the new name, and after a colon how to write it, e.g. {("Recipe", "loss"): "objective:
    its PolicyGradient has clip_range"}. It is asked only for names that are no longer known. `functions` says which
    part stands for a plain `module:function` where a field takes a protocol: protocol -> what makes it of that text.
    """

    root: type[Root]
    parts: Mapping[str, type]
    replaced: Mapping[str | tuple[str, str], str] = field(default_factory=dict)
    functions: Mapping[Any, Callable[[str], Any]] = field(default_factory=dict)

    def to_dict(self, value: Any) -> Any:
        """A part as plain JSON values; each dataclass names its class under `is`."""
        if is_part(value):
            values = {name: self.to_dict(getattr(value, name)) for name in field_types(type(value))}
            return {"is": self._name(type(value)), **values}
        if isinstance(value, tuple | list):
            return [self.to_dict(item) for item in value]
        if isinstance(value, Mapping):
            return {key: self.to_dict(item) for key, item in value.items()}
        return value

    def from_dict(self, value: Any) -> Any:
        """Inverse of `to_dict`; imports the modules that parts are named by.

        Raises:
            ValueError: an unknown part or field, with the nearest known name; a missing field, or one of another type;
                a number that is not finite.
        """
        return self._read(value, self.root, _Place(None, ""))

    def save(self, recipe: Root, path: Path) -> None:
        """Writes the whole recipe, defaults included, as indented JSON; a file that says the same is left alone.

        Raises:
            ValueError: a value that no file can hold, so that what is written also loads.
        """
        for place, value in _walk(recipe, _Place(recipe, type(recipe).__name__)):
            if is_part(value) and "<locals>" in type(value).__qualname__:
                raise ValueError(
                    f"{place} is a {type(value).__name__}, a class inside a function, which no run file can name; "
                    "move it to the top of a module"
                )
            if isinstance(value, Mapping) and not all(isinstance(key, str) and key != "is" for key in value):
                raise ValueError(f"{place} has the keys {list(value)}; they must be strings other than 'is'")
            if not (is_part(value) or isinstance(value, int | float | str | None | tuple | list | Mapping)):
                raise ValueError(f"{place} is a {type(value).__name__}, which a run file cannot hold")
            _check_number(value, place)
        write_whole(path, json.dumps(self.to_dict(recipe), indent=2) + "\n")

    def load(self, path: Path) -> Root:
        """Reads what `save` wrote; `path` is the file or a run folder that holds `recipe.json`.

        Raises:
            ValueError: no such file, not JSON, not a recipe, or a bad value.
        """
        recipe = self.from_dict(read_json(path))
        if not isinstance(recipe, self.root):
            raise ValueError(f"{str(path)!r} holds a {type(recipe).__name__}, not a {self.root.__name__}")
        return recipe

    def override(self, recipe: Root, assignments: Sequence[str]) -> Root:
        """Applies `a.b=value` assignments in order; `topology=Tree` swaps a part for another's defaults.

        The recipe is put together, and checked, once: assignments that need each other may come in any order. Values
        are JSON where they parse as JSON, else strings. An item of a list goes by its index, `credit.0.eps=0.3`,
        one of a mapping by its key.

        Raises:
            ValueError: not an assignment, an unknown field (nearest named), or a value of the wrong type.
        """
        changed: dict[str, Any] = {}
        for index, assignment in enumerate(assignments):
            path, separator, text = assignment.partition("=")
            if path.startswith("-"):
                value = text if separator else "".join(assignments[index + 1 : index + 2])
                known = self.as_assignment(path, value)
                raise ValueError(f"{path} is not an option; write {known or 'field=value, without dashes'}")
            if not separator or not path:
                raise ValueError(
                    f"{assignment!r} is not an assignment; write field=value, like group_size=12"
                )
            name, *rest = path.strip().split(".")
            place, hints = _Place(recipe, ""), field_types(type(recipe))
            if name not in hints:
                raise self._unknown_field(type(recipe), place, [name, *rest])
            old, hint = changed.get(name, getattr(recipe, name)), hints[name]
            if rest:
                changed[name] = self._assign(old, hint, rest, text.strip(), place.at(name))
            else:
                changed[name] = self._parse(text.strip(), hint, old, place.at(name))
        return dataclasses.replace(recipe, **changed)  # type: ignore[type-var]

    def as_assignment(self, option: str, value: str) -> str | None:
        """`group_size=12` for `--group-size` and `12`; None where no field of the root's defaults has that name."""
        name = option.lstrip("-").replace("-", "_")
        paths = [".".join(place.path) for place, _ in _walk(self.root, _Place(self.root, ""))]
        found = [path for path in paths if path == name or path.endswith(f".{name}")]
        return f"{min(found, key=len)}={value}" if found and name else None

    def show(self, recipe: Root) -> list[tuple[str, str]]:
        """Every value as (dotted path, JSON text) and every part as (dotted path, its name), in the fields' order."""
        return list(self._rows(recipe, _Place(recipe, "")))

    def _rows(self, value: Any, place: _Place) -> Iterator[tuple[str, str]]:
        below = list(_walk(value, place))[1:]
        if is_part(value) and place.path:
            yield str(place), self._name(type(value))
        if is_part(value) or any(is_part(item) for _, item in below):
            for inner, item in below:
                if len(inner.path) == len(place.path) + 1:
                    yield from self._rows(item, inner)
        else:
            yield str(place), json.dumps(self.to_dict(value))

    # ------------------------------------------------------------------------------------------ reading

    def _read(self, value: Any, hint: Any, place: _Place) -> Any:
        """A JSON value as a field's value. The caller checks its type, where a message can show all of it."""
        if isinstance(value, list):
            items = [
                self._read(item, item_type(hint, value, index), place.at(index))
                for index, item in enumerate(value)
            ]
            return sequence_type(hint)(items)
        if isinstance(value, Mapping) and "is" not in value and takes_mapping(hint):
            return {
                key: self._read(item, item_type(hint, value, key), place.at(key))
                for key, item in value.items()
            }
        if isinstance(value, Mapping):
            kind = value.get("is")
            if not isinstance(kind, str):
                example = next(iter([*self._choices(hint), *self.parts]), "my_module:MyPart")
                raise ValueError(
                    f'{_before(place)}{self._text(value)} has no "is" that names its part, such as "{example}"'
                )
            return self._build(self._class(kind, place), value, place)
        made = self._of_function(value, hint)
        if made is not None:
            return made
        _check_number(value, place)
        return value

    def _of_function(self, value: Any, hint: Any) -> Any:
        """The part that stands for a function, where a field takes one; None for any other value."""
        if not isinstance(value, str) or not CODE.fullmatch(value) or fits(value, hint):
            return None
        makers = [make for kind, make in self.functions.items() if kind in alternatives(hint)]
        # A class is a part of its own, and what is not there is said where the part looks for it.
        return makers[0](value) if makers and not isinstance(_found(value), type) else None

    def _build(self, part: type, values: Mapping[str, Any], place: _Place) -> Any:
        if place.root is None:
            place = _Place(part, part.__name__)  # the outermost part is the recipe that suggestions look into
        hints = field_types(part)
        for name in values:
            if name not in hints and name != "is":
                raise self._unknown_field(part, place, [name])
        made = {}
        for name, hint in hints.items():
            if name in values:
                made[name] = self._read(values[name], hint, place.at(name))
                if not fits(made[name], hint):
                    raise self._wrong(made[name], hint, _default(part, name), place.at(name))
            elif _default(part, name) is MISSING:
                raise ValueError(f"{_before(place)}{part.__name__} needs a value for {name!r}")
        return part(**made)

    def _class(self, name: str, place: _Place) -> type:
        """The dataclass that goes by a short name or a `module:Class`."""
        if name in self.parts:
            return self.parts[name]
        if name in self.replaced:
            raise ValueError(f"{_before(place)}{name} {_was_replaced(self.replaced[name])}")
        if not CODE.fullmatch(name):
            raise ValueError(f"{_before(place)}unknown recipe part {name!r}; {nearest(name, self.parts)}")
        module, _, qualified = name.partition(":")
        outer, *inner = qualified.split(".")  # a class inside a class, as its qualified name says
        try:
            found = resolve(f"{module}:{outer}")
        except ValueError as error:
            raise ValueError(f"{_before(place)}{error}") from None
        for attribute in inner:
            found = getattr(found, attribute, None)
        if isinstance(found, type) and dataclasses.is_dataclass(found):
            if found.__dataclass_params__.frozen:  # type: ignore[attr-defined]
                return found
            what = "a dataclass that can be changed"
        else:
            what = "a class without fields" if isinstance(found, type) else f"a {type(found).__name__}"
        raise ValueError(f"{_before(place)}{name!r} is {what}; a part must be a frozen dataclass")

    # ---------------------------------------------------------------------------------------- overrides

    def _assign(self, owner: Any, hint: Any, names: Sequence[str], text: str, place: _Place) -> Any:
        """A copy of `owner` with the value at `names` below it set."""
        name, *rest = names
        here = place.at(name)
        if is_part(owner):
            if name not in field_types(type(owner)):
                raise self._unknown_field(type(owner), place, names)
            old, wanted = getattr(owner, name), field_types(type(owner))[name]
        elif isinstance(owner, tuple | list):
            if not (name.isascii() and name.isdecimal() and int(name) < len(owner)):
                known = f"an index from 0 to {len(owner) - 1}" if owner else f"the whole list, {place}=[...]"
                raise ValueError(f"{here} is not there, {place} has {len(owner)} items; give {known}")
            old, wanted = owner[int(name)], item_type(hint, owner, int(name))
        elif isinstance(owner, Mapping):
            if rest and name not in owner:
                raise ValueError(f"{place} has no {name!r}; {nearest(name, owner)}")
            old, wanted = owner.get(name), item_type(hint, owner, name)
        elif owner is None and takes_parts(hint):
            example = next(iter(self._choices(hint)), "my_module:MyPart")
            raise ValueError(f"{here}: {place} is null; choose a part first, such as {place}={example}")
        else:
            full = ".".join((*place.path, *names))
            raise ValueError(f"{full!r} goes into a plain value; {name!r} is not a field of it")
        new = self._assign(old, wanted, rest, text, here) if rest else self._parse(text, wanted, old, here)
        if isinstance(owner, Mapping):
            return {**owner, name: new}
        if isinstance(owner, tuple | list):
            return type(owner)(new if index == int(name) else item for index, item in enumerate(owner))
        return dataclasses.replace(owner, **{name: new})

    def _parse(self, text: str, hint: Any, old: Any, place: _Place) -> Any:
        """The value that an override spells: a part's name, else JSON, else the text itself."""
        names_part = text in self.parts or text in self.replaced or CODE.fullmatch(text)
        one = item_type(hint, (), 0)
        if CODE.fullmatch(text) and not takes_parts(hint) and takes_parts(one) and not fits(text, hint):
            return sequence_type(hint)([self._parse(text, one, None, place)])  # a list of one
        made = self._of_function(text, hint)
        if made is not None:
            return made
        if text in self._choices(hint) or (names_part and takes_parts(hint) and not fits(text, hint)):
            part = self._class(text, place)
            if not accepts(hint, part):
                if protocol_of(hint) is None:
                    raise self._no_choice(text, hint, place)
                raise self._wrong_part(part, hint, place)
            return self._read({"is": text}, hint, place)
        if text in self.replaced and not fits(text, hint):
            raise ValueError(f"{place}: {text} {_was_replaced(self.replaced[text])}")
        try:
            value = parse_json(text)
        except json.JSONDecodeError:
            value = text
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: {error}") from None
        if type(value) in (int, float) and not fits(value, hint) and fits(text, hint):
            value = text  # a name may be a number
        value = self._read(value, hint, place)
        if not fits(value, hint):
            raise self._wrong(value, hint, old, place, text)
        as_float = type(value) is int and float in alternatives(hint) and int not in alternatives(hint)
        return float(value) if as_float else value

    def _choices(self, hint: Any) -> dict[str, type]:
        """The known parts that can be the value of a field."""
        return {name: part for name, part in self.parts.items() if accepts(hint, part)}

    # --------------------------------------------------------------------------------------- what is wrong

    def _wrong(
        self, value: Any, hint: Any, example: Any, place: _Place, text: str | None = None
    ) -> ValueError:
        """A value of another type: the part of a list that does not fit, or the whole value; and what would fit."""
        if isinstance(value, tuple | list | Mapping):
            for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
                wanted = item_type(hint, value, key)
                if is_part(item) and not fits(item, wanted) and protocol_of(wanted):
                    return self._wrong(item, wanted, None, place.at(key))
        of_parts = all(one is NoneType or takes_parts(one) for one in alternatives(hint))
        if is_part(value) and protocol_of(hint):
            return self._wrong_part(type(value), hint, place)
        if text is not None and of_parts:
            return self._no_choice(text, hint, place)
        shown = shortened(repr(text)) if text is not None else self._text(value)
        if of_parts and protocol_of(hint):
            return ValueError(f"{place} is {shown}; {choices_of(protocol_of(hint), self._choices(hint))}")
        such_as = "" if example is None or example is MISSING else self._text(example)
        return ValueError(f"{place} is {shown}; {must_be(hint, such_as)}")

    def _wrong_part(self, part: type, hint: Any, place: _Place) -> ValueError:
        """A part that lacks members of a field's protocol: which ones, and the parts that have them."""
        protocol = protocol_of(hint)
        article = "an" if part.__name__[0] in "AEIOU" else "a"
        return ValueError(
            f"{place} is {article} {part.__name__}, which has {listed(lacks(part, protocol), 'and')}; "
            f"{choices_of(protocol, self._choices(hint))}"
        )

    def _no_choice(self, text: str, hint: Any, place: _Place) -> ValueError:
        choices = self._choices(hint)
        known = nearest(text, choices) if choices else "give your own class, my_module:MyPart"
        return ValueError(f"{place} is a part; {shortened(repr(text))} is not one of its kind, {known}")

    def _unknown_field(self, part: type, place: _Place, names: Sequence[str]) -> ValueError:
        """Names what replaced the field, the field of that name elsewhere in the recipe, or the nearest one."""
        name, last = names[0], names[-1]
        if (part.__name__, name) in self.replaced:
            return ValueError(f"{part.__name__}.{name} {_was_replaced(self.replaced[part.__name__, name])}")
        own = field_types(part)
        everywhere = {inner.path for inner, _ in _walk(place.root, dataclasses.replace(place, path=()))}
        known = {path for path in everywhere if path and not path[-1].isdecimal()}  # no items of lists
        known |= {(*place.path, field_name) for field_name in own}

        def closeness(path: tuple[str, ...]) -> tuple[float, bool, float]:
            typed = ".".join((*place.path, *names))
            return _alike(last, path[-1]), path[:-1] == place.path, _alike(typed, ".".join(path))

        best = max(sorted(known), key=closeness, default=("",))
        here = best[:-1] == place.path
        if _alike(last, best[-1]) >= 0.6:
            where = "" if here or len(best) > 1 else " at the top"
            remedy = f"did you mean {best[-1] if here else '.'.join(best)!r}{where}?"
        else:
            remedy = nearest(name, own) if own else "it has no fields"
        return ValueError(f"{part.__name__} has no field {shortened(repr(name))}; {remedy}")

    def _name(self, part: type) -> str:
        """A class as `is` names it."""
        short = (name for name, known in self.parts.items() if known is part)
        return next(short, f"{part.__module__}:{part.__qualname__}")

    def _text(self, value: Any) -> str:
        """A value as a run file spells it, cut where it is very long."""
        return shortened(json.dumps(self.to_dict(value), default=repr))


def _walk(value: Any, place: _Place) -> Iterator[tuple[_Place, Any]]:
    """A value and everything below it. Of a class: its defaults, MISSING where a field has none."""
    yield place, value
    below: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, type) and dataclasses.is_dataclass(value):
        below = [(name, _default(value, name)) for name in field_types(value)]
    elif is_part(value):
        below = [(name, getattr(value, name)) for name in field_types(type(value))]
    elif isinstance(value, tuple | list):
        below = enumerate(value)
    elif isinstance(value, Mapping):
        below = value.items()
    for key, item in below:
        yield from _walk(item, place.at(key))


def _default(part: type, name: str) -> Any:
    """A field's default, MISSING where it has none."""
    found = next(one for one in dataclasses.fields(part) if one.name == name)
    return found.default if found.default_factory is MISSING else found.default_factory()


def _check_number(value: Any, place: _Place) -> None:
    """Refuses what no computation in fp32 could use: its first product would be infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} is {json.dumps(value)}; it must be a finite number")
    if isinstance(value, float) and abs(value) > _LARGEST:
        raise ValueError(f"{place} is {value:g}; it must be between -{_LARGEST:g} and {_LARGEST:g}")


def _found(code: str) -> Any:
    """The object at `module:name`, None where there is none."""
    try:
        return resolve(code)
    except ValueError:
        return None


def _was_replaced(replacement: str) -> str:
    name, _, how = replacement.partition(":")
    return f"was replaced by {name} in the second edition" + (f":{how}" if how else "")


def _before(place: _Place) -> str:
    """How a message about a whole part begins: with its place, unless that is all of the recipe."""
    return f"{place}: " if place.path else ""


def _alike(one: str, other: str) -> float:
    """How alike two names are, 0 to 1."""
    return difflib.SequenceMatcher(None, one, other).ratio()
