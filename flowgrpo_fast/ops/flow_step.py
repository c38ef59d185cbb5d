"""One step of a flow sampler: next latents, log-probability and optionally the clean-sample estimate."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowgrpo_fast import _C
from flowgrpo_fast.ops._binding import (
    TRANSITION_SCHEMA,
    Guidance,
    Transition,
    bind,
    empty_like,
    filled,
    per_sample,
    real_dtype,
    require_bool,
    require_tensor,
    split_flat,
    split_guidance,
    split_step,
    workspace,
)

CHUNK: int = _C.build_info()["chunk"]  # elements per partial sum


class FlowStepOutput(NamedTuple):
    """What `flow_step` returns."""

    next_latents: Tensor  # [B, *S], dtype of latents
    log_prob: Tensor  # [B], float32 (float64 for float64 latents)
    x0_pred: Tensor | None  # [B, *S], float32 (float64 for float64 latents)


def _allocate(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    latents, return_x0_pred = flat[0], flat[-1]
    real = real_dtype(latents)
    return (
        empty_like(latents),
        per_sample(latents, real),
        empty_like(latents, real) if return_x0_pred else torch.empty(0, dtype=real, device=latents.device),
    )


def _fill(outputs: tuple[Tensor, Tensor, Tensor], *flat: Any) -> None:
    transition, (seed, return_x0_pred) = split_flat(flat)
    next_latents, log_prob, x0_pred = outputs
    written = (
        next_latents,
        log_prob,
        x0_pred if return_x0_pred else None,
        workspace(transition.latents, CHUNK),
    )
    _C.flow_step(transition, seed, written, torch.get_num_threads())


_op = bind(
    "flow_step",
    f"({TRANSITION_SCHEMA}, Tensor seed, bool return_x0_pred) -> (Tensor, Tensor, Tensor)",
    filled("flow_step", _allocate, _fill),
    _allocate,
)


def flow_step(
    latents: Tensor,
    velocity: Tensor,
    coeffs: Tensor,
    step_index: int | Tensor,
    seed: Tensor,
    guidance: Guidance | None = None,
    x0_prev: Tensor | None = None,
    return_x0_pred: bool = False,
) -> FlowStepOutput:
    r"""One transition of a flow sampler, with seeded noise, in one pass over the latents.

    With ``sigma, a, b, c, d, inv_var, log_norm = coeffs[step_index]`` and ``v = velocity``, or under guidance
    ``v = negative + scale * (velocity - negative)``::

        mean         = a * latents + b * v + d * x0_prev
        next_latents = round_to_storage(mean + c * noise(seed, step_index, element))
        log_prob     = -1/2 * inv_var * mean_over_elements((next_latents - mean)^2) + log_norm
        x0_pred      = latents - sigma * v

    Arithmetic is float32 whatever the storage (float64 if all tensors are float64). The log-probability is that of the
    stored value, so `flow_log_prob` on the same tensors returns the same bits. Noise is `philox_normal` of stream 0 at
    step `step_index`. A sample's results are the same bits alone, in any batch, with any number of threads.

    If any element of a sample's mean is NaN or infinite, its log-probability is not finite, whatever the row.

    The row covers Flow-SDE (Flow-GRPO, arXiv:2505.05470), Dance-SDE (DanceGRPO, arXiv:2505.07818),
    coefficient-preserving sampling (arXiv:2509.05952), Euler and DPM-Solver++ 2M (arXiv:2211.01095). Not
    differentiable: no gradient flows from any output; replay with `flow_log_prob` for gradients.

    Args:
        latents: ``[B, *S]``; float32, bfloat16, float16 or float64.
        velocity: ``[B, *S]``; any of these (float64 only together with float64 latents).
        coeffs: ``[T, 8]`` float32, rows ``(sigma, a, b, c, d, inv_var, log_norm, 0)``.
        step_index: row of the table; an int, or an int64 tensor, 0-d or ``[B]``.
        seed: ``[B]`` int64, one a sample.
        guidance: negative velocity (dtype of `velocity`) and scale.
        x0_prev: ``[B, *S]`` float32 (float64 for float64 latents), the previous `x0_pred`.
        return_x0_pred: whether to compute `x0_pred`.

    Returns:
        ``next_latents`` in the dtype of `latents`; ``log_prob`` ``[B]`` and ``x0_pred`` ``[B, *S]`` (or None) in
        float32 (float64 for float64 latents).

    Raises:
        ValueError: wrong shape, dtype, device, layout or step. (A step outside the table in a CUDA tensor, which
            nobody on the host reads, gives NaN instead.)
    """
    require_tensor("flow_step", "latents", latents)
    require_bool("flow_step", "return_x0_pred", return_x0_pred)
    transition = Transition(
        latents,
        velocity,
        coeffs,
        *split_step("flow_step", "step_index", step_index),
        *split_guidance("flow_step", guidance),
        x0_prev,
    )
    next_latents, log_prob, x0_pred = _op(*transition, seed, return_x0_pred)
    return FlowStepOutput(next_latents, log_prob, x0_pred if return_x0_pred else None)
