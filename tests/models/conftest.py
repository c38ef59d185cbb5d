from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest

from flowgrpo_fast.recipe import Recipe
from tests.models import families, tiny
from tests.models.families import Family, recipe_for


@pytest.fixture(scope="session")
def tiny_path(made_once) -> Callable[[Family], Path]:
    """The folder of a family's tiny pipeline, saved once a run."""

    def path(family: Family) -> Path:
        name = str(family).replace("=", "_")
        return made_once(name, lambda folder: tiny.make(family.name, folder, **family.variant))

    return path


@pytest.fixture
def tiny_recipe(tiny_path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """A recipe for a family's tiny pipeline; keywords replace its fields, or those of its network."""
    monkeypatch.setitem(sys.modules, "families_of_tests", families)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(tiny.PROMPTS))
    return lambda family, **changes: recipe_for(family, tiny_path(family), prompts, **changes)


@pytest.fixture
def pipeline(tiny_path) -> Callable[[Family], Any]:
    """diffusers' own pipeline on the same folder: the witness."""

    def load(family: Family) -> Any:
        absent = {} if family.variant.get("t5", True) else {"text_encoder_3": None, "tokenizer_3": None}
        pipe = diffusers.DiffusionPipeline.from_pretrained(str(tiny_path(family)), **absent)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load
