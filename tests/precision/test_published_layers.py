"""What Sol-RL quantises, counted on the published sizes of the real classes, without memory for their weights."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

from flowgrpo_fast.models.flux import Flux
from flowgrpo_fast.models.sd3 import SD3
from flowgrpo_fast.precision.adapters import linear_layers

SD3_5_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "attention_head_dim": 64,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}


@pytest.mark.parametrize(
    ("family", "make", "ours", "published", "weights"),
    [
        (SD3, lambda: SD3Transformer2DModel(**SD3_5_LARGE), 453, 76, 1.80e9),
        (Flux, lambda: FluxTransformer2DModel(guidance_embeds=True), 418, 495, 11.8e9),
    ],
    ids=["sd3_5_large", "flux"],
)
def test_the_two_sets(family, make, ours: int, published: int, weights: float) -> None:
    with torch.device("meta"):
        layers = list(linear_layers(make()))
    plain = [layer for layer in layers if not any(re.search(p, layer.name) for p in family.sensitive)]
    chosen = [layer for layer in layers if any(re.search(p, layer.name) for p in family.published)]
    assert (len(plain), len(chosen)) == (ours, published)
    assert sum(layer.linear.weight.numel() for layer in chosen) == pytest.approx(weights, rel=0.01)
