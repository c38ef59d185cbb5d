"""The ops in plain PyTorch: what the kernels must compute, in any dtype including float64, differentiable throughout.

The noise is an argument. Nothing here calls a kernel; tests and benchmarks compare against it.
"""

from __future__ import annotations

from flowgrpo_fast.ops.reference.flow import (
    flow_drift,
    flow_log_prob,
    flow_log_prob_map,
    flow_step,
    guided_velocity,
    transition_mean,
)
from flowgrpo_fast.ops.reference.group import (
    best_variance_subset,
    compact,
    group_advantages,
    pareto_fronts,
    top_bottom,
)
from flowgrpo_fast.ops.reference.matching import implicit_matching, matching
from flowgrpo_fast.ops.reference.philox import normal_of_words, philox4x32_10
from flowgrpo_fast.ops.reference.preview import centred_gram, preview
from flowgrpo_fast.ops.reference.quantize import (
    dequantize_fp8_rows,
    dequantize_nvfp4,
    merge_lora_quantize,
    quantize_fp8_rows,
    quantize_nvfp4,
)

__all__ = [
    "best_variance_subset",
    "centred_gram",
    "compact",
    "dequantize_fp8_rows",
    "dequantize_nvfp4",
    "flow_drift",
    "flow_log_prob",
    "flow_log_prob_map",
    "flow_step",
    "group_advantages",
    "guided_velocity",
    "implicit_matching",
    "matching",
    "merge_lora_quantize",
    "normal_of_words",
    "pareto_fronts",
    "philox4x32_10",
    "preview",
    "quantize_fp8_rows",
    "quantize_nvfp4",
    "top_bottom",
    "transition_mean",
]
