"""Prompt files, and the one way in which this package reads text that users write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flowgrpo_fast.data.draws import draw_prompts
from flowgrpo_fast.json_files import read_text
from flowgrpo_fast.types import PromptSet


class Source(Protocol):
    """Where prompts come from, and which of them a step takes."""

    @property
    def gives_pairs(self) -> bool:
        """Whether its samples come in pairs, a better and a worse."""
        ...

    def load(self, own: Sequence[str]) -> PromptSet:
        """All prompts with what comes with each; `own`: those that the model brings."""
        ...

    def draw(self, step: int, seed: int, num_prompts: int, set_size: int) -> NDArray[np.int64]:
        """Which of the set's prompts a training step takes, `[num_prompts]`: a function of its arguments alone."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Where a run's prompts come from, and which of them a step takes.

    A text file holds one prompt a line. In a `.jsonl` file each line is an object with a string "prompt", perhaps a
    source image's path as "image" (relative to the file), and whatever rewards want to know besides: the metadata.
    """

    path: str = ""  # empty = the model's own prompts
    images: str = ""  # for editing: a text file, the source image of each prompt, one path a line
    gives_pairs = False  # prompts alone

    def load(self, own: Sequence[str] = ()) -> PromptSet:
        """All prompts with what comes with each.

        Args:
            own: what the model brings, taken where `path` is empty.

        Raises:
            ValueError: a file that cannot be read or holds no prompt, a bad line, or images that are not one each.
        """
        if self.path.lower().endswith(".jsonl"):
            found = _read_jsonl(self.path)
        else:
            texts = tuple(read_lines(self.path, "prompt") if self.path else own)
            if not texts:
                raise ValueError(
                    "Prompts.path is empty and the model brings no prompts of its own; "
                    "set it to a text file, one prompt a line, or to a .jsonl file"
                )
            found = PromptSet(texts, tuple({} for _ in texts))
        if not self.images:
            return found
        if found.images:
            raise ValueError(
                f"Prompts.images is {self.images!r}, but {self.path!r} names images itself; use one"
            )
        paths = tuple(Path(self.images).parent / line for line in read_lines(self.images, "image"))
        if len(paths) != len(found):
            raise ValueError(
                f"{self.images!r} names {len(paths)} images for {len(found)} prompts; give one for each"
            )
        return PromptSet(found.prompts, found.metadata, paths)

    def draw(self, step: int, seed: int, num_prompts: int, set_size: int) -> NDArray[np.int64]:
        """Which of the set's prompts a training step takes, `[num_prompts]`: epochs of fresh permutations.

        A function of its arguments alone, so that every rank and every resumed run draws the same.
        """
        return draw_prompts(step=step, seed=seed, num_prompts=num_prompts, set_size=set_size)


def read_lines(path: str, what: str) -> list[str]:
    """A file's lines, stripped, without the empty ones. Only a line feed ends a line.

    (`str.splitlines` also cuts at form feeds, U+2028 and the like, which prompts collected from the web contain.)

    Raises:
        ValueError: as `read_text`, or there is no line.
    """
    return [line for _, line in _numbered_lines(path, what)]


def _numbered_lines(path: str, what: str) -> list[tuple[int, str]]:
    try:
        text = read_text(path, what)
    except FileNotFoundError as error:
        raise ValueError(f"cannot read {what}s from {path!r}: {error.strerror}") from None
    kept = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not kept:
        raise ValueError(f"{path!r} holds no {what}; write one a line")
    return kept


def _read_jsonl(path: str) -> PromptSet:
    prompts, metadata, images = [], [], []
    for number, line in _numbered_lines(path, "prompt"):
        try:
            record = json.loads(line, object_pairs_hook=_without_repeats)
            prompts.append(_string(record, "prompt"))
            if "image" in record:
                images.append(Path(path).parent / _string(record, "image"))
            if images and len(images) != len(prompts):
                raise ValueError('only some lines have an "image"; give one for each prompt, or for none')
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON, {error.msg} at column {error.colno}") from None
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        metadata.append({key: value for key, value in record.items() if key not in ("prompt", "image")})
    return PromptSet(tuple(prompts), tuple(metadata), tuple(images))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. JSON lets a key stand twice, and the last one wins unseen."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'the key "{repeated}" stands there twice')
    return record


def _string(record: Any, key: str) -> str:
    if not isinstance(record, dict):
        raise ValueError('not an object; each line must be one, such as {"prompt": "a cat"}')
    if key not in record:
        raise ValueError(f'no "{key}"; each line must have one, such as {{"prompt": "a cat"}}')
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f'"{key}" is {json.dumps(value)}; it must be a string')
    value.encode()  # half a surrogate pair, which JSON can spell and no tokenizer reads, is a ValueError too
    return value
