"""This package's recipes as text: the names that run files and overrides may use, see `run_files`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowgrpo_fast.json_files import check_name, named_code, read_json
from flowgrpo_fast.recipe import PARTS, Recipe, Reward, RewardTerm
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

# What a run file of the first edition may still say, and what says it now.
REPLACED: dict[str | tuple[str, str], str] = {
    ("Recipe", "window"): "topology.at: topology=SharedStart or Independent, whose `at` is the window",
    (
        "Recipe",
        "share_start_noise",
    ): "topology: SharedStart shares a group's start noise, Independent does not",
    ("Recipe", "share_prefix"): "topology.share_prefix: of SharedStart",
    ("Recipe", "prune"): "topology: Cuts(inner=..., steps=..., sizes=...)",
    ("Recipe", "explore"): "experience: experience=Scouts",
    ("Recipe", "loss"): "objective: PolicyGradient(trust=Clip(range=...)) for ClippedRatio, or NFT",
    ("Recipe", "precision"): "machine.precision",
    ("Recipe", "rollout_precision"): "machine.rollout_precision",
    ("Recipe", "rows_per_forward"): "machine.rows_per_forward",
    ("Recipe", "prompts_per_chunk"): "machine.prompts_per_chunk",
    ("Recipe", "graphs"): "machine.graphs",
    ("Recipe", "replay_rows"): "machine.replay_rows",
    ("Recipe", "max_ratio_error"): "machine.max_ratio_error",
    ("Recipe", "reuse_unconditional"): "machine.reuse_unconditional",
    ("Task", "prompts"): "data.path: data=Prompts",
    ("Task", "images"): "data.images: data=Prompts",
    ("NFT", "old_decay_start"): "old.start: NFT's `old` is a Ramp",
    ("NFT", "old_decay_rate"): "old.rate: NFT's `old` is a Ramp",
    ("NFT", "old_decay_max"): "old.most: NFT's `old` is a Ramp",
    "ClippedRatio": "PolicyGradient: its trust is a Clip(range=...), its regularizers hold a TransitionKL(beta=...)",
    "Credit": "a list of credit steps: [Normalise, Bound, DropIdle]",
    "KeepAll": "a topology without Cuts",
    "Prune": "Cuts: a topology around another",
    "NoScouts": "Rollout: an experience",
}

FILES: RunFiles[Recipe] = RunFiles(
    root=Recipe,
    parts=PARTS,
    replaced=REPLACED,
    functions={Reward: lambda function: RewardTerm(function=function)},  # task.rewards=my_rewards:ocr
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
