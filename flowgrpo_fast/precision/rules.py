"""What must hold between precisions for the first ratio to be 1 and for small updates to count."""

from __future__ import annotations

import torch
from torch import nn

from flowgrpo_fast.precision.formats import FORMATS
from flowgrpo_fast.recipe import (
    FractionOfSteps,
    KeepAll,
    LowPrecision,
    NoScouts,
    Recipe,
    Scouts,
)


def check_recipe(recipe: Recipe) -> None:
    """Refuses recipes whose log-probs would come from another computation than their replay.

    Steps with a log-prob run the training model, so a low-precision copy is never asked for one. With `shared_base`
    rollout and replay run one model; where the scale of an activation comes from its whole batch, the replay must then
    see the rollout's batches.

    Raises:
        ValueError: names the fields and the remedy.
    """
    explore = recipe.explore
    part = recipe.rollout_precision
    if (
        isinstance(explore, Scouts)
        and isinstance(explore.precision, LowPrecision)
        and explore.precision.mode == "shared_base"
        and explore.precision != part
    ):
        raise ValueError(
            "Scouts.precision.mode is 'shared_base': that is the training model itself. Give rollout_precision the "
            "same, or choose 'merged', 'branch' or 'bare_layers' for scouts"
        )
    if (
        isinstance(part, LowPrecision)
        and part.mode == "shared_base"
        and FORMATS[part.format].scale_of_batch
        and not _replays_the_batches_of_the_rollout(recipe)
    ):
        raise ValueError(
            f"rollout_precision: {part.format} scales activations by their whole batch, and this recipe replays other "
            "batches than it rolls out: the first ratio would not be 1. Use fp8_rows or fp8_blocks, or another mode"
        )


def _replays_the_batches_of_the_rollout(recipe: Recipe) -> bool:
    return (
        recipe.replay_rows in (0, recipe.rollout_rows)
        and not isinstance(recipe.window, FractionOfSteps)  # each sample replays steps of its own
        and isinstance(recipe.prune, KeepAll)
        and isinstance(recipe.explore, NoScouts)
    )


def check_training_precision(recipe: Recipe, device: torch.device) -> None:
    """Refuses bf16 on a GPU without it, where it would be emulated.

    Raises:
        ValueError: names the GPU and the remedy.
    """
    if recipe.precision != "bf16" or device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"Recipe.precision is 'bf16', which {torch.cuda.get_device_name(device)} lacks; set precision=fp32, or use "
            "an Ampere GPU or a later one"
        )


def check_masters(module: nn.Module) -> None:
    """Refuses trained parameters below fp32: an update of 1e-5 would round away. Matrix products may still be bf16.

    Raises:
        ValueError: names the first such parameter.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is trained in {str(parameter.dtype).removeprefix('torch.')}; trained parameters must be "
                "float32 (precision='bf16' runs their matrix products in bf16 all the same)"
            )
