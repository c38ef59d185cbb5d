"""The kernels of RL post-training of flow models, on the CPU and on CUDA; usable alone.

- a sampler's transition, its replay, preview and noise: `flow_step`, `flow_log_prob`, `preview`, `philox_normal`; every
  dynamics is a table ``coeffs [T, 8]`` of rows ``(sigma, a, b, c, d, inv_var, log_norm, 0)``, see `flow_step`
- residuals of the forward process: `matching`, `implicit_matching`
- what is done within groups: `group_advantages`, `best_variance_subset`, `top_bottom`, `pareto_fronts`, `compact`
- eight and four bits a value: `quantize_fp8_rows`, `quantize_nvfp4`, their way back, `merge_lora_quantize_`

`flowgrpo_fast.ops.reference` holds the same mathematics in plain PyTorch. A bad argument is one ``ValueError`` line.
"""

from __future__ import annotations

from typing import Any

from flowgrpo_fast import _C
from flowgrpo_fast.ops._binding import Guidance
from flowgrpo_fast.ops.compact import compact
from flowgrpo_fast.ops.flow_log_prob import Extras, FlowLogProbOutput, flow_log_prob
from flowgrpo_fast.ops.flow_step import FlowStepOutput, flow_step
from flowgrpo_fast.ops.group_advantages import Clip, group_advantages
from flowgrpo_fast.ops.matching import ImplicitMatching, Matching, implicit_matching, matching
from flowgrpo_fast.ops.merge_lora import merge_lora_quantize_
from flowgrpo_fast.ops.philox import philox_normal, philox_uint32
from flowgrpo_fast.ops.preview import PreviewOutput, preview
from flowgrpo_fast.ops.quantize import (
    Fp8Rows,
    Nvfp4,
    dequantize_fp8_rows,
    dequantize_nvfp4,
    quantize_fp8_rows,
    quantize_nvfp4,
)
from flowgrpo_fast.ops.selection import best_variance_subset, pareto_fronts, top_bottom

__all__ = [
    "Clip",
    "Extras",
    "FlowLogProbOutput",
    "FlowStepOutput",
    "Fp8Rows",
    "Guidance",
    "ImplicitMatching",
    "Matching",
    "Nvfp4",
    "PreviewOutput",
    "best_variance_subset",
    "build_info",
    "compact",
    "dequantize_fp8_rows",
    "dequantize_nvfp4",
    "flow_log_prob",
    "flow_step",
    "group_advantages",
    "implicit_matching",
    "matching",
    "merge_lora_quantize_",
    "pareto_fronts",
    "philox_normal",
    "philox_uint32",
    "preview",
    "quantize_fp8_rows",
    "quantize_nvfp4",
    "top_bottom",
]


def build_info() -> dict[str, Any]:
    """What was built and what runs: version, compiler, nvcc, cuda_archs, isas, isa, dlpack, chunk."""
    return _C.build_info()
