"""Eight and four bits a value back to a matrix: what reads a weight that is stored so."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.cases import Case, Selection, Size, nbytes
from benchmarks.cases.quantize import SELECTION as MATRICES
from flowgrpo_fast.ops import (
    Nvfp4,
    dequantize_fp8_rows,
    dequantize_nvfp4,
    quantize_fp8_rows,
    quantize_nvfp4,
    reference,
)

SELECTION: Selection = (MATRICES[0], MATRICES[-1])
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def eager_nvfp4(stored: Nvfp4, dtype: torch.dtype) -> Tensor:
    """Halves of the bytes, values by a table, scales out of their tiles, two products: an op each."""
    packed = stored.codes.view(torch.uint8)
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    table = torch.tensor([*VALUES, *(-value for value in VALUES)], device=packed.device)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(rows, columns)
    tiles = stored.scales.view(-1, stored.scales.shape[1] // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    scales = tiles.reshape(stored.scales.shape).float()[:rows, : columns // 16] * stored.global_scale
    blocks = table[codes.long()].view(rows, -1, 16) * scales.unsqueeze(-1)
    return blocks.reshape(rows, columns).to(dtype)


def cases(size: Size, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Reads codes and scales, writes the matrix."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((size.batch, math.prod(size.sample)), generator=generator).to(device, dtype)
    fp8, nvfp4 = quantize_fp8_rows(x), quantize_nvfp4(x)
    compiled_fp8 = torch.compile(reference.dequantize_fp8_rows)
    compiled_nvfp4 = torch.compile(reference.dequantize_nvfp4)
    as_bytes = nvfp4._replace(codes=nvfp4.codes.view(torch.uint8))  # as inductor wants
    contenders = {
        "ours": lambda: dequantize_fp8_rows(*fp8, dtype),
        "eager": lambda: (fp8.codes.float() * fp8.scale).to(dtype),
        "compiled": lambda: compiled_fp8(*fp8, dtype),
    }
    yield Case("dequantize_fp8_rows", size, dtype, nbytes(*fp8, x), contenders)
    contenders = {
        "ours": lambda: dequantize_nvfp4(*nvfp4, dtype),
        "eager": lambda: eager_nvfp4(nvfp4, dtype),
        "compiled": lambda: compiled_nvfp4(*as_bytes, dtype),
    }
    yield Case("dequantize_nvfp4", size, dtype, nbytes(*nvfp4, x), contenders)
