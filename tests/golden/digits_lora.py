"""The digits with adapters beside frozen weights: what a golden curve of LoRA training trains. The product has none."""

from __future__ import annotations

import torch

from flowgrpo_fast.models import digits
from flowgrpo_fast.models.network import ModelSetup


def load(device: torch.device, setup: ModelSetup) -> digits.DigitsModel:
    model = digits.shipped(device)
    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    setup.network.train.prepare(model.transformer, targets, setup.seed, "transformer")
    return model
