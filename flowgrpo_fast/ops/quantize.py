"""Matrices in eight and four bits a value: FP8 rows and NVFP4 blocks, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowgrpo_fast import _C
from flowgrpo_fast.ops._binding import (
    allocated,
    bind,
    filled,
    refuse_tangents,
    require_bool,
    require_one_of,
    require_tensor,
)

FP8 = torch.float8_e4m3fn
FP4 = torch.float4_e2m1fn_x2
BLOCK_SIZE = 16  # values an NVFP4 scale
MAX_PARTIALS = 1024  # workspace of the CUDA kernels


class Fp8Rows(NamedTuple):
    """A matrix ``[M, K]`` as ``codes * scale``."""

    codes: Tensor  # [M, K] float8_e4m3fn
    scale: Tensor  # [M, 1] float32


class Nvfp4(NamedTuple):
    """A matrix ``[M, K]`` as ``codes * (scales * global_scale)``, a scale for each 16 values of a row."""

    codes: Tensor  # [M, K / 2] float4_e2m1fn_x2
    scales: Tensor  # [M, K / 16] float8_e4m3fn; swizzled: both rounded up, to multiples of 128 and of 4
    global_scale: Tensor  # 0-d float32


def as_bytes(op: str, argument: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of `dtype` as the uint8 tensor the kernels take."""
    require_tensor(op, argument, tensor)
    if tensor.dtype is not dtype:
        raise ValueError(f"{op}: {argument} has dtype {tensor.dtype}, must have {dtype}")
    if torch.compiler.is_compiling():
        return tensor.view(torch.uint8)
    if tensor.layout is not torch.strided:
        raise ValueError(f"{op}: {argument} has layout {tensor.layout}, must be a dense tensor")
    if tensor.is_neg():
        raise ValueError(f"{op}: {argument} is a negative view, must be resolved: {dtype} has no negation")
    return tensor.view(torch.uint8)


def _matrix_shape(op: str, x: Tensor) -> tuple[int, int]:
    require_tensor(op, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{op}: x has 0 dimensions, must be [..., columns]")
    columns = x.shape[-1]
    return x.numel() // max(columns, 1), columns


def _scale_shape(rows: int, columns: int, swizzle: bool) -> tuple[int, int]:
    blocks = columns // BLOCK_SIZE
    return (-(-rows // 128) * 128, -(-blocks // 4) * 4) if swizzle else (rows, blocks)


def _allocate_fp8(x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=x.device)
    return codes, torch.empty((rows, 1), dtype=torch.float32, device=x.device)


def _allocate_nvfp4(x: Tensor, rows: int, columns: int, swizzle: bool) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.empty((rows, columns // 2), dtype=torch.uint8, device=x.device)
    scales = torch.empty(_scale_shape(rows, columns, swizzle), dtype=torch.uint8, device=x.device)
    return codes, scales, torch.empty((), dtype=torch.float32, device=x.device)


def _nothing(*flat: Any) -> None:
    """Everything is written in place."""


_MATRIX_SCHEMA = "Tensor x, Tensor? lora_a, Tensor? lora_b, float lora_scale"


def _write_fp8(*flat: Any) -> None:
    *matrix, codes, scale = flat
    _C.quantize_fp8_rows(tuple(matrix), codes, scale, torch.get_num_threads())
    torch.autograd.graph.increment_version((codes, scale))


fp8_op = bind(
    "quantize_fp8_rows",
    f"({_MATRIX_SCHEMA}, Tensor(a!) codes, Tensor(b!) scale) -> ()",
    _write_fp8,
    _nothing,
)


def _write_nvfp4(*flat: Any) -> None:
    *matrix, codes, scales, global_scale, static_scale, swizzle = flat
    x = matrix[0]
    is_static = static_scale is not None
    needs_workspace = x.is_cuda and not is_static
    workspace = x.new_empty(MAX_PARTIALS, dtype=torch.float32) if needs_workspace else None
    outputs = (codes, scales, static_scale if is_static else global_scale, workspace)
    _C.quantize_nvfp4(tuple(matrix), outputs, is_static, swizzle, torch.get_num_threads())
    torch.autograd.graph.increment_version((codes, scales) if is_static else (codes, scales, global_scale))


nvfp4_op = bind(
    "quantize_nvfp4",
    f"({_MATRIX_SCHEMA}, Tensor(a!) codes, Tensor(b!) scales, Tensor(c!)? global_scale, Tensor? static_scale, "
    "bool swizzle) -> ()",
    _write_nvfp4,
    _nothing,
)


def quantize_fp8_rows(x: Tensor, out: Fp8Rows | None = None) -> Fp8Rows:
    r"""A matrix in FP8 with one decode scale a row, in one pass over memory.

    Bit for bit what these lines give on a CPU (all in float32)::

        scale = x.abs().amax(-1, keepdim=True).clamp(min=2**-100) / 448
        codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)

    which is torchao's row-wise quantisation, but for rows of zeros: these get the scale of the bound and codes 0. A
    row with a NaN has scale NaN and NaN codes; a row with an infinity has scale infinity, code NaN for the infinities
    and 0 for the rest. Every NaN code is stored as 0x7f.

    Other granularities are views: one scale for all is ``x.view(1, -1)``, 1x128 blocks are ``x.view(-1, 128)``.

    Args:
        x: ``[..., K]``; float32, bfloat16 or float16. Leading dimensions are rows: ``M`` together.
        out: where to write, for pointers that stay the same (CUDA graphs); else new tensors.

    Returns:
        ``Fp8Rows(codes [M, K] float8_e4m3fn, scale [M, 1] float32)``; no gradient.

    Raises:
        ValueError: wrong shape, dtype, device or layout.
    """
    op = "quantize_fp8_rows"
    rows, columns = _matrix_shape(op, x)
    if out is None:
        codes, scale = allocated(op, _allocate_fp8, x, rows, columns)
        out = Fp8Rows(codes.view(FP8), scale)
    else:
        require_fields(op, out, Fp8Rows)
        codes = as_bytes(op, "out.codes", out.codes, FP8)
    refuse_tangents(op, (x,))
    fp8_op(x.detach() if x.requires_grad else x, None, None, 0.0, codes, out.scale)
    return out


def quantize_nvfp4(
    x: Tensor, global_scale: Tensor | None = None, swizzle: bool = True, out: Nvfp4 | None = None
) -> Nvfp4:
    r"""A matrix in NVFP4: E2M1 values, an E4M3 scale for each 16 of a row, and one float32 scale.

    Bit for bit what these lines give on a CPU (all in float32; ``e2m1`` rounds to nearest even)::

        global_scale = x.abs().max().clamp(min=2**-100) / (448 * 6)
        blocks = x.unflatten(-1, (-1, 16))
        scales = (blocks.abs().amax(-1) / 6 / global_scale).clamp(2**-6, 448).to(torch.float8_e4m3fn)
        codes = e2m1((blocks * (1 / global_scale / scales.float())[..., None]).clamp(-6, 6))

    which is torchao's ``nvfp4_quantize``, ties included. The low half of a byte is the even column. A block with a NaN
    has scale NaN; E2M1 itself has none, and a NaN's code is 6.

    Swizzled scales lie as ``torch.nn.functional.scaled_mm`` wants them (``SwizzleType.SWIZZLE_32_4_4``): in tiles of
    128 rows and 4 columns, padded with zeros.

    Args:
        x: ``[..., K]``, K a multiple of 16; float32, bfloat16 or float16. Leading dimensions are rows:
            ``M`` together.
        global_scale: 0-d float32 on x's device, for a scale known before; None takes a pass over `x` for it.
        swizzle: the layout of the scales.
        out: where to write, for pointers that stay the same (CUDA graphs); else new tensors. Its global scale is
            written only if `global_scale` is None.

    Returns:
        ``Nvfp4(codes [M, K / 2] float4_e2m1fn_x2, scales float8_e4m3fn, global_scale [] float32)``; no gradient.

    Raises:
        ValueError: wrong shape, dtype, device or layout, or K no multiple of 16.
    """
    op = "quantize_nvfp4"
    require_bool(op, "swizzle", swizzle)
    rows, columns = _matrix_shape(op, x)
    if out is None:
        codes, scales, own = allocated(op, _allocate_nvfp4, x, rows, columns, swizzle)
        computed = own if global_scale is None else global_scale
        out = Nvfp4(codes.view(FP4), scales.view(FP8), computed)
    else:
        require_fields(op, out, Nvfp4)
        codes = as_bytes(op, "out.codes", out.codes, FP4)
        scales = as_bytes(op, "out.scales", out.scales, FP8)
    target = out.global_scale if global_scale is None else None
    refuse_tangents(op, (x,))
    source = x.detach() if x.requires_grad else x
    nvfp4_op(source, None, None, 0.0, codes, scales, target, global_scale, swizzle)
    return out if global_scale is None else out._replace(global_scale=global_scale)


def require_fields(op: str, out: object, kind: type) -> None:
    """Raises ``ValueError`` if `out` is not the named tuple that the op writes."""
    if not isinstance(out, kind):
        raise ValueError(f"{op}: out is a {type(out).__name__}, must be {kind.__name__}")


def _allocate_values(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


def _fill_values(out: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    _C.dequantize_fp8_rows(codes, scale, out, torch.get_num_threads())


_dequantize_fp8_op = bind(
    "dequantize_fp8_rows",
    "(Tensor codes, Tensor scale, ScalarType dtype) -> Tensor",
    filled("dequantize_fp8_rows", _allocate_values, _fill_values),
    _allocate_values,
)


def _allocate_nvfp4_values(
    codes: Tensor, scales: Tensor, global_scale: Tensor, dtype: torch.dtype, swizzle: bool
) -> Tensor:
    return torch.empty((*codes.shape[:-1], 2 * codes.shape[-1]), dtype=dtype, device=codes.device)


def _fill_nvfp4_values(
    out: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor, dtype: torch.dtype, swizzle: bool
) -> None:
    _C.dequantize_nvfp4((codes, scales, global_scale), out, swizzle, torch.get_num_threads())


_dequantize_nvfp4_op = bind(
    "dequantize_nvfp4",
    "(Tensor codes, Tensor scales, Tensor global_scale, ScalarType dtype, bool swizzle) -> Tensor",
    filled("dequantize_nvfp4", _allocate_nvfp4_values, _fill_nvfp4_values),
    _allocate_nvfp4_values,
)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dequantize_fp8_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``codes * scale`` in float32, rounded to `dtype`; what `quantize_fp8_rows` wrote.

    Args:
        codes: ``[M, K]`` float8_e4m3fn.
        scale: ``[M, 1]`` float32.
        dtype: float32, bfloat16 or float16.

    Returns:
        ``[M, K]`` of `dtype`.

    Raises:
        ValueError: wrong shape, dtype, device or layout.
    """
    op = "dequantize_fp8_rows"
    require_one_of(op, "dtype", dtype, _DTYPES)
    return _dequantize_fp8_op(as_bytes(op, "codes", codes, FP8), scale, dtype)


def dequantize_nvfp4(
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    swizzle: bool = True,
) -> Tensor:
    """``codes * (scales * global_scale)`` in float32, rounded to `dtype`; what `quantize_nvfp4` wrote.

    Args:
        codes: ``[M, K / 2]`` float4_e2m1fn_x2.
        scales: float8_e4m3fn, swizzled or ``[M, K / 16]``.
        global_scale: 0-d float32.
        dtype: float32, bfloat16 or float16.
        swizzle: the layout of the scales.

    Returns:
        ``[M, K]`` of `dtype`.

    Raises:
        ValueError: wrong shape, dtype, device or layout.
    """
    op = "dequantize_nvfp4"
    require_one_of(op, "dtype", dtype, _DTYPES)
    require_bool(op, "swizzle", swizzle)
    packed, block_scales = as_bytes(op, "codes", codes, FP4), as_bytes(op, "scales", scales, FP8)
    return _dequantize_nvfp4_op(packed, block_scales, global_scale, dtype, swizzle)
