"""The ratio self-test: before the first update, the replay must reproduce the rollout's log-probs."""

from __future__ import annotations

from dataclasses import replace

import torch

from flowgrpo_fast.recipe import ClippedRatio
from flowgrpo_fast.sampling.step import row_slices
from flowgrpo_fast.training.engine import Engine
from flowgrpo_fast.training.update import micro_batch_slices, replay_terms, samples_per_row
from flowgrpo_fast.types import TrainBatch


def ratio_self_test(engine: Engine, batch: TrainBatch) -> float:
    """max |ratio - 1| over every transition the first update will train on, with the real model and batch.

    No weight has changed since the rollout, so the true ratio is 1. With the default geometry (the replay
    runs the rollout's micro-batches) the result is exactly 0 in fp32 and bf16; other micro-batches show what
    the model's own matrix products cost, since their rounding depends on the batch shape.

    Raises:
        ValueError: above `recipe.max_ratio_error` (0: the loss's clip range), with the likely causes.
    """
    recipe = engine.recipe
    assert isinstance(recipe.loss, ClippedRatio)
    errors = []
    batch = replace(batch, trajectory=replace(batch.trajectory, unconditional=None))  # both halves, afresh
    for share in row_slices(len(batch.advantages), recipe.rows_per_update):
        for turn in range(batch.step_position.shape[1]):
            for rows in micro_batch_slices(engine, share, samples_per_row(engine, batch, turn)):
                terms = replay_terms(engine, batch, rows, turn)
                errors.append((terms.ratio - 1).abs().max())
    error = float(torch.stack(errors).max())
    limit = recipe.max_ratio_error or recipe.loss.clip_range
    if not error <= limit:
        raise ValueError(
            f"ratio self-test: max |ratio - 1| is {error:.3g} before any update, above the limit {limit:.3g}; "
            f"the replay ({recipe.replay_rows or recipe.rollout_rows} rows per forward) does not reproduce "
            f"the rollout ({recipe.rollout_rows}): set replay_rows=0, switch off dropout and "
            "non-deterministic kernels, or raise max_ratio_error if you accept the bias"
        )
    return error
