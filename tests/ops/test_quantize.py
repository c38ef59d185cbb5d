"""Quantising and dequantising against the reference, against torch's and torchao's own, and inside a matmul."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import ScalingType, scaled_mm

from flowgrpo_fast.ops import (
    Fp8Rows,
    Nvfp4,
    dequantize_fp8_rows,
    dequantize_nvfp4,
    quantize_fp8_rows,
    quantize_nvfp4,
    reference,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (3, 7), (2, 3, 32), (5, 272), (2, 1040), (3, 1025)]
BLOCKS = [((1, 16), True), ((5, 272), True), ((2, 3, 32), False), ((2, 1040), False)]


def normal(shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    spread = torch.logspace(-2, 2, shape[-1])  # blocks of different sizes
    return (spread * torch.randn(shape, generator=generator)).to(dtype).to(device)


def same_bits(left, right):
    """Equal up to the bits of a NaN."""
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    if left.dtype is torch.float4_e2m1fn_x2:  # nothing but views of it exists
        assert torch.equal(left.view(torch.uint8).cpu(), right.view(torch.uint8).cpu())
        return
    left, right = left.cpu(), right.cpu()
    nan = left.float().isnan()
    assert torch.equal(nan, right.float().isnan())
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[left.element_size()]
    assert torch.equal(left.view(integers)[~nan], right.view(integers)[~nan])


def all_same(left, right):
    for a, b in zip(left, right, strict=True):
        same_bits(a, b)


@pytest.mark.witness
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fp8_rows_equal_the_reference(device, shape, dtype):
    x = normal(shape, dtype, device)
    ours = quantize_fp8_rows(x)
    all_same(ours, reference.quantize_fp8_rows(x.cpu()))
    same_bits(dequantize_fp8_rows(*ours, dtype), reference.dequantize_fp8_rows(*ours, dtype))


@pytest.mark.witness
@pytest.mark.parametrize(("shape", "swizzle"), BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nvfp4_equals_the_reference(device, shape, dtype, swizzle):
    x = normal(shape, dtype, device)
    given_scale = torch.tensor(0.0123, device=device)
    for global_scale in (None, given_scale):
        ours = quantize_nvfp4(x, global_scale, swizzle)
        want = reference.quantize_nvfp4(x.cpu(), None if global_scale is None else given_scale.cpu(), swizzle)
        all_same(ours, want)
        values = dequantize_nvfp4(*ours, dtype, swizzle)
        same_bits(values, reference.dequantize_nvfp4(*want, dtype, swizzle))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 140),
    blocks=st.integers(1, 40),
    tail=st.integers(0, 15),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    exponent=st.integers(-40, 40),
    swizzle=st.booleans(),
)
def test_any_shape_and_scale(rows, blocks, tail, dtypes, exponent, swizzle):
    dtype, back = dtypes
    x = (normal((rows, 16 * blocks)) * 2.0**exponent).to(dtype)
    nvfp4 = quantize_nvfp4(x, None, swizzle)
    all_same(nvfp4, reference.quantize_nvfp4(x, None, swizzle))
    values = dequantize_nvfp4(*nvfp4, back, swizzle)
    same_bits(values, reference.dequantize_nvfp4(*nvfp4, back, swizzle))
    x = x[:, : 16 * blocks - tail].contiguous()
    fp8 = quantize_fp8_rows(x)
    all_same(fp8, reference.quantize_fp8_rows(x))
    same_bits(dequantize_fp8_rows(*fp8, back), reference.dequantize_fp8_rows(*fp8, back))


def test_error_is_half_a_step_at_most():
    x = normal((64, 512)).double()
    fp8 = quantize_fp8_rows(x.float())
    error = (dequantize_fp8_rows(*fp8, torch.float32).double() - x).abs()
    step = torch.maximum(x.abs() * 2.0**-3, fp8.scale * 2.0**-9)
    assert (error <= step / 2 * (1 + 1e-5)).all()
    nvfp4 = quantize_nvfp4(x.float())
    error = (dequantize_nvfp4(*nvfp4, torch.float32).double() - x).abs()
    largest = x.unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True).expand(64, 32, 16).flatten(-2)
    # Steps are 2 of 6 at most; a rounded scale is off by 1/16, or by 2^-10 of the global scale's reach.
    assert (error <= largest * (1 / 6 + 1 / 16) + 6 * nvfp4.global_scale * 2.0**-9).all()


@pytest.mark.parametrize(
    ("recipe", "view"), [(ScalingType.RowWise, (48, 64)), (ScalingType.TensorWise, (1, -1))], ids=str
)
def test_scaled_mm_is_dequantise_then_matmul(recipe, view):
    x, weight = normal((48, 64), torch.bfloat16), normal((32, 64))
    a, b = (
        quantize_fp8_rows(x.view(view)),
        quantize_fp8_rows(weight.view(-1, 64) if view[0] > 1 else weight.view(view)),
    )
    a_codes, b_codes = a.codes.view(48, 64), b.codes.view(32, 64)
    scales = (a.scale, b.scale.t()) if view[0] > 1 else (a.scale[0, 0], b.scale[0, 0])
    product = scaled_mm(
        a_codes, b_codes.t(), scales[0], recipe, scales[1], recipe, output_dtype=torch.float32
    )
    a_values = dequantize_fp8_rows(*a, torch.float32).view(48, 64)
    b_values = dequantize_fp8_rows(*b, torch.float32).view(32, 64)
    assert torch.equal(product, a_values @ b_values.t())


def test_blocks_of_128_are_rows_of_a_view():
    x = normal((6, 384), torch.bfloat16)
    codes, scale = quantize_fp8_rows(x.unflatten(-1, (3, 128)))
    blocks = x.float().view(6, 3, 128)
    want = blocks.abs().amax(-1) / 448
    assert torch.equal(scale.view(6, 3), want)
    same_bits(codes.view(6, 3, 128), (blocks / want[..., None]).to(torch.float8_e4m3fn))


def test_swizzled_scales_lie_as_in_the_cublas_layout():
    """Element by element: offset of row r, column c inside a tile is (r % 32) * 16 + (r / 32) * 4 + c."""
    rows, columns = 200, 7
    x = normal((rows, 16 * columns))
    plain = quantize_nvfp4(x, swizzle=False).scales.view(torch.uint8)
    stored = quantize_nvfp4(x).scales.view(torch.uint8)
    assert stored.shape == (256, 8)
    expected = torch.zeros(256 * 8, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            tile = (row // 128) * 2 + column // 4
            expected[512 * tile + row % 32 * 16 + row % 128 // 32 * 4 + column % 4] = plain[row, column]
    assert torch.equal(stored.flatten(), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zeros_have_a_scale(dtype):
    x = torch.zeros(3, 32, dtype=dtype)
    x[1] = -0.0
    for values, quantized in (
        (dequantize_fp8_rows(*quantize_fp8_rows(x)), quantize_fp8_rows(x).scale),
        (dequantize_nvfp4(*quantize_nvfp4(x)), quantize_nvfp4(x).global_scale),
    ):
        assert torch.equal(values, x.bfloat16())
        assert torch.equal(values.signbit(), x.signbit())
        assert quantized.isfinite().all()
        assert (quantized > 0).all()


def test_non_finite_rows_stay_in_their_row():
    x = normal((4, 32))
    x[1, 3], x[2, 5] = float("nan"), -float("inf")
    codes, scale = quantize_fp8_rows(x)
    same_bits(codes, reference.quantize_fp8_rows(x)[0])
    assert scale.flatten().isnan().tolist() == [False, True, False, False]
    assert (codes.view(torch.uint8)[1] == 0x7F).all()
    assert codes.float()[2].isnan().nonzero().tolist() == [[5]]
    assert (codes.float()[2].nan_to_num() == 0).all()
    assert torch.equal(scale[[0, 3]], quantize_fp8_rows(x[[0, 3]].contiguous()).scale)


def test_non_finite_blocks():
    x = normal((4, 32))
    x[1, 3], x[2, 20] = float("nan"), -float("inf")
    fixed = torch.tensor(0.01)
    quantized = quantize_nvfp4(x, fixed, swizzle=False)
    all_same(quantized, reference.quantize_nvfp4(x, fixed, swizzle=False))
    assert quantized.scales.float().isnan().nonzero().tolist() == [[1, 0]]
    values = dequantize_nvfp4(*quantized, torch.float32, swizzle=False)
    assert values[2, 20] == -6 * (448 * fixed)  # saturates
    for computed in (x, x.nan_to_num(nan=0.0)):  # a global scale of NaN, and of infinity
        all_same(quantize_nvfp4(computed), reference.quantize_nvfp4(computed))


def test_out_is_written_in_place():
    x, other = normal((130, 80)), 3 * normal((130, 80))
    for op, fresh in ((quantize_fp8_rows, quantize_fp8_rows(x)), (quantize_nvfp4, quantize_nvfp4(x))):
        out = op(other)
        pointers = [t.data_ptr() for t in out]
        assert op(x, out=out) is out
        assert [t.data_ptr() for t in out] == pointers
        all_same(out, fresh)
    fixed, out = torch.tensor(0.25), quantize_nvfp4(other)
    kept = out.global_scale.clone()
    result = quantize_nvfp4(x, fixed, out=out)
    assert result.global_scale is fixed
    assert torch.equal(out.global_scale, kept)
    all_same(result, quantize_nvfp4(x, fixed))


def test_padding_is_written_each_time():
    x = normal((130, 80))
    out = quantize_nvfp4(x)
    want = out.scales.view(torch.uint8).clone()
    out.scales.view(torch.uint8).fill_(255)
    quantize_nvfp4(x, out=out)
    assert torch.equal(out.scales.view(torch.uint8), want)


@pytest.mark.parametrize("shape", [(37, 3, 48), (300, 272)], ids=str)
def test_threads_change_nothing(shape):
    x = normal(shape, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 3, 7):
            torch.set_num_threads(num_threads)
            results.append((*quantize_fp8_rows(x), *quantize_nvfp4(x)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        all_same(results[0], other)


@pytest.mark.witness
@pytest.mark.parametrize("shape", [(37, 3, 48), (300, 272)], ids=str)
def test_a_row_does_not_see_the_others(shape, device):
    x = normal(shape, torch.bfloat16, device)
    rows = x.flatten(0, -2)
    fp8, nvfp4 = quantize_fp8_rows(x), quantize_nvfp4(x, swizzle=False)
    for row in (0, 5, len(rows) - 1):
        alone = rows[row : row + 1].contiguous()
        all_same(quantize_fp8_rows(alone), [t[row : row + 1].contiguous() for t in fp8])
        codes, scales, _ = quantize_nvfp4(alone, nvfp4.global_scale, swizzle=False)
        same_bits(scales, nvfp4.scales[row : row + 1])
        assert torch.equal(codes.view(torch.uint8), nvfp4.codes.view(torch.uint8)[row : row + 1])


def test_requires_grad_gives_plain_tensors():
    x = normal((4, 32)).requires_grad_()
    for quantized in (quantize_fp8_rows(x), quantize_nvfp4(x)):
        assert isinstance(quantized, (Fp8Rows, Nvfp4))
        assert not any(t.requires_grad for t in quantized)
