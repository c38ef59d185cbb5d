"""Replay or noise again, loss, backward, optimiser."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from flowgrpo_fast.losses.clipped_ratio import LossTerms, clipped_ratio, drift_kl
from flowgrpo_fast.losses.nft import NFTTerms, forward_process, nft, old_decay, optimality
from flowgrpo_fast.recipe import NFT, ClippedRatio
from flowgrpo_fast.sampling.sampler import replay
from flowgrpo_fast.sampling.step import halves, predict, row_slices
from flowgrpo_fast.training.engine import Engine
from flowgrpo_fast.training.mismatch import Mismatch
from flowgrpo_fast.types import FlowModel, TrainBatch, at_step


@dataclass(slots=True)
class _Tally:
    """Per-sample terms of one training step, kept on the device until its end."""

    terms: list[LossTerms | NFTTerms] = field(default_factory=list)
    on_policy_ratio: list[Tensor] = field(default_factory=list)  # before the first optimiser step
    mismatch: Mismatch = field(default_factory=Mismatch)  # likewise
    grad_norm: list[Tensor] = field(default_factory=list)
    backwards: int = 0  # rows that went back through the network
    evaluations: int = 0  # rows that went through one


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
        # What the rollout kept of guidance is of the weights before.
        batch = replace(batch, trajectory=replace(batch.trajectory, unconditional=None))
    if isinstance(recipe.loss, NFT):
        assert engine.old is not None
        engine.old.average(old_decay(recipe.loss, engine.step + 1))
    return _metrics(tally, batch.trajectory.step_index) | _spent(batch, tally)


def accumulate_share(engine: Engine, batch: TrainBatch, share: slice, tally: _Tally) -> bool:
    """Adds the gradient of one share's loss; False if nothing in it carries weight.

    What carries weight is known on the host since the rewards were read: nothing here waits for the device.
    """
    num_trained = batch.step_position.shape[1]
    total = batch.weight[share].sum() * num_trained
    for turn in range(num_trained):
        size = samples_per_row(engine, batch, turn)
        for rows in micro_batch_slices(engine, share, size):
            if not _any_live(batch, rows):
                continue
            terms = loss_terms(engine, batch, rows, turn)
            (terms.loss * batch.weight[rows]).sum().div(total).backward()
            tally.terms.append(terms)
            tally.backwards += (rows.stop - rows.start) // size
            tally.evaluations += (rows.stop - rows.start) // size * _forwards(engine, batch)
            if isinstance(terms, LossTerms) and not tally.grad_norm:
                tally.on_policy_ratio.append(terms.ratio)
                tally.mismatch.add(batch.step_position[rows, turn], terms.log_ratio)
    return _any_live(batch, share)


def _any_live(batch: TrainBatch, rows: slice) -> bool:
    return any(batch.live[rows]) if batch.live else True


def samples_per_row(engine: Engine, batch: TrainBatch, turn: int) -> int:
    """How many samples one row of the network serves at a turn: a group, where its first latents are the same."""
    return engine.recipe.group_size if turn == 0 and batch.trajectory.shares_first else 1


def micro_batch_slices(engine: Engine, share: slice, size: int = 1) -> list[slice]:
    """The samples of each forward of a share: those of the rollout, unless the recipe asks for others."""
    recipe = engine.recipe
    rows = recipe.replay_rows or recipe.rollout_rows
    num_samples = rows if size == 1 else recipe.prompts_per_forward(rows) * size
    return [
        slice(share.start + part.start, share.start + part.stop)
        for part in row_slices(share.stop - share.start, num_samples)
    ]


def loss_terms(engine: Engine, batch: TrainBatch, rows: slice, turn: int) -> LossTerms | NFTTerms:
    """The loss of one micro-batch at each sample's `turn`-th trained step."""
    match engine.recipe.loss:
        case ClippedRatio():
            return replay_terms(engine, batch, rows, turn)
        case NFT():
            return noised_terms(engine, batch, rows, turn)


def replay_terms(engine: Engine, batch: TrainBatch, rows: slice, turn: int) -> LossTerms:
    """Stored transitions, scored again."""
    recipe, trajectory = engine.recipe, batch.trajectory
    assert isinstance(recipe.loss, ClippedRatio)
    index = torch.arange(rows.start, rows.stop, device=engine.device)
    position = batch.step_position[rows, turn]
    size = samples_per_row(engine, batch, turn)
    log_prob, drift = replay(
        _at_turn(engine.model, batch, turn),
        trajectory,
        batch.conditioning.rows(rows),
        rows,
        position,
        recipe,
        None if engine.reference is None else _at_turn(engine.reference, batch, turn),
        size,
    )
    old_log_prob = trajectory.log_prob[index, position]
    kl = None
    if drift is not None:
        step_index = trajectory.step_index.to(engine.device, non_blocking=True)[position]
        sigmas = trajectory.sigmas.to(engine.device, non_blocking=True)
        kl = drift_kl(drift, trajectory.coeffs, sigmas, step_index)
    return clipped_ratio(log_prob, old_log_prob, batch.advantages[rows], recipe.loss, kl)


def _at_turn(model: FlowModel, batch: TrainBatch, turn: int) -> FlowModel:
    """What of the model runs where all samples replay the same step; all of it where each has its own."""
    trajectory = batch.trajectory
    if batch.step_position.shape[1] < len(trajectory.step_index):
        return model
    return at_step(model, trajectory.sigmas, trajectory.step_index[turn])


def noised_terms(engine: Engine, batch: TrainBatch, rows: slice, turn: int) -> NFTTerms:
    """Finished samples, noised to one of the schedule's sigmas each."""
    recipe, trajectory = engine.recipe, batch.trajectory
    assert isinstance(recipe.loss, NFT)
    assert engine.old is not None
    step = batch.step_position[rows, turn].contiguous()
    sigma = trajectory.coeffs[step, 0]
    latents, target = forward_process(trajectory.x0[rows], trajectory.draws.seed[rows], sigma, step)

    def velocity(model: FlowModel) -> Tensor:
        return predict(model, latents, sigma, batch.conditioning.rows(rows), recipe)[0]

    with torch.no_grad():
        old = velocity(engine.old)
        reference = None if engine.reference is None else velocity(engine.reference)
    clip = recipe.credit.clip
    good = optimality(batch.advantages[rows], clip)
    return nft(velocity(engine.model), old, target, sigma, good, recipe.loss, clip, reference)


def _average(engine: Engine) -> None:
    engine.num_updates += 1
    if engine.averaged is not None and engine.num_updates % engine.recipe.optimizer.ema_every == 0:
        engine.averaged.average(engine.recipe.optimizer.ema_decay)


def _forwards(engine: Engine, batch: TrainBatch) -> int:
    """Forwards of a row: both halves of guidance under every model, save the half that the rollout has left."""
    models = 1 + (engine.old is not None) + (engine.reference is not None)
    return models * halves(engine.recipe) - (batch.trajectory.unconditional is not None)


def _spent(batch: TrainBatch, tally: _Tally) -> dict[str, float]:
    """Rows times forwards through the network, of the rollout and the update; scouts are added by the loop."""
    evaluations = batch.trajectory.evaluations + tally.evaluations
    return {"network_evaluations": float(evaluations), "network_backwards": float(tally.backwards)}


def _metrics(tally: _Tally, step_index: Tensor) -> dict[str, float]:
    """Means over all trained samples and steps; the one place where the device is asked for numbers."""
    if not tally.terms:
        return {}
    means = {
        f.name: torch.cat([getattr(terms, f.name).detach() for terms in tally.terms]).mean()
        for f in fields(tally.terms[0])
        if f.name != "log_ratio"
    }
    values = {_SHOWN.get(name, name): mean for name, mean in means.items()}
    values["grad_norm"] = torch.stack(tally.grad_norm).mean()
    if tally.on_policy_ratio:
        values["ratio_max"] = torch.stack(
            [t.ratio.max() for t in tally.terms if isinstance(t, LossTerms)]
        ).max()
        values["first_ratio_error"] = (torch.cat(tally.on_policy_ratio) - 1).abs().max()
    values |= tally.mismatch.values(step_index)
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


# Field of the terms -> name of the metric, where they differ.
_SHOWN = {
    "policy": "policy_loss",
    "clipped": "clip_fraction",
    "ratio": "ratio_mean",
    "positive": "positive_loss",
    "negative": "negative_loss",
}
