"""Low precision on the families: every mode trains, and the layers a family names are left alone."""

from __future__ import annotations

import re

import pytest
import torch

from flowgrpo_fast.ops import philox_normal
from flowgrpo_fast.precision.linear import QuantizedLinear
from flowgrpo_fast.recipe import LoRA, LowPrecision
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import train_step
from tests.models.families import FIRST, ONE_EACH

CASES = [
    (family, mode)
    for family in ONE_EACH
    for mode in ("merged", "bare_layers", "branch", "shared_base")
    if family in FIRST or mode in ("merged", "shared_base")
]


@pytest.mark.parametrize(("family", "mode"), CASES, ids=str)
def test_every_mode_on_every_family(family, mode, tiny_recipe) -> None:
    """Two exact steps; steps without a log-prob run other numbers, close by, unless the base is shared."""
    recipe = tiny_recipe(
        family,
        train=LoRA(rank=2, alpha=4.0, targets=("to_q", "to_k")),
        rollout_precision=LowPrecision(format="fp8_rows", mode=mode, emulate=True),
    )
    engine = build_engine(recipe, torch.device("cpu"))
    reports = [train_step(engine) for _ in range(2)]
    assert [report.metrics["first_ratio_error"] for report in reports] == [0.0, 0.0]
    start = philox_normal(torch.arange(2), engine.model.latent_shape)
    inputs = start, torch.tensor([0.9, 0.4]), engine.stage.conditioning.rows(torch.tensor([0, 1]))
    with torch.no_grad():
        outside = engine.stage.sampler.outside.model
        exact, low = (model.velocity(*inputs) for model in (engine.model, outside))
    error = float((exact - low).norm() / exact.norm())
    assert error < 0.1
    assert (error == 0) == (mode == "shared_base")
    modules = outside.transformer.named_modules()
    quantised = [name for name, module in modules if isinstance(module, QuantizedLinear)]
    assert quantised
    assert not any(re.search(part, name) for part in engine.model.sensitive for name in quantised)
