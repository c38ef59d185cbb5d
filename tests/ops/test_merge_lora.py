"""Merging a LoRA while quantising: the codes of the merged weight, in place, as often as one likes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrpo_fast.ops import (
    Fp8Rows,
    Nvfp4,
    dequantize_fp8_rows,
    merge_lora_quantize_,
    quantize_fp8_rows,
    quantize_nvfp4,
    reference,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# rows, columns, rank: one row, rows and ranks in tails, and rows longer than a GPU block keeps
SHAPES = [(1, 16, 1), (3, 7, 2), (9, 272, 33), (130, 80, 4), (2, 3008, 5)]


def make_lora(rows, columns, rank, dtype=torch.float32, device="cpu", factors=None):
    generator = torch.Generator().manual_seed(rows + columns + rank)
    weight = torch.randn(rows, columns, generator=generator) * columns**-0.5
    lora_a = torch.randn(rank, columns, generator=generator) * columns**-0.5
    lora_b = torch.randn(rows, rank, generator=generator) * rank**-0.5
    wanted = factors or dtype
    return weight.to(dtype).to(device), lora_a.to(wanted).to(device), lora_b.to(wanted).to(device)


def same(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.view(-1).view(torch.uint8).cpu(), b.view(-1).view(torch.uint8).cpu())


def check(rows, columns, rank, dtype, device="cpu", factors=None, swizzle=True):
    lora = make_lora(rows, columns, rank, dtype, device, factors)
    on_cpu = [t.cpu() for t in lora]
    fp8 = quantize_fp8_rows(torch.ones_like(lora[0]))
    same(merge_lora_quantize_(fp8, *lora, 0.7), reference.merge_lora_quantize(*on_cpu, 0.7))
    if columns % 16:
        return
    fixed = torch.tensor(2.0**-9, device=device)
    for global_scale in (None, fixed):
        out = quantize_nvfp4(torch.ones_like(lora[0]), swizzle=swizzle)
        ours = merge_lora_quantize_(out, *lora, 0.7, global_scale, swizzle)
        given_scale = None if global_scale is None else fixed.cpu()
        same(ours, reference.merge_lora_quantize(*on_cpu, 0.7, True, given_scale, swizzle))


@pytest.mark.witness
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_quantising_the_merged_weight(device, shape, dtype):
    check(*shape, dtype, device, swizzle=shape[0] > 128)


@pytest.mark.witness
def test_many_rows(device):
    """More than a block each four: the CUDA code then looks for the maximum in several turns."""
    check(4100, 16, 3, torch.bfloat16, device)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 600),
    rank=st.integers(1, 40),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    swizzle=st.booleans(),
)
def test_any_shape(rows, columns, rank, dtypes, swizzle):
    check(rows, columns, rank, dtypes[0], "cpu", dtypes[1], swizzle)
    check(rows, 16 * -(-columns // 16), rank, dtypes[0], "cpu", dtypes[1], swizzle)


@pytest.mark.parametrize("rank", [64, 256])
def test_largest_rank_and_a_long_row(rank):
    check(3, 16400, rank, torch.bfloat16)


def test_merged_weight_is_the_matmul():
    """A different order of additions and float64: values within a code's step, almost all codes equal."""
    weight, lora_a, lora_b = make_lora(64, 512, 32, torch.bfloat16)
    ours = merge_lora_quantize_(quantize_fp8_rows(weight), weight, lora_a, lora_b, 0.5)
    exact = weight.double() + 0.5 * (lora_b.double() @ lora_a.double())
    codes, scale = reference.quantize_fp8_rows(exact, dtype=torch.float64)
    torch.testing.assert_close(ours.scale.double(), scale, rtol=1e-6, atol=0)
    assert (ours.codes.view(torch.uint8) != codes.view(torch.uint8)).float().mean() < 1e-3
    error = (dequantize_fp8_rows(*ours, torch.float32) - exact).abs()
    assert (error <= torch.maximum(exact.abs() / 16, scale * 2.0**-10) * 1.001).all()


def test_a_zero_update_is_the_plain_codes():
    weight, lora_a, lora_b = make_lora(40, 96, 4)
    for op in (quantize_fp8_rows, quantize_nvfp4):
        plain = op(weight)
        same(merge_lora_quantize_(op(2 * weight), weight, lora_a, torch.zeros_like(lora_b)), plain)
        same(merge_lora_quantize_(op(2 * weight), weight, lora_a, lora_b, 0.0), plain)


@pytest.mark.parametrize("op", [quantize_fp8_rows, quantize_nvfp4])
def test_a_thousand_merges_leave_the_same_codes_in_the_same_place(op):
    weight, lora_a, lora_b = make_lora(24, 64, 8, torch.bfloat16)
    out = op(weight)
    pointers = [t.data_ptr() for t in out]
    assert merge_lora_quantize_(out, weight, lora_a, lora_b, 0.5) is out
    first = [t.view(torch.uint8).clone() for t in out[:2]]
    for _ in range(1000):
        merge_lora_quantize_(out, weight, lora_a, lora_b, 0.5)
    assert [t.data_ptr() for t in out] == pointers
    same(out[:2], first)


def test_threads_change_nothing():
    weight, lora_a, lora_b = make_lora(203, 272, 6)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3, 7):
            torch.set_num_threads(num_threads)
            for op in (quantize_fp8_rows, quantize_nvfp4):
                results.append(merge_lora_quantize_(op(weight), weight, lora_a, lora_b))
    finally:
        torch.set_num_threads(before)
    for fp8, nvfp4 in zip(results[2::2], results[3::2], strict=True):
        same(fp8, results[0])
        same(nvfp4, results[1])


@pytest.mark.witness
def test_a_row_does_not_see_the_others(device):
    weight, lora_a, lora_b = make_lora(203, 272, 6, device=device)
    whole = merge_lora_quantize_(quantize_fp8_rows(weight), weight, lora_a, lora_b)
    for row in (0, 7, 202):
        part = weight[row : row + 1].clone(), lora_a, lora_b[row : row + 1].clone()
        alone = merge_lora_quantize_(quantize_fp8_rows(part[0]), *part)
        same(alone, [t[row : row + 1].contiguous() for t in whole])


def peak_growth(function):
    """By how many bytes more than before the process was in memory at once, while `function` ran."""

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS:")
    function()
    return status("VmHWM:") - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: memory not measured")
def test_no_merged_weight_in_memory():
    size = 8192
    weight = torch.ones(size, size, dtype=torch.bfloat16)
    lora_a, lora_b = torch.ones(1, size), torch.ones(size, 1)
    out = Fp8Rows(torch.zeros(size, size, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.zeros(size, 1))
    try:
        assert peak_growth(lambda: weight.float()) > 4 * size * size - (8 << 20)
    except OSError:
        pytest.skip("the peak cannot be reset here: memory not measured")
    assert peak_growth(lambda: merge_lora_quantize_(out, weight, lora_a, lora_b)) < 32 << 20
    assert (out.scale == 2 / 448).all()


def test_a_non_finite_factor_spoils_its_row_only():
    weight, lora_a, lora_b = make_lora(9, 48, 3)
    clean = merge_lora_quantize_(quantize_fp8_rows(weight), weight, lora_a, lora_b)
    lora_b[4, 1] = float("inf")
    spoilt = merge_lora_quantize_(quantize_fp8_rows(weight), weight, lora_a, lora_b)
    others = [row for row in range(9) if row != 4]
    assert torch.equal(spoilt.scale[others], clean.scale[others])
    assert torch.equal(spoilt.codes.view(torch.uint8)[others], clean.codes.view(torch.uint8)[others])
    assert not spoilt.scale[4].isfinite()


def test_parameters_are_fine():
    weight, lora_a, lora_b = (torch.nn.Parameter(t) for t in make_lora(8, 32, 2))
    out = merge_lora_quantize_(quantize_fp8_rows(weight), weight, lora_a, lora_b)
    assert isinstance(out, Fp8Rows)
    assert isinstance(merge_lora_quantize_(quantize_nvfp4(weight), weight, lora_a, lora_b), Nvfp4)
