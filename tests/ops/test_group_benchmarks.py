"""The contenders of the group benchmarks compute the same."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contenders_agree(monkeypatch, dtype):
    """With torch.compile left out: its backend is not what is tested."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    family = importlib.import_module("benchmarks.cases.group")
    made = list(family.cases(family.Size("toy", 6, (2, 4, 4)), dtype, torch.device("cpu")))
    assert len(made) == (7 if dtype is torch.float32 else 1)
    for case in made:
        assert case.bytes > 0
        ours = case.contenders["ours"]()
        for name in ("eager", "compiled"):
            torch.testing.assert_close(case.contenders[name](), ours, rtol=1e-5, atol=1e-5)
