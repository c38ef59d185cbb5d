"""A LoRA merged into a weight and quantised, in place: the refresh of a rollout copy in low precision."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from flowgrpo_fast.ops._binding import refuse_tangents, require_bool, require_number, require_tensor
from flowgrpo_fast.ops.quantize import FP4, FP8, Fp8Rows, Nvfp4, as_bytes, fp8_op, nvfp4_op

Quantized = TypeVar("Quantized", Fp8Rows, Nvfp4)


def merge_lora_quantize_(
    out: Quantized,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_scale: float = 1.0,
    global_scale: Tensor | None = None,
    swizzle: bool = True,
) -> Quantized:
    r"""Writes ``weight + lora_scale * (lora_b @ lora_a)``, quantised, into the tensors of `out`.

    The bits are those of `quantize_fp8_rows` or `quantize_nvfp4` on the merged weight in float32, whose products are
    rounded and added in order of the rank's index (no tensor cores: every device gives the same codes). The merged
    weight itself is never stored. Merge from the master weight each time, never onto an earlier merge. To quantise a
    weight without a LoRA in place, pass `out` to those two.

    An update much smaller than a step between codes mostly vanishes in them: this serves copies whose samples are
    ranked, not ones whose log-probabilities are compared with the trained weight's.

    Args:
        out: ``Fp8Rows`` or ``Nvfp4`` as the quantising op returned it; same pointers afterwards (CUDA graphs).
        weight: ``[N, K]`` master weight; float32, bfloat16 or float16.
        lora_a: ``[r, K]``, rank at most 256; any of these.
        lora_b: ``[N, r]``; any of these.
        lora_scale: alpha / r, or alpha / sqrt(r).
        global_scale: NVFP4 only: 0-d float32, for a scale known before; None merges twice to find it and writes it to
            ``out.global_scale``.
        swizzle: NVFP4 only: the layout of the scales.

    Returns:
        `out`, with the given global scale if there is one.

    Raises:
        ValueError: wrong shape, dtype, device or layout.
    """
    op = "merge_lora_quantize_"
    require_bool(op, "swizzle", swizzle)
    for argument, tensor in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        require_tensor(op, argument, tensor)
    if weight.ndim != 2:
        raise ValueError(f"{op}: weight has {weight.ndim} dimension(s), must be [rows, columns]")
    refuse_tangents(op, (weight, lora_a, lora_b))
    scale = require_number(op, "lora_scale", lora_scale)
    matrix = (weight.detach(), lora_a.detach(), lora_b.detach(), scale)
    if isinstance(out, Fp8Rows):
        if global_scale is not None:
            raise ValueError(f"{op}: global_scale is given, must be None for out of Fp8Rows")
        fp8_op(*matrix, as_bytes(op, "out.codes", out.codes, FP8), out.scale)
        return out
    if not isinstance(out, Nvfp4):
        raise ValueError(f"{op}: out is a {type(out).__name__}, must be Fp8Rows or Nvfp4")
    codes, scales = as_bytes(op, "out.codes", out.codes, FP4), as_bytes(op, "out.scales", out.scales, FP8)
    target = out.global_scale if global_scale is None else None
    nvfp4_op(*matrix, codes, scales, target, global_scale, swizzle)
    return out if global_scale is None else out._replace(global_scale=global_scale)
