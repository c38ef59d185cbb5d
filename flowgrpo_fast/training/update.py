"""Replay, loss, backward, optimiser."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowgrpo_fast.losses.clipped_ratio import LossTerms, clipped_ratio, drift_kl
from flowgrpo_fast.sampling.sampler import replay, row_slices
from flowgrpo_fast.training.engine import Engine
from flowgrpo_fast.training.mismatch import Mismatch
from flowgrpo_fast.types import TrainBatch


@dataclass(slots=True)
class _Tally:
    """Per-sample terms of one training step, kept on the device until its end."""

    terms: list[LossTerms] = field(default_factory=list)
    on_policy_ratio: list[Tensor] = field(default_factory=list)  # before the first optimiser step
    mismatch: Mismatch = field(default_factory=Mismatch)  # likewise
    grad_norm: list[Tensor] = field(default_factory=list)


def update(engine: Engine, batch: TrainBatch) -> dict[str, float]:
    """One pass of optimiser steps over the batch, each on its own share of the samples.

    Every trained step of a share is one forward and backward; gradients add up to one optimiser step.
    """
    recipe, tally = engine.recipe, _Tally()
    for share in row_slices(len(batch.advantages), recipe.rows_per_update):
        if not accumulate_share(engine, batch, share, tally):
            continue  # every group of it had equal rewards
        parameters = [p for group in engine.optimizer.param_groups for p in group["params"]]
        tally.grad_norm.append(torch.nn.utils.clip_grad_norm_(parameters, recipe.optimizer.max_grad_norm))
        engine.optimizer.step()
        engine.optimizer.zero_grad(set_to_none=True)
        _average(engine)
    return _metrics(tally, batch.trajectory.step_index)


def accumulate_share(engine: Engine, batch: TrainBatch, share: slice, tally: _Tally) -> bool:
    """Adds the gradient of one share's loss; False if nothing in it carries weight."""
    num_trained = batch.step_position.shape[1]
    total = batch.weight[share].sum() * num_trained
    micro_batches = [rows for rows in micro_batch_slices(engine, share) if bool(batch.weight[rows].any())]
    for turn in range(num_trained):
        for rows in micro_batches:
            terms = replay_terms(engine, batch, rows, turn)
            (terms.loss * batch.weight[rows]).sum().div(total).backward()
            tally.terms.append(terms)
            if not tally.grad_norm:
                tally.on_policy_ratio.append(terms.ratio)
                tally.mismatch.add(batch.step_position[rows, turn], terms.log_ratio)
    return bool(micro_batches)


def micro_batch_slices(engine: Engine, share: slice) -> list[slice]:
    """The rows of each forward of a share: those of the rollout, unless the recipe asks for others."""
    rows = engine.recipe.replay_rows or engine.recipe.rollout_rows
    return [
        slice(share.start + part.start, share.start + part.stop)
        for part in row_slices(share.stop - share.start, rows)
    ]


def replay_terms(engine: Engine, batch: TrainBatch, rows: slice, turn: int) -> LossTerms:
    """The loss of one micro-batch at each sample's `turn`-th trained step."""
    recipe, trajectory = engine.recipe, batch.trajectory
    index = torch.arange(rows.start, rows.stop, device=engine.device)
    conditioning = batch.conditioning.rows(index)
    position = batch.step_position[rows, turn]
    log_prob, drift = replay(engine.model, trajectory, conditioning, rows, position, recipe, engine.reference)
    old_log_prob = trajectory.log_prob[index, position]
    kl = None
    if drift is not None:
        step_index = trajectory.step_index.to(engine.device)[position]
        kl = drift_kl(drift, trajectory.coeffs, trajectory.sigmas.to(engine.device), step_index)
    return clipped_ratio(log_prob, old_log_prob, batch.advantages[rows], recipe.loss, kl)


def _average(engine: Engine) -> None:
    engine.num_updates += 1
    if engine.averaged is None or engine.num_updates % engine.recipe.optimizer.ema_every:
        return
    engine.averaged.average(engine.recipe.optimizer.ema_decay)


def _metrics(tally: _Tally, step_index: Tensor) -> dict[str, float]:
    """Means over all replayed transitions; the one place where the device is asked for numbers."""
    if not tally.terms:
        return {}
    ratio = torch.cat([terms.ratio for terms in tally.terms])
    values = {
        "loss": torch.cat([terms.loss.detach() for terms in tally.terms]).mean(),
        "policy_loss": torch.cat([terms.policy for terms in tally.terms]).mean(),
        "kl": torch.cat([terms.kl for terms in tally.terms]).mean(),
        "clip_fraction": torch.cat([terms.clipped for terms in tally.terms]).mean(),
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "first_ratio_error": (torch.cat(tally.on_policy_ratio) - 1).abs().max(),
        "grad_norm": torch.stack(tally.grad_norm).mean(),
        **tally.mismatch.values(step_index),
    }
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
