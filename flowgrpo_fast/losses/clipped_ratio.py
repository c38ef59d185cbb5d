"""PPO's clipped importance ratio on a transition's mean log-prob, and Flow-GRPO's KL to a reference.

    ratio  = exp(log_prob - old_log_prob)
    policy = max(-A * ratio, -A * clip(ratio, 1 - clip_range, 1 + clip_range))
    kl     = drift / (2 * rate^2)                      drift = mean((mean - ref_mean)^2), from `flow_log_prob`

PPO: arXiv 1707.06347 eq. 7; KL: arXiv 2505.05470. `rate` is the SDE's diffusion rate *without* sqrt(-dt): the
authors' heuristic, not the exact Gaussian KL (which would divide by rate^2 * -dt).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowgrpo_fast.recipe import ClippedRatio


@dataclass(frozen=True, slots=True)
class LossTerms:
    """Per-sample terms `[R]`; the caller weighs and averages."""

    loss: Tensor  # with gradient
    policy: Tensor
    kl: Tensor
    ratio: Tensor  # detached
    log_ratio: Tensor  # detached
    clipped: Tensor  # 1 where the clip is active


def clipped_ratio(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, part: ClippedRatio, kl: Tensor | None = None
) -> LossTerms:
    """The loss of R replayed transitions.

    All inputs are `[R]` fp32; gradient flows through `log_prob` and `kl`.
    """
    log_ratio = log_prob - old_log_prob
    ratio = torch.exp(log_ratio)
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - part.clip_range, 1 + part.clip_range)
    policy = torch.maximum(plain, bounded)
    loss = policy if kl is None else policy + part.kl_beta * kl
    return LossTerms(
        loss=loss,
        policy=policy.detach(),
        kl=torch.zeros_like(ratio).detach() if kl is None else kl.detach(),
        ratio=ratio.detach(),
        log_ratio=log_ratio.detach(),
        clipped=(bounded > plain).float().detach(),
    )


def drift_kl(drift: Tensor, coeffs: Tensor, sigmas: Tensor, step_index: Tensor) -> Tensor:
    """Flow-GRPO's KL between two policies' transitions from the same latents, `[R]` fp32.

    The rate comes back from the table: rate^2 = c^2 / -dt.

    Args:
        drift: `[R]`, the mean square distance between the two means; gradient flows through it.
        coeffs: `[T, 8]`; sigmas: `[T+1]`, both on the drift's device.
        step_index: `[R]` int64.
    """
    minus_dt = sigmas[step_index] - sigmas[step_index + 1]
    return drift * minus_dt / (2 * coeffs[step_index, 3].square())
