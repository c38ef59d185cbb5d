"""Weights and activations of real linears into eight and four bits, and a LoRA of rank 32 merged on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.cases import Case, Selection, Size, nbytes
from flowgrpo_fast.ops import merge_lora_quantize_, quantize_fp8_rows, quantize_nvfp4, reference

RANK = 32
SELECTION: Selection = tuple(
    (size, torch.bfloat16)
    for size in (
        Size("SD3.5 weight 1536x1536", 1536, (1536,)),
        Size("SD3.5 activation x18", 18 * 1229, (1536,)),
        Size("FLUX weight 3072x12288", 3072, (12288,)),
        Size("toy 64x64", 64, (64,)),
    )
)


def eager_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Row-wise scale, divide, clamp, cast: an op each."""
    amax = x.float().abs().amax(dim=-1, keepdim=True)
    scale = torch.clamp(amax, min=2.0**-100) / torch.finfo(torch.float8_e4m3fn).max
    scaled = x.float() / scale
    return scaled.clamp(min=-448.0, max=448.0).to(torch.float8_e4m3fn), scale


def eager_e2m1(x: Tensor) -> Tensor:
    """E2M1 codes by float arithmetic: subnormals through a large addend, normals by rounding the bits."""
    sign = (x.view(torch.int32) >> 28) & 8
    magnitude = x.abs().clamp(max=6.0)
    bits = magnitude.view(torch.int32)
    normal = (bits - (126 << 23) + ((1 << 21) - 1) + ((bits >> 22) & 1)) >> 22
    low = (magnitude + 2.0**22).view(torch.int32) - 0x4A800000
    return (torch.where(magnitude < 1, low, normal) | sign).to(torch.uint8)


def eager_nvfp4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Global scale, block scales, codes, packing and the swizzle: an op each. Codes stay bytes, as inductor wants."""
    x = x.float()
    global_scale = x.abs().max().clamp(min=2.0**-100) / (448.0 * 6.0)
    blocks = x.reshape(x.shape[0], -1, 16)
    scales = blocks.abs().amax(dim=-1) / 6.0 / global_scale
    scales = scales.clamp(min=2.0**-6, max=448.0).to(torch.float8_e4m3fn)
    scaled = blocks * ((1.0 / global_scale) / scales.float()).unsqueeze(-1)
    codes = eager_e2m1(scaled.clamp(-6.0, 6.0)).flatten(1)
    packed = codes[:, ::2] | (codes[:, 1::2] << 4)
    return packed, reference.quantize.swizzled(scales), global_scale


def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """As trainers merge, in float32. The factors of `cases` are small integers: sums are exact in any order."""
    return weight.float() + 0.5 * (lora_b.float() @ lora_a.float())


def cases(size: Size, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Each operation on one matrix, a row a sample; ours writes into tensors that exist, as a weight refresh does."""
    generator = torch.Generator().manual_seed(0)
    columns = math.prod(size.sample)
    x = torch.randn((size.batch, columns), generator=generator).to(device, dtype)
    lora_a = torch.randint(-3, 4, (RANK, columns), generator=generator).to(device, dtype)
    lora_b = torch.randint(-3, 4, (size.batch, RANK), generator=generator).to(device, dtype)
    fp8, nvfp4 = quantize_fp8_rows(x), quantize_nvfp4(x)
    compiled_fp8, compiled_nvfp4 = torch.compile(reference.quantize_fp8_rows), torch.compile(eager_nvfp4)
    compiled_merge = torch.compile(lambda *lora: eager_fp8(merged(*lora)))
    compiled_merge4 = torch.compile(lambda *lora: eager_nvfp4(merged(*lora)))
    lora = (x, lora_a, lora_b)
    contenders = {
        "quantize_fp8_rows": {
            "ours": lambda: quantize_fp8_rows(x, fp8),
            "eager": lambda: eager_fp8(x),
            "compiled": lambda: compiled_fp8(x),
        },
        "quantize_nvfp4": {
            "ours": lambda: quantize_nvfp4(x, out=nvfp4),
            "eager": lambda: eager_nvfp4(x),
            "compiled": lambda: compiled_nvfp4(x),
        },
        "merge_lora_fp8": {
            "ours": lambda: merge_lora_quantize_(fp8, *lora, 0.5),
            "eager": lambda: eager_fp8(merged(*lora)),
            "compiled": lambda: compiled_merge(*lora),
        },
        "merge_lora_nvfp4": {
            "ours": lambda: merge_lora_quantize_(nvfp4, *lora, 0.5),
            "eager": lambda: eager_nvfp4(merged(*lora)),
            "compiled": lambda: compiled_merge4(*lora),
        },
    }
    for operation, runs in contenders.items():
        read = nbytes(*lora) if operation.startswith("merge") else nbytes(x)
        written = nbytes(*fp8) if operation.endswith("fp8") or "rows" in operation else nbytes(*nvfp4)
        yield Case(operation, size, dtype, read + written, runs)
