"""Run files as plain values: strict JSON in, whole files out, the code that they name. Nothing here knows a part."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Wider than Python's own names: a module's file may have any name, and whatever could be imported has to be listed.
CODE = re.compile(r"(?!\.)[^:/\\]*[^\s:/\\]:[^\s:/\\]+")
_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*")
_LONGEST = 200  # characters of a value in a message


def read_json(path: Path) -> Any:
    """The plain values of a run file, or of a run folder's `recipe.json`; imports and builds nothing.

    Raises:
        ValueError: no such file, not JSON, or a key given twice.
    """
    file = path / "recipe.json" if path.is_dir() else path
    try:
        text = read_text(file, "recipe")
    except FileNotFoundError:
        raise ValueError(f"no recipe at {str(file)!r}; give a run folder or its recipe.json") from None
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is not a JSON recipe: {error}") from None


def read_text(path: str | Path, what: str) -> str:
    """A file's text, UTF-8 with or without a byte order mark.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or is not UTF-8; names the first byte that is not.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"cannot read {what}s from {str(path)!r}: {error.strerror}") from None
    marked = data.startswith(codecs.BOM_UTF8)
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        place = error.start + marked * len(codecs.BOM_UTF8)
        raise ValueError(
            f"{str(path)!r} is not UTF-8 text: its byte {place} is 0x{data[place]:02x}; save it as UTF-8"
        ) from None


def parse_json(text: str) -> Any:
    """The values of a JSON text. Raises json.JSONDecodeError where it is none, ValueError for a key given twice."""
    return json.loads(text, object_pairs_hook=_without_duplicates)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file in one piece: a reader, and a crash in the middle, find the old file or the new one.

    Text goes as UTF-8. A file that holds this content already is left alone. A link under that name is replaced,
    never written through.
    """
    data = content.encode() if isinstance(content, str) else content
    if not path.is_symlink() and path.exists() and path.read_bytes() == data:
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    try:
        aside.touch(exist_ok=False)  # of a link that somebody put there meanwhile, an error
        aside.write_bytes(data)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def check_links(folder: Path) -> None:
    """Refuses a run folder in which a link stands where a run writes: what it leads to is somebody's file.

    Raises:
        ValueError: names the link.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink():
            raise ValueError(
                f"{str(path)!r} is a link, and a run writes to what is in its folder; put a file or folder there"
            )


def named_code(recipe: Any) -> list[str]:
    """Every `module:name` that a run file's plain values name outside of this package, each once, in their order.

    Reading or starting such a recipe imports them. Nothing is imported here, and any text of that form is listed,
    whatever its field.
    """
    if isinstance(recipe, Mapping):
        found = [code for item in recipe.items() for code in named_code(list(item))]
    elif isinstance(recipe, list | tuple):
        found = [code for item in recipe for code in named_code(item)]
    else:
        is_code = isinstance(recipe, str) and CODE.fullmatch(recipe)
        own = is_code and recipe.partition(":")[0].split(".")[0] == __name__.split(".")[0]
        found = [recipe] if is_code and not own else []
    return list(dict.fromkeys(found))


def check_name(name: str) -> None:
    """Raises ValueError unless a recipe's name is one folder's name: `runs/<name>-<date>` stays in `runs/`."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"Recipe.name is {shortened(repr(name))}; it names a run's folder, so give letters, digits and "
            "_ - . + alone, the first not a dot"
        )


def shortened(text: str) -> str:
    """A text for a message, cut where it is very long."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Of a key given twice, the parser alone would keep the last."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{shortened(json.dumps(key))} is given twice in one object; keep one")
    return dict(pairs)
