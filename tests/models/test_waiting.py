"""Rollout and update of the families ask the device for nothing until their end, save two networks themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flowgrpo_fast.recipe import ClippedRatio
from tests.models.families import ONE_EACH, WAN
from tests.training.test_no_waiting import check

SCHEDULE = ("at_step", "expert")  # read the noise levels, which are on the host


@pytest.mark.parametrize("family", [*ONE_EACH, replace(WAN, variant={"experts": True})], ids=str)
def test_families(family, tiny_recipe) -> None:
    recipe = tiny_recipe(
        family,
        guidance_scale=2.0,
        share_start_noise=True,
        precision="bf16",
        loss=ClippedRatio(clip_range=0.05, kl_beta=0.1),
    )
    # Z-Image takes captions of their own lengths, HunyuanVideo 1.5 sorts its tokens by what is masked.
    check(recipe, spared=(*SCHEDULE, "", "predict") if family.syncs else SCHEDULE)
