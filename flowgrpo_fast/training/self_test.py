"""The ratio self-test: before the first update, the replay must reproduce the rollout's log-probs."""

from __future__ import annotations

import torch

from flowgrpo_fast.training.learner import Counts, Learner, networks
from flowgrpo_fast.training.update import measured, micro_batches
from flowgrpo_fast.types import Batch


def ratio_self_test(learner: Learner, batch: Batch, limit: float = 0.0) -> float:
    """max |ratio - 1| over every transition the first update will train on, with the real model and batch.

    No weight has changed since the rollout, so the true ratio is 1. With the default geometry (the replay
    runs the rollout's micro-batches) the result is exactly 0 in fp32 and bf16; other micro-batches show what
    the model's own matrix products cost, since their rounding depends on the batch shape.

    Args:
        limit: what is accepted; 0 = the trust region's range.

    Raises:
        ValueError: above the limit, with the likely causes.
    """
    errors, objective = [], learner.objective
    batch = batch.without_unconditional()  # both halves, afresh
    for rows in learner.shares(batch):
        share = batch.of_samples(rows)
        evaluator = networks(learner, share, Counts())
        for _, point in micro_batches(learner, share, objective.points(share)):
            log_ratio = objective.log_ratio(measured(learner, point, evaluator))
            if log_ratio is not None:
                errors.append((torch.exp(log_ratio.detach()) - 1).abs().max())
    error = float(torch.stack(errors).max()) if errors else 0.0
    limit = limit or objective.ratio_range
    if not error <= limit:
        raise ValueError(
            f"ratio self-test: max |ratio - 1| is {error:.3g} before any update, above the limit {limit:.3g}; "
            f"the replay ({learner.replay_rows or learner.rows} rows per forward) does not reproduce "
            f"the rollout ({learner.rows}): set replay_rows=0, switch off dropout and "
            "non-deterministic kernels, or raise max_ratio_error if you accept the bias"
        )
    return error
