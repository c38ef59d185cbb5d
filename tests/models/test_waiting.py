"""Rollout and update of the families ask the device for nothing until their end, save two networks themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowgrpo_fast.recipe import Clip, FrozenWindow, PolicyGradient, SharedStart, TransitionKL
from tests.models.families import ONE_EACH, QWEN_IMAGE, WAN, loaded
from tests.training.test_no_waiting import check, waited

SCHEDULE = ("at_step", "expert")  # read the noise levels, which are on the host


@pytest.mark.parametrize("family", [*ONE_EACH, replace(WAN, variant={"experts": True})], ids=str)
def test_families(family, tiny_recipe) -> None:
    recipe = tiny_recipe(
        family,
        guidance_scale=2.0,
        topology=SharedStart(at=FrozenWindow(size=2)),
        precision="bf16",
        objective=PolicyGradient(trust=Clip(range=0.05), regularizers=(TransitionKL(beta=0.1),)),
    )
    # Z-Image takes captions of their own lengths, HunyuanVideo 1.5 sorts its tokens by what is masked.
    check(recipe, spared=(*SCHEDULE, "", "predict") if family.syncs else SCHEDULE)


@pytest.mark.parametrize("family", [QWEN_IMAGE, WAN], ids=str)
def test_decoding(family, tiny_recipe) -> None:
    """The autoencoder's mean and std come from its configuration, and follow the latents without a wait."""
    model = loaded(tiny_recipe(family))
    _, log = waited(lambda: model.decode(torch.zeros(2, *model.latent_shape)))
    assert log == []
