"""Names that users write: the object behind `package.module:name`, and the known name nearest to an unknown one."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the closest of `known`, or the whole list where nothing is close."""
    names = sorted(known)
    return _close(name, names, 0.5) or f"known: {', '.join(names)}"


def _close(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The question alone, empty where nothing is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else ""


def resolve(path: str) -> Any:
    """The object at `package.module:name`.

    Raises:
        ValueError: not such a path, no such module, or no such name in it; names what is near.
    """
    module_name, separator, name = path.partition(":")
    if not separator:
        raise ValueError(f"{path!r} is not package.module:name")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something it needs is not
        near = _close(error.name.rpartition(".")[2], _beside(error.name))
        raise ValueError(f"{path!r}: there is no module {error.name!r}{near and f'; {near}'}") from None
    try:
        return getattr(module, name)
    except AttributeError:
        near = _close(name, vars(module))
        raise ValueError(f"{path!r}: module {module_name} has no {name!r}{near and f'; {near}'}") from None


def _beside(module: str) -> list[str]:
    """Names of the modules that could stand where this one does not: those of its package, or of the path."""
    package = module.rpartition(".")[0]
    folders = importlib.import_module(package).__path__ if package else None
    return [found.name for found in pkgutil.iter_modules(folders)]
