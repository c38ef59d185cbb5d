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
from flowgrpo_fast.ops.reference.philox import normal_of_words, philox4x32_10
from flowgrpo_fast.ops.reference.preview import centred_gram, preview

__all__ = [
    "centred_gram",
    "flow_drift",
    "flow_log_prob",
    "flow_log_prob_map",
    "flow_step",
    "guided_velocity",
    "normal_of_words",
    "philox4x32_10",
    "preview",
    "transition_mean",
]
