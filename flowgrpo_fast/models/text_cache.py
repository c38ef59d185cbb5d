"""Prompt embeddings: computed once a prompt, kept on disk by content, the text encoders gone afterwards.

A prompt is always encoded alone, so its embedding does not depend on which prompts came with it.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

Embedding: TypeAlias = dict[str, Tensor]  # name -> one prompt's tensor, without a batch axis, on the CPU
Encoder: TypeAlias = Callable[[str], Embedding]
Progress: TypeAlias = Callable[[int, int], None]  # how many prompts are encoded, and of how many

_SAMPLED_BYTES = 1 << 20  # of each end of a weights file


def embed(
    prompts: Sequence[str],
    load_encoder: Callable[[], Encoder],
    folder: str,
    identity: str,
    progress: Progress | None = None,
) -> list[Embedding]:
    """One embedding per prompt, from `folder` where it is there; the encoder is loaded only if one is missing.

    Args:
        prompts: in any order, repeated or not; each is encoded once.
        load_encoder: makes the encoder; it is dropped, and its memory freed, before this returns.
        folder: where to keep them; empty = nowhere.
        identity: what else the embedding depends on, from `fingerprint`.
        progress: told once the encoder is loaded and after each prompt that had to be encoded.

    Raises:
        ValueError: the folder cannot be written.
    """
    known: dict[str, Embedding] = {}
    for prompt in dict.fromkeys(prompts) if folder else ():
        found = _read(_file(folder, identity, prompt))
        if found is not None:
            known[prompt] = found
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    for prompt, embedding in _encoded(missing, load_encoder, progress):
        known[prompt] = embedding
        if folder:
            _write(_file(folder, identity, prompt), embedding)
    return [known[prompt] for prompt in prompts]


def fill(
    prompts: Sequence[str],
    load_encoder: Callable[[], Encoder],
    folder: str,
    identity: str,
    progress: Progress | None = None,
) -> None:
    """Puts into `folder` what is missing there, and holds none of it. Arguments and errors as of `embed`."""
    missing = [p for p in dict.fromkeys(prompts) if _read(_file(folder, identity, p)) is None]
    for prompt, embedding in _encoded(missing, load_encoder, progress):
        _write(_file(folder, identity, prompt), embedding)


def _encoded(
    prompts: Sequence[str], load_encoder: Callable[[], Encoder], progress: Progress | None
) -> Iterator[tuple[str, Embedding]]:
    """Each prompt with its embedding; the encoder lives as long as the iteration, and is never loaded for nothing."""
    if not prompts:
        return
    encoder = load_encoder()
    if progress is not None:
        progress(0, len(prompts))
    for done, prompt in enumerate(prompts, 1):
        with torch.no_grad():
            embedding = {name: value.cpu() for name, value in encoder(prompt).items()}
        yield prompt, embedding
        if progress is not None:
            progress(done, len(prompts))
    del encoder
    _free()


def fingerprint(folders: Iterable[Path], *settings: object) -> str:
    """What identifies text encoders: their files' names, sizes and both ends, and any settings."""
    digest = hashlib.sha256(json.dumps([version("transformers"), *map(str, settings)]).encode())
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            size = file.stat().st_size
            digest.update(f"{folder.name}/{file.relative_to(folder)} {size}\n".encode())
            with file.open("rb") as handle:
                digest.update(handle.read(_SAMPLED_BYTES))
                handle.seek(max(0, size - _SAMPLED_BYTES))
                digest.update(handle.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def _file(folder: str, identity: str, prompt: str) -> Path:
    name = hashlib.sha256(f"{identity}\n{prompt}".encode()).hexdigest()
    return Path(folder) / name[:2] / f"{name}.safetensors"


def _read(file: Path) -> Embedding | None:
    """What was kept; None where nothing was, or half of it."""
    try:
        return load_file(file)
    except (OSError, SafetensorError):
        return None


def _write(file: Path, embedding: Embedding) -> None:
    """Whole or not at all: several runs may share a folder."""
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in embedding.items()}, partial)
        os.replace(partial, file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        raise ValueError(f"Network.text_cache: cannot write {str(file)!r}: {error}") from None


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
