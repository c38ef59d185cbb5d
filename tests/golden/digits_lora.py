"""The digits with adapters beside frozen weights: what a golden curve of LoRA training trains. The product has none."""

from __future__ import annotations

import torch

from flowgrpo_fast.models import digits
from flowgrpo_fast.models.adapters import add_lora
from flowgrpo_fast.recipe import Recipe


def load(device: torch.device, recipe: Recipe) -> digits.DigitsModel:
    model = digits.load(device)
    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    add_lora(model.transformer, recipe.network.train, targets, recipe.seed, "transformer")
    return model


def prompts() -> list[str]:
    return digits.prompts()
