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
from flowgrpo_fast.ops.reference.philox import (
    normal_of_words,
    philox4x32_10,
)
from flowgrpo_fast.ops.reference.preview import (
    centred_gram,
    preview,
)

__all__ = [
    "best_variance_subset",
    "centred_gram",
    "compact",
    "flow_drift",
    "flow_log_prob",
    "flow_log_prob_map",
    "flow_step",
    "group_advantages",
    "guided_velocity",
    "normal_of_words",
    "pareto_fronts",
    "philox4x32_10",
    "preview",
    "top_bottom",
    "transition_mean",
]
