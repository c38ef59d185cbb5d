"""Code that a run file from elsewhere names: listed and confirmed once, before any of it is imported."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowgrpo_fast.json_files import named_code, read_json


def confirm_code(path: Path, yes: bool, ask: Callable[[str], str] = input) -> None:
    """Asks whether the code that a run file names may run, unless there is none or its user has said so before.

    A run that this user started here has been recorded by `remember`, so that going on with it asks nothing.

    Args:
        path: the file, or a run folder.
        yes: the answer, for who cannot be asked.
        ask: puts a question to the user; not called where standard input is no terminal.

    Raises:
        ValueError: the answer was no, or nobody could be asked; nothing has been imported.
    """
    values = read_json(path)
    code = named_code(values)
    if not code or (not yes and _digest(values) in _confirmed()):
        return
    listed = ", ".join(map(repr, code))  # as repr, for a terminal obeys what it is shown
    if not yes:
        if not sys.stdin.isatty():
            raise ValueError(f"{str(path)!r} names code that would run: {listed}; if you trust it, add --yes")
        if ask(f"{str(path)!r} names code that would run: {listed}\nRun it? [y/N] ").strip().lower() not in (
            "y",
            "yes",
        ):
            raise ValueError(f"{str(path)!r} names code that you do not want to run: {listed}")
    remember(values)


def remember(values: Any) -> None:
    """Records that the code of these plain values may run for a user who stands in this folder."""
    if not named_code(values) or _digest(values) in _confirmed():
        return
    with suppress(OSError):  # a home that cannot be written asks again, no more
        _file().parent.mkdir(parents=True, exist_ok=True)
        with _file().open("a", encoding="utf-8") as file:
            file.write(_digest(values) + "\n")


def _digest(values: Any) -> str:
    """Of a recipe, and of the folder its modules are looked for in: another's may hold others of the same names."""
    text = json.dumps([str(Path.cwd()), values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _confirmed() -> set[str]:
    try:
        return set(_file().read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError):
        return set()


def _file() -> Path:
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "flowgrpo-fast" / "confirmed"
