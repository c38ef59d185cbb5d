"""The formats: how a weight is stored in eight or four bits, and how activations are multiplied by it.

A weight `[N, K]` is stored as bytes (`Stored`): no cast of a module to another dtype touches it. Activations `[M, K]`
are quantised on the way in, with scales of their own values (dynamic). The product is
`torch.nn.functional.scaled_mm` where the device has the format; elsewhere both operands are dequantised and multiplied.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import ScalingType, SwizzleType

from flowgrpo_fast.ops import (
    Fp8Rows,
    Nvfp4,
    dequantize_fp8_rows,
    dequantize_nvfp4,
    merge_lora_quantize_,
    quantize_fp8_rows,
    quantize_nvfp4,
)
from flowgrpo_fast.ops._binding import bind

BLOCK = 128  # rows and columns of a block of `BlockScales`
FP8, FP4 = torch.float8_e4m3fn, torch.float4_e2m1fn_x2


class Stored(NamedTuple):
    """A weight in low precision, all uint8: reinterpreted, never converted."""

    codes: Tensor
    scale: Tensor
    global_scale: Tensor  # empty, but for NVFP4


class Lora(NamedTuple):
    """A low-rank update of a weight: `scale * (b @ a)`."""

    a: Tensor  # [r, K]
    b: Tensor  # [N, r]
    scale: float


class Format(ABC):
    """One way to store a weight, and to multiply by it."""

    name: str
    multiples: tuple[int, int]  # N and K of a weight must be divisible by them
    scale_of_batch: bool  # an activation's scale comes from the whole batch, not from its own row
    opaque = False  # to the compiler, whose own `scaled_mm` knows no swizzled or padded scales

    @abstractmethod
    def empty(self, rows: int, columns: int, device: torch.device) -> Stored:
        """Room for a weight `[rows, columns]`."""

    @abstractmethod
    def write_(self, out: Stored, weight: Tensor, lora: Lora | None = None) -> None:
        """Quantises `weight [N, K]`, with the update merged into it in fp32, into the tensors of `out`."""

    @abstractmethod
    def values(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        """The stored weight `[N, K]`, dequantised in fp32 and rounded to `dtype`."""

    @abstractmethod
    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Activations `[M, K]`, quantised and back."""

    @abstractmethod
    def scaled_mm(self, x: Tensor, stored: Stored, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`x @ weight.T + bias`, `[M, N]` of `dtype`, by the device's own low-precision product."""

    @abstractmethod
    def is_promised(self, device: torch.device) -> bool:
        """Whether `scaled_mm` is said to run there."""

    def is_native(self, device: torch.device) -> bool:
        """Whether `scaled_mm` runs there: on a GPU it is tried, once a process."""
        return self.is_promised(device) and (device.type != "cuda" or _runs(self.name, device))

    def multiply(
        self, x: Tensor, stored: Stored, bias: Tensor | None, dtype: torch.dtype, native: bool
    ) -> Tensor:
        """`x [M, K]` times the stored weight: `[M, N]` of `dtype`, natively or emulated."""
        bias = None if bias is None else bias.to(dtype)
        # Under autocast a CPU's scaled_mm would round its operands to bf16.
        with torch.autocast(x.device.type, enabled=False):
            if not native:
                return F.linear(self.rounded(x, dtype), self.values(stored, dtype), bias)
            if bias is None or dtype is not torch.float32:
                return self._product(x, stored, bias, dtype)
            return self._product(x, stored, None, dtype) + bias  # CUDA takes no bias with fp32 results

    def _product(self, x: Tensor, stored: Stored, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        if not self.opaque:
            return self.scaled_mm(x, stored, bias, dtype)
        result: Tensor = _scaled_mm_op(x, *stored, bias, dtype, self.name)
        return result


def merged(weight: Tensor, lora: Lora | None) -> Tensor:
    """The weight with its update, fp32; the weight itself where there is none."""
    if lora is None:
        return weight
    return torch.addmm(weight.float(), lora.b.float(), lora.a.float(), alpha=lora.scale)


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA device; (0, 0) for any other."""
    if device.type != "cuda" or torch.version.hip is not None:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


def _bytes(*shape: int, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8, device=device)


def _nothing(device: torch.device) -> Tensor:
    return _bytes(0, device=device)


@functools.cache
def _runs(name: str, device: torch.device) -> bool:
    """Whether one small product of a format comes out right: no capability tells which ones a cuBLAS lacks."""
    form, weight = FORMATS[name], torch.full((BLOCK, BLOCK), 0.5, device=device)
    x = torch.ones(BLOCK, BLOCK, dtype=torch.bfloat16, device=device)
    stored = form.empty(BLOCK, BLOCK, device)
    try:
        with torch.no_grad():
            form.write_(stored, weight)
            product = form.scaled_mm(x, stored, None, torch.bfloat16)
        return bool((product == BLOCK / 2).all())
    except RuntimeError:
        return False


class RowScales(Format):
    """FP8 with one scale a row of the weight and one a token."""

    name = "fp8_rows"
    multiples = (16, 16)
    scale_of_batch = False

    def empty(self, rows: int, columns: int, device: torch.device) -> Stored:
        """Codes `[N, K]`, scales `[N, 1]`."""
        return Stored(_bytes(rows, columns, device=device), _bytes(rows, 4, device=device), _nothing(device))

    def write_(self, out: Stored, weight: Tensor, lora: Lora | None = None) -> None:
        """One pass over the weight; the merged one is never stored."""
        rows = Fp8Rows(out.codes.view(FP8), out.scale.view(torch.float32))
        if lora is None:
            quantize_fp8_rows(weight, out=rows)
        else:
            merge_lora_quantize_(rows, weight, lora.a, lora.b, lora.scale)

    def values(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        """`codes * scale`."""
        return dequantize_fp8_rows(stored.codes.view(FP8), stored.scale.view(torch.float32), dtype)

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """By rows."""
        return dequantize_fp8_rows(*quantize_fp8_rows(x), dtype)

    def scaled_mm(self, x: Tensor, stored: Stored, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Row-wise."""
        codes, scale = quantize_fp8_rows(x)
        return F.scaled_mm(
            codes,
            stored.codes.view(FP8).t(),
            scale,
            ScalingType.RowWise,
            stored.scale.view(torch.float32).t(),
            ScalingType.RowWise,
            bias=bias,
            output_dtype=dtype,
            use_fast_accum=x.is_cuda,
        )

    def is_promised(self, device: torch.device) -> bool:
        """A CPU (exact, not fast), and compute capability 8.9 or above."""
        return device.type == "cpu" or capability(device) >= (8, 9)


def quantize_whole(x: Tensor) -> Fp8Rows:
    """FP8 with one scale `[1, 1]` for all of `x`.

    The bits of `quantize_fp8_rows` on one long row, which on a GPU would be the work of one block of threads.
    """
    # By a number on the host CUDA would multiply with its rounded reciprocal; the kernels divide.
    most = torch.full((), 448.0, device=x.device, dtype=torch.float32)
    scale = x.abs().amax().float().clamp(min=2.0**-100) / most
    return Fp8Rows((x.float() / scale).clamp(-448, 448).to(FP8), scale.view(1, 1))


def _dequantize_whole(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize_fp8_rows(codes, scale.expand(len(codes), 1).contiguous(), dtype)


class TensorScale(RowScales):
    """FP8 with one scale for a weight and one for all activations of a call."""

    name = "fp8_tensor"
    scale_of_batch = True

    def empty(self, rows: int, columns: int, device: torch.device) -> Stored:
        """Codes `[N, K]`, one scale."""
        return Stored(_bytes(rows, columns, device=device), _bytes(1, 4, device=device), _nothing(device))

    def write_(self, out: Stored, weight: Tensor, lora: Lora | None = None) -> None:
        """Through a copy."""
        codes, scale = quantize_whole(merged(weight, lora))
        out.codes.copy_(codes.view(torch.uint8))
        out.scale.view(torch.float32).copy_(scale)

    def values(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        """`codes * scale`."""
        return _dequantize_whole(stored.codes.view(FP8), stored.scale.view(torch.float32), dtype)

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """All with one scale."""
        return _dequantize_whole(*quantize_whole(x), dtype)

    def scaled_mm(self, x: Tensor, stored: Stored, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Tensor-wise."""
        codes, scale = quantize_whole(x)
        return F.scaled_mm(
            codes,
            stored.codes.view(FP8).t(),
            scale,
            ScalingType.TensorWise,
            stored.scale.view(torch.float32),
            ScalingType.TensorWise,
            bias=bias,
            output_dtype=dtype,
            use_fast_accum=x.is_cuda,
        )


class BlockScales(Format):
    """FP8 with a scale for 128 x 128 of a weight and for 128 values of a token. DeepSeek-V3, arXiv 2412.19437."""

    name = "fp8_blocks"
    multiples = (BLOCK, BLOCK)
    scale_of_batch = False
    opaque = True

    def empty(self, rows: int, columns: int, device: torch.device) -> Stored:
        """Codes `[N, K]`; scales `[N / 128, K / 128]`, columns padded to a multiple of 4 as cuBLASLt reads them."""
        padded = -(-columns // BLOCK // 4) * 4
        scale = _bytes(rows // BLOCK, 4 * padded, device=device)
        return Stored(_bytes(rows, columns, device=device), scale, _nothing(device))

    def write_(self, out: Stored, weight: Tensor, lora: Lora | None = None) -> None:
        """Through a copy in which each block is a row."""
        rows, columns = weight.shape[0] // BLOCK, weight.shape[1] // BLOCK
        blocks = merged(weight, lora).view(rows, BLOCK, columns, BLOCK).transpose(1, 2)
        codes, scale = quantize_fp8_rows(blocks.reshape(rows * columns, -1))
        tiles = codes.view(torch.uint8).view(rows, columns, BLOCK, BLOCK).transpose(1, 2)
        out.codes.view(rows, BLOCK, columns, BLOCK).copy_(tiles)
        out.scale.view(torch.float32)[:, :columns].copy_(scale.view(rows, columns))

    def values(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        """`codes * scale`."""
        rows, columns = (size // BLOCK for size in stored.codes.shape)
        codes = stored.codes.view(FP8).float().view(rows, BLOCK, columns, BLOCK)
        scale = stored.scale.view(torch.float32)[:, :columns]
        return (codes * scale[:, None, :, None]).view(stored.codes.shape).to(dtype)

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """By 128 values."""
        return dequantize_fp8_rows(*quantize_fp8_rows(x.view(-1, BLOCK)), dtype).view(x.shape)

    def scaled_mm(self, x: Tensor, stored: Stored, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """1 x 128 by 128 x 128, whose activation scales lie column after column.

        cuBLASLt has it with bf16 and fp32 results and without a bias: fp16 is rounded from bf16, a bias is added after.
        """
        num_rows = x.shape[0]
        if num_rows % 4:  # columns of scales start on 16 bytes
            x = F.pad(x, (0, 0, 0, -num_rows % 4))
        codes, scale = quantize_fp8_rows(x.view(-1, BLOCK))
        product = F.scaled_mm(
            codes.view(x.shape),
            stored.codes.view(FP8).t(),
            scale.view(len(x), -1).t().contiguous().t(),
            ScalingType.BlockWise1x128,
            stored.scale.view(torch.float32).t(),
            ScalingType.BlockWise128x128,
            output_dtype=torch.float32 if dtype is torch.float32 else torch.bfloat16,
        )
        product = product[:num_rows].to(dtype)
        return product if bias is None else product + bias

    def is_promised(self, device: torch.device) -> bool:
        """Hopper alone, with CUDA 12.9 or later."""
        version = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
        return capability(device)[0] == 9 and version >= (12, 9)


class FourBits(Format):
    """NVFP4: a scale for 16 values, and one for a weight or for all activations of a call."""

    name = "nvfp4"
    multiples = (16, 32)
    scale_of_batch = True
    opaque = True

    def empty(self, rows: int, columns: int, device: torch.device) -> Stored:
        """Codes `[N, K / 2]`, swizzled scales, one global scale."""
        scale = _bytes(-(-rows // 128) * 128, -(-columns // 64) * 4, device=device)
        return Stored(_bytes(rows, columns // 2, device=device), scale, _bytes(4, device=device))

    @staticmethod
    def _view(stored: Stored) -> Nvfp4:
        global_scale = stored.global_scale.view(torch.float32).view(())
        return Nvfp4(stored.codes.view(FP4), stored.scale.view(FP8), global_scale)

    def write_(self, out: Stored, weight: Tensor, lora: Lora | None = None) -> None:
        """The merged weight is never stored."""
        if lora is None:
            quantize_nvfp4(weight, out=self._view(out))
        else:
            merge_lora_quantize_(self._view(out), weight, lora.a, lora.b, lora.scale)

    def values(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        """`codes * (scale * global_scale)`."""
        return dequantize_nvfp4(*self._view(stored), dtype)

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """By 16 values."""
        return dequantize_nvfp4(*quantize_nvfp4(x), dtype)

    def scaled_mm(self, x: Tensor, stored: Stored, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """1 x 16 by 1 x 16, both with global scales."""
        mine, theirs = quantize_nvfp4(x), self._view(stored)
        recipe = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
        swizzle = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
        return F.scaled_mm(
            mine.codes,
            theirs.codes.t(),
            [mine.scales, mine.global_scale],
            recipe,
            [theirs.scales, theirs.global_scale],
            recipe,
            swizzle_a=swizzle,
            swizzle_b=swizzle,
            bias=bias,
            output_dtype=dtype,
        )

    def is_promised(self, device: torch.device) -> bool:
        """Blackwell: compute capability 10.0 or above."""
        return capability(device) >= (10, 0)


FORMATS: dict[str, Format] = {
    each.name: each for each in (RowScales(), TensorScale(), BlockScales(), FourBits())
}


def _scaled_mm(x: Tensor, *flat: Any) -> Tensor:
    *stored, bias, dtype, name = flat
    return FORMATS[name].scaled_mm(x, Stored(*stored), bias, dtype)


def _allocate(x: Tensor, codes: Tensor, *flat: Any) -> Tensor:
    return x.new_empty((len(x), len(codes)), dtype=flat[-2])


_scaled_mm_op = bind(
    "scaled_mm",
    "(Tensor x, Tensor codes, Tensor scale, Tensor global_scale, Tensor? bias, ScalarType dtype, str name) -> Tensor",
    _scaled_mm,
    _allocate,
)
SCALED_MM = torch.ops.flowgrpo_fast.scaled_mm.default
