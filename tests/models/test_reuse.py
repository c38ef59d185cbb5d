"""The unconditional half that the rollout leaves to the update, on the families."""

from __future__ import annotations

import pytest
import torch

from flowgrpo_fast.recipe import Clip, LowPrecision, PolicyGradient, TransitionKL
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import train_step
from tests.conftest import with_changes
from tests.models.families import FLUX, QWEN_IMAGE, SD3

CPU = torch.device("cpu")
KL = PolicyGradient(trust=Clip(range=0.05), regularizers=(TransitionKL(beta=0.1),))


@pytest.mark.parametrize("family", [SD3, FLUX], ids=str)
def test_on_real_networks(family, tiny_recipe) -> None:
    recipe = tiny_recipe(family, guidance_scale=3.0, precision="bf16", objective=KL)
    one, other = (
        train_step(build_engine(with_changes(recipe, reuse_unconditional=r), CPU)) for r in (True, False)
    )
    assert one.metrics["ratio_self_test"] == one.metrics["first_ratio_error"] == 0.0
    assert one.metrics["grad_norm"] == other.metrics["grad_norm"]
    assert one.metrics["network_evaluations"] < other.metrics["network_evaluations"]


def test_a_family_with_guidance_of_its_own_computes_both(tiny_recipe) -> None:
    recipe = tiny_recipe(QWEN_IMAGE, guidance_scale=3.0)
    one, other = (
        train_step(build_engine(with_changes(recipe, reuse_unconditional=r), CPU)) for r in (True, False)
    )
    assert one.metrics == other.metrics


@pytest.mark.filterwarnings("ignore:fp8_rows is emulated")
def test_it_is_the_training_model_that_leaves_it(tiny_recipe) -> None:
    """Not the copy in low precision, which runs none of the kept steps."""
    part = LowPrecision(mode="merged", emulate=True)
    recipe = tiny_recipe(SD3, guidance_scale=3.0, rollout_precision=part)
    one, other = (
        train_step(build_engine(with_changes(recipe, reuse_unconditional=r), CPU)) for r in (True, False)
    )
    assert one.metrics["grad_norm"] == other.metrics["grad_norm"]
    assert one.metrics["first_ratio_error"] == 0.0
