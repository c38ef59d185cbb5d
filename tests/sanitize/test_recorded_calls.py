"""Calls written down and repeated: the same bits, the same alignment, and nothing that is not the call's."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch
from recorded_calls import Array, Call, Recorder, repeat, same

from flowgrpo_fast import _C
from flowgrpo_fast.ops import flow_step


@pytest.fixture
def call(monkeypatch) -> Call:
    recorder = Recorder(_C, most=1)
    monkeypatch.setattr(sys.modules["flowgrpo_fast.ops.flow_step"], "_C", recorder)
    generator = torch.Generator().manual_seed(0)
    storage = torch.randn(2 * 20000 + 1, generator=generator, dtype=torch.bfloat16)
    latents, velocity = storage[1:].view(2, 20000), torch.randn(2, 20000, generator=generator)
    seed, coeffs = torch.tensor([1, 2]), torch.rand(3, 8, generator=generator)
    for _ in range(2):  # a call of a kind that is known
        flow_step(latents, velocity, coeffs, 1, seed)
    with pytest.raises(ValueError, match="step_index"):
        flow_step(latents, velocity, coeffs, 3, seed)
    (only,) = recorder.calls
    return only


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_call_gives_its_bits_again(call, num_threads):
    assert call.arrays[0].shift == 2
    read = pickle.loads(pickle.dumps(call))
    contents = repeat(_C, read, num_threads)
    assert contents == [array.after for array in call.arrays]
    changed = [array.shape for array in call.arrays if array.before != array.after]
    assert sorted(changed) == [(2,), (2, 20000)]


def test_a_refused_call_is_none(call):
    call.arrays[0].dtype = (0, 16, 1)
    assert repeat(_C, call, 1) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_any_nan_is_as_good_as_another(dtype):
    values = torch.tensor([1.0, float("nan"), float("inf"), -0.0], dtype=dtype)
    code = 4 if dtype is torch.bfloat16 else 2

    def bits(tensor):
        return bytes(tensor.view(torch.uint8).tolist())

    array = Array((4,), (code, 8 * dtype.itemsize, 1), 0, b"", bits(values))
    assert same(array, bits(values))
    assert same(array, bits(values * torch.tensor([1, -1, 1, 1], dtype=dtype)))
    for place, other in ((0, 2.0), (1, 1.0), (2, float("nan")), (3, 0.0)):
        changed = values.clone()
        changed[place] = other
        assert not same(array, bits(changed))
