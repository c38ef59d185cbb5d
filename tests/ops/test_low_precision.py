"""Every code of the conversions: all 16-bit inputs, and all floats around every rounding boundary."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flowgrpo_fast.ops import (
    build_info,
    dequantize_fp8_rows,
    dequantize_nvfp4,
    quantize_fp8_rows,
    quantize_nvfp4,
    reference,
)

ROOT = Path(__file__).resolve().parents[2]
ONE, INFINITY = torch.tensor(1.0), float("inf")
E4M3 = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 448
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def neighbourhoods(values, reach=600):
    """All floats within `reach` steps of each value and of each middle between two, of either sign."""
    centers = torch.cat([values, (values[1:] + values[:-1]) / 2])
    bits = centers.view(torch.int32)[:, None] + torch.arange(-reach, reach + 1, dtype=torch.int32)
    near = bits.clamp(min=0).flatten().view(torch.float32)
    near = near[near <= values.max()]
    return torch.cat([near, -near])


def every_pattern(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def random_bits(count):
    generator = torch.Generator().manual_seed(4)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32).view(torch.float32)


def e4m3_codes(x):
    """The kernel's conversion alone: a last value of 448 makes the scale of its row 1."""
    row = torch.cat([x, x.new_tensor([448.0])])[None]
    codes, scale = quantize_fp8_rows(row)
    assert scale.item() == 1
    return codes[0, :-1].view(torch.uint8)


def e2m1_codes(x):
    """The kernel's conversion alone: a last value of 6 in each block, and a global scale of 1."""
    padded = torch.nn.functional.pad(x.float(), (0, -len(x) % 15)).view(-1, 15)
    blocks = torch.cat([padded, torch.full((len(padded), 1), 6.0)], dim=1)
    codes, scales, _ = quantize_nvfp4(blocks.to(x.dtype).view(1, -1), ONE, swizzle=False)
    assert (scales.float() == 1).all()
    packed = codes.view(torch.uint8)[0]
    return torch.stack([packed & 15, packed >> 4], -1).view(-1, 16)[:, :15].flatten()[: len(x)]


def e4m3_inputs():
    for dtype in (torch.bfloat16, torch.float16):
        patterns = every_pattern(dtype)
        yield patterns[patterns.abs() <= 448]
    yield neighbourhoods(E4M3)
    spread = random_bits(300_000)
    yield spread[spread.abs() <= 448]


def e2m1_inputs():
    for dtype in (torch.bfloat16, torch.float16):
        patterns = every_pattern(dtype)
        yield patterns[patterns.abs() <= 6]
    yield neighbourhoods(E2M1, reach=5000)
    spread = random_bits(300_000)
    yield spread[spread.abs() <= 6]


def test_e4m3_codes_are_torchs():
    for x in e4m3_inputs():
        assert torch.equal(e4m3_codes(x), x.float().to(torch.float8_e4m3fn).view(torch.uint8))


def test_e4m3_codes_are_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for x in e4m3_inputs():
        want = x.float().numpy().astype(ml_dtypes.float8_e4m3fn).view("uint8")
        assert torch.equal(e4m3_codes(x), torch.from_numpy(want))


def test_e2m1_codes_are_the_references():
    for x in e2m1_inputs():
        assert torch.equal(e2m1_codes(x), reference.quantize.e2m1_codes(x.float()))


def test_e2m1_codes_are_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for x in e2m1_inputs():
        want = x.float().numpy().astype(ml_dtypes.float4_e2m1fn).view("uint8")
        assert torch.equal(e2m1_codes(x), torch.from_numpy(want))


def saturated_e2m1_codes(x, global_scale):
    """Codes of blocks whose scale is 448 and too small: a last value makes it so."""
    padded = torch.nn.functional.pad(x.float(), (0, -len(x) % 15)).view(-1, 15)
    blocks = torch.cat([padded, torch.full((len(padded), 1), 6e4)], dim=1).to(x.dtype)
    codes, scales, _ = quantize_nvfp4(blocks.view(1, -1), global_scale, swizzle=False)
    packed = codes.view(torch.uint8)[0]
    unpacked = torch.stack([packed & 15, packed >> 4], -1).view(-1, 16)[:, :15].flatten()[: len(x)]
    return unpacked, scales.float().view(-1, 1).expand(-1, 15).flatten()[: len(x)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_e2m1_codes_are_ml_dtypes_beyond_6_and_at_infinity(dtype):
    """ml_dtypes saturates as well. Of a NaN, which E2M1 lacks, it makes a zero, where here the scale of the whole block
    is NaN and the code 6, of either sign."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    global_scale = torch.tensor(0.01)
    x = every_pattern(dtype) if dtype.itemsize == 2 else random_bits(300_000)
    x = torch.cat([x[~x.isnan()], torch.tensor([INFINITY, -INFINITY], dtype=dtype)])
    codes, scales = saturated_e2m1_codes(x, global_scale)
    assert (scales == 448).all()
    scaled = x.float() * (1 / global_scale / 448)
    assert (scaled.abs() > 6).float().mean() > 0.1
    want = scaled.numpy().astype(ml_dtypes.float4_e2m1fn).view("uint8")
    assert torch.equal(codes, torch.from_numpy(want))
    nan = torch.tensor([float("nan")], dtype=dtype)
    codes, scales = saturated_e2m1_codes(torch.cat([nan, torch.zeros(14, dtype=dtype)]), global_scale)
    assert scales.isnan().all()
    assert codes[0] & 7 == 7
    assert nan.float().numpy().astype(ml_dtypes.float4_e2m1fn).view("uint8")[0] & 7 == 0


def test_block_scales_are_ml_dtypes_up_to_448_and_stay_there():
    """Beyond 464, what rounds to no finite E4M3, ml_dtypes gives NaN; a block's scale saturates, and so its codes."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    beyond = torch.cat(
        [torch.linspace(440, 480, 4001), torch.logspace(2.7, 30, 500), torch.tensor([INFINITY])]
    )
    wanted = torch.cat([neighbourhoods(E4M3, 50).abs(), beyond])
    amax = 6 * wanted[wanted >= 2.0**-6]
    scales = quantize_nvfp4(amax[:, None] * torch.ones(16), ONE, swizzle=False).scales.view(torch.uint8)[:, 0]
    exact = amax / 6
    theirs = torch.from_numpy(exact.numpy().astype(ml_dtypes.float8_e4m3fn).view("uint8"))
    fits = exact <= 464
    assert torch.equal(scales[fits], theirs[fits])
    assert (theirs[~fits] == 0x7F).all()
    assert (scales[~fits] == 0x7E).all()
    assert len(scales[~fits]) > 500


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp8_rows_with_infinities_and_nans_are_ml_dtypes(dtype):
    """Up to the sign of a NaN, which is always written without."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = every_pattern(dtype).view(-1, 64)
    codes, scale = quantize_fp8_rows(x)
    with np.errstate(invalid="ignore"):
        scaled = (x.float().numpy() / scale.numpy()).clip(-448, 448)
        want = torch.from_numpy(scaled.astype(ml_dtypes.float8_e4m3fn).view("uint8"))
    is_nan = (want & 0x7F) == 0x7F
    assert 0 < is_nan.float().mean() < 0.5
    assert torch.equal(codes.view(torch.uint8), torch.where(is_nan, 0x7F, want))


def test_ties_go_to_even():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert E2M1[e2m1_codes(ties).long()].tolist() == [0, 1, 1, 2, 2, 4, 4]
    ties = torch.tensor([2.0**-10, 3 * 2.0**-10, 17 / 16, 19 / 16, 400.0, 432.0])
    want = [0, 2.0**-8, 1, 1.25, 384, 448]
    assert e4m3_codes(ties).view(torch.float8_e4m3fn).float().tolist() == want


def test_every_code_decodes():
    codes = torch.arange(256, dtype=torch.uint8)
    values = dequantize_fp8_rows(codes.view(torch.float8_e4m3fn)[None], torch.ones(1, 1), torch.float32)[0]
    want = codes.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(values, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(values.signbit(), want.signbit())
    packed = codes.view(1, 256).view(torch.float4_e2m1fn_x2)
    scales = torch.ones(1, 32).to(torch.float8_e4m3fn)
    values = dequantize_nvfp4(packed, scales, ONE, torch.float32, swizzle=False)[0]
    signed = torch.cat([E2M1, -E2M1])
    pairs = torch.stack([signed[(codes & 15).long()], signed[(codes >> 4).long()]], -1).flatten()
    assert torch.equal(values, pairs)
    assert torch.equal(values.signbit(), pairs.signbit())


@pytest.mark.parametrize("columns", [16, 256, 65536])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_pattern_in_a_row(dtype, columns):
    """Subnormals, infinities and NaNs included: neighbours in a row have the same exponent, or all have a row."""
    x = every_pattern(dtype).view(-1, columns)
    for tensor in (x, x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))].t().contiguous()):
        codes, scale = quantize_fp8_rows(tensor)
        want_codes, want_scale = reference.quantize_fp8_rows(tensor)
        torch.testing.assert_close(scale, want_scale, rtol=0, atol=0, equal_nan=True)
        nan = want_codes.float().isnan()
        assert (codes.view(torch.uint8)[nan] == 0x7F).all()
        assert torch.equal(codes.view(torch.uint8)[~nan], want_codes.view(torch.uint8)[~nan])


def test_block_scales_are_torchs():
    """Scales below 2^-6, in every neighbourhood of a boundary, and above 448; then codes that saturate."""
    amax = torch.cat([6 * neighbourhoods(E4M3, 100).abs(), torch.logspace(-30, 30, 4001)])
    x = amax[:, None] * torch.linspace(-1, 1, 16)
    for global_scale in (1.0, 0.37, 1e-20, 1e20):
        ours = quantize_nvfp4(x, torch.tensor(global_scale), swizzle=False)
        want = reference.quantize_nvfp4(x, torch.tensor(global_scale), swizzle=False)
        assert torch.equal(ours.scales.view(torch.uint8), want[1].view(torch.uint8))
        assert torch.equal(ours.codes.view(torch.uint8), want[0].view(torch.uint8))


TORCHAO = np.load(Path(__file__).parent / "golden" / "torchao.npz")  # by record_torchao.py there
KEYS = ("x", "global_scale", "scales", "codes", "fp8_scale", "fp8")
NAMES = ("random", "ties", "tiny", "patterns", "huge")  # values of bfloat16
NAMES_AND_DTYPES = [(name, dtype) for name in NAMES for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*NAMES_AND_DTYPES, ("float32", torch.float32), ("float32 ties", torch.float32)],
    ids=str,
)
def test_codes_are_torchaos(name, dtype):
    """NVFP4 and FP8 rows; zeros, and an amax whose scale is subnormal, torchao divides by: NaN there, not here."""
    golden = {key: torch.from_numpy(TORCHAO[f"{name}/{key}"]) for key in KEYS}
    x = golden["x"].view(torch.bfloat16 if name in NAMES else torch.float32).to(dtype)
    nvfp4, fp8 = quantize_nvfp4(x, swizzle=False), quantize_fp8_rows(x)
    assert torch.equal(nvfp4.global_scale, golden["global_scale"])
    assert torch.equal(nvfp4.scales.view(torch.uint8), golden["scales"])
    assert torch.equal(nvfp4.codes.view(torch.uint8), golden["codes"])
    assert torch.equal(fp8.scale, golden["fp8_scale"])
    assert torch.equal(fp8.codes.view(torch.uint8), golden["fp8"])


DIGEST = """
import sys
sys.path[:0] = [{root!r}, {here!r}]
from test_low_precision import digest
print(digest())
"""


def digest():
    """One hash over codes, scales and values for every dtype and awkward lengths."""
    sha = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for x in (
            random_bits(130 * 272).view(130, 272).nan_to_num(1.0),
            torch.randn(5, 48, generator=torch.Generator().manual_seed(0)),
        ):
            x = x.to(dtype)
            fp8, nvfp4 = quantize_fp8_rows(x), quantize_nvfp4(x)
            values = dequantize_fp8_rows(*fp8, dtype), dequantize_nvfp4(*nvfp4, dtype)
            for tensor in (*fp8, *nvfp4, *values):
                sha.update(tensor.contiguous().view(-1).view(torch.uint8).nan_to_num(0).numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("isa", build_info()["isas"])
def test_every_instruction_set_gives_the_same_bits(isa):
    code = DIGEST.format(root=str(ROOT), here=str(Path(__file__).parent))
    environment = {**os.environ, "FLOWGRPO_FAST_ISA": isa}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if "must be one of" in result.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == digest()
