"""Eight and four bits a value in plain PyTorch: scales, codes, layouts, and the merge of a LoRA."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

TINY_AMAX = 2.0**-100  # a smaller largest magnitude counts as this
E4M3_MAX = 448.0
E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _divided(x: Tensor, by: float) -> Tensor:
    """``x / by``, rounded once: by a number on the host CUDA multiplies with its rounded reciprocal instead."""
    return x / torch.full((), by, dtype=x.dtype, device=x.device)


def quantize_fp8_rows(x: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Codes ``[M, K]`` float8_e4m3fn and decode scales ``[M, 1]``."""
    x = x.reshape(-1, x.shape[-1]).to(dtype)
    scale = x.abs().amax(-1, keepdim=True).clamp(min=TINY_AMAX)
    scale = _divided(scale, E4M3_MAX)
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def dequantize_fp8_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``codes * scale``."""
    return codes.to(scale.dtype).mul(scale).to(dtype)


def e2m1_codes(x: Tensor) -> Tensor:
    """Codes 0 to 15 as uint8: round to nearest, a tie to the even code; NaN becomes 6."""
    magnitude = x.abs()
    # Between neighbours c and c + 1: the tie belongs to c + 1 where that is the even code.
    above = [
        magnitude >= (low + high) / 2 if code % 2 else magnitude > (low + high) / 2
        for code, (low, high) in enumerate(pairwise(E2M1_VALUES))
    ]
    code = sum((step.to(torch.uint8) for step in above), torch.zeros_like(x, dtype=torch.uint8))
    signed = code | (x.signbit().to(torch.uint8) << 3)
    return torch.where(x.isnan(), torch.full_like(signed, 7), signed)


def e2m1_values(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of codes 0 to 15."""
    table = torch.tensor(E2M1_VALUES, dtype=dtype, device=codes.device)
    return torch.cat([table, -table])[codes.long()]


def swizzled(scales: Tensor) -> Tensor:
    """Scales ``[M, C]`` in tiles of 128 x 4, padded with zeros; ``[M', C']``."""
    rows, columns = scales.shape
    padded = torch.nn.functional.pad(scales.view(torch.uint8), (0, -columns % 4, 0, -rows % 128))
    tiles = padded.view(-1, 4, 32, padded.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(padded.shape).view(scales.dtype)


def unswizzled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of `swizzled`."""
    stored = scales.view(torch.uint8)
    tiles = stored.view(-1, stored.shape[1] // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(stored.shape)[:rows, :columns].contiguous().view(scales.dtype)


def quantize_nvfp4(
    x: Tensor, global_scale: Tensor | None = None, swizzle: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes ``[M, K / 2]`` float4_e2m1fn_x2, scales float8_e4m3fn and the global scale ``[]``."""
    x = x.reshape(-1, x.shape[-1]).to(dtype)
    if global_scale is None:
        global_scale = _divided(x.abs().max().clamp(min=TINY_AMAX), E4M3_MAX * E2M1_MAX)
    blocks = x.unflatten(-1, (-1, 16))
    scales = _divided(blocks.abs().amax(-1), E2M1_MAX) / global_scale
    scales = scales.clamp(2.0**-6, E4M3_MAX).to(torch.float8_e4m3fn)
    reciprocal = 1 / global_scale / scales.to(dtype)
    codes = e2m1_codes((blocks * reciprocal[..., None]).clamp(-E2M1_MAX, E2M1_MAX)).flatten(-2)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.float4_e2m1fn_x2)
    return packed, swizzled(scales) if swizzle else scales, global_scale


def dequantize_nvfp4(
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor,
    dtype: torch.dtype = torch.float32,
    swizzle: bool = True,
) -> Tensor:
    """``codes * (scales * global_scale)``."""
    packed = codes.view(torch.uint8)
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    values = e2m1_values(torch.stack([packed & 15, packed >> 4], -1).flatten(-2), global_scale.dtype)
    scales = unswizzled(scales, rows, columns // 16) if swizzle else scales
    scale = scales.to(global_scale.dtype) * global_scale
    return (values.unflatten(-1, (-1, 16)) * scale[..., None]).flatten(-2).to(dtype)


def merged_weight(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, lora_scale: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``weight + lora_scale * (lora_b @ lora_a)``, the products added in order of the rank's index."""
    lora_a, lora_b = lora_a.to(dtype), lora_b.to(dtype)
    delta = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    for index in range(lora_a.shape[0]):
        product = lora_b[:, index, None] * lora_a[index]
        delta = delta + product
    return weight.to(dtype) + lora_scale * delta


def merge_lora_quantize(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_scale: float,
    nvfp4: bool = False,
    global_scale: Tensor | None = None,
    swizzle: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """The merged weight as FP8 rows or in NVFP4."""
    merged = merged_weight(weight, lora_a, lora_b, lora_scale, dtype)
    return quantize_nvfp4(merged, global_scale, swizzle, dtype) if nvfp4 else quantize_fp8_rows(merged, dtype)
