"""The contenders of the group benchmarks compute the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def family(monkeypatch):
    """The cases of the group ops, with torch.compile left out: its backend is not what is tested."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    for name in [name for name in sys.modules if name.split(".")[0] == "cases"]:
        monkeypatch.delitem(sys.modules, name)
    import cases
    import cases.group

    yield cases
    for name in [name for name in sys.modules if name.split(".")[0] == "cases"]:
        del sys.modules[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contenders_agree(family, dtype):
    size = family.Size("toy", 6, (2, 4, 4))
    made = list(family.group.cases(size, dtype, torch.device("cpu")))
    assert len(made) == (7 if dtype is torch.float32 else 1)
    for case in made:
        assert case.bytes > 0
        ours = case.contenders["ours"]()
        for name in ("eager", "compiled"):
            torch.testing.assert_close(case.contenders[name](), ours, rtol=1e-5, atol=1e-5)
