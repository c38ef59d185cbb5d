"""Low precision on tiny pipelines: two steps of training, exact on policy, compiled or checkpointed."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowgrpo_fast.precision import FORMATS, QuantizedLinear
from flowgrpo_fast.recipe import FullFineTuning, LoRA, LowPrecision
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import train_step

pytest.importorskip("flowgrpo_fast.models.pipeline")
families = pytest.importorskip("tests.models.families")
theirs = pytest.importorskip("tests.models.conftest")
tiny_path, tiny_recipe = theirs.tiny_path, theirs.tiny_recipe
pytestmark = pytest.mark.filterwarnings("ignore:.* is emulated on a CPU:RuntimeWarning")
MODES = ("merged", "bare_layers", "branch", "shared_base")


def two_steps(recipe):
    engine = build_engine(recipe, torch.device("cpu"))
    reports = [train_step(engine) for _ in range(2)]
    assert reports[0].metrics["ratio_self_test"] == 0
    assert [report.metrics["delta_log_prob_max"] for report in reports] == [0, 0]
    assert all(report.metrics["grad_norm"] > 0 for report in reports)
    assert any(
        isinstance(module, QuantizedLinear) for module in engine.stage.sampler.outside.model.module.modules()
    )


@pytest.mark.parametrize("family", [families.SD3, families.FLUX, families.WAN], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_two_steps_where_the_multiplication_is_native(family, mode, tiny_recipe, monkeypatch) -> None:
    """In bf16; tests/models/test_low_precision.py has every family, emulated in fp32."""
    monkeypatch.setattr(FORMATS["fp8_rows"], "multiples", (2, 2))  # the tiny Wan is 24 wide
    train = LoRA(rank=2, alpha=4.0, targets=("to_q",) if mode == "bare_layers" else ())
    part = LowPrecision(mode=mode)
    two_steps(tiny_recipe(family, precision="bf16", rollout_precision=part, train=train))


CHANGES = ({"checkpointing": "full"}, {"checkpointing": "selective"}, {"compile": True})


@pytest.mark.parametrize(
    ("mode", "changes"),
    [(m, c) for m in MODES for c in CHANGES if "compile" not in c or m in ("merged", "shared_base")],
    ids=str,
)
def test_checkpointed_and_compiled(mode, changes, tiny_recipe) -> None:
    part = LowPrecision(mode=mode)
    two_steps(tiny_recipe(families.SD3, precision="bf16", rollout_precision=part, **changes))


class Products(TorchDispatchMode):
    """Counts products in FP8."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._scaled_mm.default, torch.ops.aten._scaled_mm_v2.default)
        return function(*args, **(kwargs or {}))


def test_selective_checkpointing_runs_no_product_in_fp8_twice(tiny_recipe) -> None:
    counts = {}
    for mode in ("none", "selective", "full"):
        part = LowPrecision(mode="shared_base")
        recipe = tiny_recipe(families.SD3, precision="bf16", rollout_precision=part, checkpointing=mode)
        engine = build_engine(recipe, torch.device("cpu"))
        inputs = torch.randn(2, *engine.model.latent_shape), torch.tensor(0.5)
        with Products() as counted, torch.autocast("cpu", dtype=torch.bfloat16):
            engine.model.velocity(
                *inputs, engine.stage.conditioning.rows(torch.tensor([0, 1]))
            ).sum().backward()
        counts[mode] = counted.count
    assert counts["none"] == counts["selective"] < counts["full"]


@pytest.mark.parametrize("form", ["fp8_rows", "nvfp4"])
def test_full_fine_tuning(form, tiny_recipe) -> None:
    part = LowPrecision(mode="merged", format=form)
    two_steps(tiny_recipe(families.FLUX, precision="bf16", rollout_precision=part, train=FullFineTuning()))
