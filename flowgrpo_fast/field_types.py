"""Types of a part's fields: whether a value has one, what a class lacks of a protocol, how a message names a type.

A field may be plain (bool, int, float, str, None), a Literal, a union, a tuple or list, a dict with string keys, a
dataclass, an abstract class, or a Protocol. A protocol is checked by its members alone, so a class need not name it.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_PLAIN = (bool, int, float, str, NoneType)
_SEQUENCES = (tuple, list, Sequence)
_MAPPINGS = (dict, Mapping)


def is_part(value: Any) -> bool:
    """Whether a value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def field_types(part: type) -> dict[str, Any]:
    """Name -> type of the fields that a dataclass is made from.

    Raises:
        ValueError: an annotation that names something its module does not have.
    """
    try:
        hints = get_type_hints(part)
    except NameError as error:
        raise ValueError(
            f"{part.__name__} cannot be read: {error}; import what its fields' types name outside of TYPE_CHECKING"
        ) from None
    return {field.name: hints[field.name] for field in dataclasses.fields(part) if field.init}


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types a field may have: the members of a union, or the one."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def item_type(hint: Any, container: Any, key: Any) -> Any:
    """The type of `container[key]` where `container` is the value of a field; Any where the field leaves it open."""
    for one in alternatives(hint):
        kind, items = _kind(one), get_args(one)
        if kind in _SEQUENCES and isinstance(container, tuple | list) and items:
            if kind is not tuple or items[-1] is Ellipsis:
                return items[0]
            return items[key] if key < len(items) else Any
        if kind in _MAPPINGS and isinstance(container, Mapping) and items:
            return items[1]
    return Any


def sequence_type(hint: Any) -> type:
    """What a JSON list becomes in a field: a list where its type says so, else a tuple."""
    return list if list in map(_kind, alternatives(hint)) else tuple


def takes_mapping(hint: Any) -> bool:
    """Whether a field holds a plain mapping, or anything."""
    return any(_kind(one) in (*_MAPPINGS, Any, object) for one in alternatives(hint))


def takes_parts(hint: Any) -> bool:
    """Whether a part can be the value of a field: one alternative is a protocol, a dataclass or an abstract class."""
    return any(is_protocol(one) or _is_class(_kind(one)) for one in alternatives(hint))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has a field's type. An int may stand for a float, but no bool for an int."""
    kind, items = _kind(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, one) for one in items)
    if kind in (Any, object):
        return True
    if kind is Literal:
        return any(type(value) is type(choice) and value == choice for choice in items)
    if kind in _PLAIN:
        # An int beyond the largest float would overflow in the first product.
        as_float = kind is float and type(value) is int and abs(value) <= sys.float_info.max
        return type(value) is kind or as_float
    if kind in _SEQUENCES:
        return isinstance(value, list if kind is list else tuple) and _items_fit(value, hint)
    if kind in _MAPPINGS:
        pairs = value.items() if isinstance(value, Mapping) else ()
        of_type = all(fits(key, items[0]) and fits(item, items[1]) for key, item in pairs) if items else True
        return isinstance(value, Mapping) and of_type
    return is_part(value) and accepts(hint, type(value))


def _items_fit(values: Sequence[Any], hint: Any) -> bool:
    fixed = _kind(hint) is tuple and get_args(hint)[-1:] not in ((), (Ellipsis,))
    if fixed and len(values) != len(get_args(hint)):
        return False
    return all(fits(value, item_type(hint, values, index)) for index, value in enumerate(values))


def accepts(hint: Any, part: type) -> bool:
    """Whether instances of a dataclass can be the value of a field."""
    for one in alternatives(hint):
        if is_protocol(one):
            if not lacks(part, one):
                return True
        elif _is_class(_kind(one)) and issubclass(part, _kind(one)):
            return True
    return False


def is_protocol(hint: Any) -> bool:
    """Whether a field's type is a Protocol. `typing.is_protocol` came with Python 3.13."""
    kind = _kind(hint)
    return isinstance(kind, type) and getattr(kind, "_is_protocol", False)


def lacks(part: type, protocol: Any) -> list[str]:
    """What a dataclass is missing of a protocol, e.g. ["no method 'measure'"]; empty where it has every member.

    It is asked of the class, so no property runs. Names are compared, signatures are not.
    """
    own = {field.name for field in dataclasses.fields(part)}
    missing = {}
    for base in reversed(_kind(protocol).__mro__):
        if not is_protocol(base):
            continue
        for name, member in {**inspect.get_annotations(base), **vars(base)}.items():
            if name in own or (name.startswith("_") and name != "__call__"):
                continue  # a field may stand for a method too; other underscores are typing's own
            if isinstance(member, classmethod | staticmethod) or inspect.isfunction(member):
                if not callable(getattr(part, name, None)):
                    missing[name] = f"no method {name!r}"
            elif not hasattr(part, name):
                missing[name] = f"no attribute {name!r}"
    return list(missing.values())


def protocol_of(hint: Any) -> Any:
    """The protocol among a field's types, None where there is none."""
    return next(filter(is_protocol, alternatives(hint)), None)


def choices_of(protocol: Any, known: Collection[str]) -> str:
    """`an objective is one of PolicyGradient, NFT or your own class`: the known parts that have its members."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", _kind(protocol).__name__).lower()
    article = "an" if words[0] in "aeiou" else "a"
    return f"{article} {words} is one of {listed([*known, 'your own class, my_module:MyPart'], 'or')}"


def described(hint: Any) -> str:
    """A field's type as a message names it."""
    kind, items = _kind(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(map(described, items))
    if kind is Literal:
        return listed([repr(choice) for choice in items], "or")
    if kind in _SEQUENCES and items:
        shown = ["..." if item is Ellipsis else described(item) for item in items]
        return f"[{', '.join(shown if kind is tuple else [*shown, '...'])}]"
    if kind in _MAPPINGS and items:
        return f"{{{described(items[0])}: {described(items[1])}}}"
    return "null" if kind is NoneType else str(getattr(kind, "__name__", kind))


def must_be(hint: Any, example: str) -> str:
    """The remedy for a value of another type: the choices, or the type with an example where there is one."""
    if all(_kind(one) is Literal for one in alternatives(hint)):
        return f"it must be {described(hint)}"
    return f"it must be a value of type {described(hint)}{example and f', such as {example}'}"


def listed(words: Sequence[str], last: str) -> str:
    """`a, b or c`."""
    return f" {last} ".join([part for part in (", ".join(words[:-1]), words[-1]) if part])


def _kind(hint: Any) -> Any:
    """`tuple` of `tuple[int, ...]`, `Trust` of `Trust[float]`, else the type itself."""
    return get_origin(hint) or hint


def _is_class(kind: Any) -> bool:
    builtin = kind in (*_PLAIN, *_SEQUENCES, *_MAPPINGS, object, Any)
    return isinstance(kind, type) and not builtin
