"""This package's recipes as text: the names that run files and overrides may use, see `run_files`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from flowgrpo_fast import recipe as parts
from flowgrpo_fast.json_files import check_name, named_code, read_json
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.run_files import RunFiles

__all__ = [
    "FILES",
    "check_name",
    "from_dict",
    "load_recipe",
    "named_code",
    "override",
    "read_json",
    "save_recipe",
    "show",
    "to_dict",
]

FILES = RunFiles(
    root=Recipe,
    parts={
        name: part
        for name, part in vars(parts).items()
        if dataclasses.is_dataclass(part) and isinstance(part, type)
    },
)
to_dict = FILES.to_dict
from_dict = FILES.from_dict
save_recipe = FILES.save
show = FILES.show


def load_recipe(path: Path) -> Recipe:
    """Reads what `save_recipe` wrote; `path` is the file or a run folder. Raises ValueError as `RunFiles.load`."""
    recipe = FILES.load(path)
    check_name(recipe.name)
    return recipe


def override(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """The recipe with `field=value` assignments applied. Raises ValueError as `RunFiles.override`."""
    changed = FILES.override(recipe, assignments)
    check_name(changed.name)
    return changed
