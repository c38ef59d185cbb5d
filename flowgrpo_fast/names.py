"""Names that users write: the object behind `package.module:name`, and the known name nearest to an unknown one."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the closest of `known`, or the whole list where nothing is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


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
