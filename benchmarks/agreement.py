"""That both loops compute the same: one rollout and one gradient of each, from the same weights, noise and rewards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import trainer_loop
from benchmarks.trainer_loop import Randn, drawn, kept_steps
from flowgrpo_fast.ops import philox_normal
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.sampling.step import row_slices
from flowgrpo_fast.sampling.walk import START_NOISE_STREAM
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.training.engine import Engine, build_engine
from flowgrpo_fast.training.loop import make_batch
from flowgrpo_fast.training.update import Tally, accumulate
from flowgrpo_fast.types import Draws

_NUDGE = 0.02  # of the adapters: fresh ones are 0, and so would be the KL and half of the gradient


def agreement(recipe: Recipe, device: torch.device) -> dict[str, float]:
    """The largest differences between this engine and the loop trainers write, in fp32, and their gradients' cosine.

    Latents and gradients are compared relative to their norm. The noise of our rollout is given to the other loop.
    """
    recipe = replace(
        recipe,
        machine=replace(recipe.machine, precision="fp32"),
        network=replace(recipe.network, compile=False),
    )
    ours, theirs = (_nudged(build_engine(recipe, device)) for _ in range(2))
    plan = recipe.plan(0, ours.seq_len)
    draws = drawn(recipe, len(ours.prompts), 0, device)
    conditioning = ours.stage.conditioning.rows(draws.prompt_index[draws.group_id])
    scored = recipe.experience.collect(ours.stage, draws, 0).scored()
    batch, trajectory, rewards = make_batch(ours, scored), scored.samples, scored.scores.total
    shares = batch.shares(recipe.optimizer.num_updates)
    for share in shares:
        accumulate(ours.learner, batch.of_samples(share), Tally())

    randn = recorded_noise(draws, plan, recipe, ours.model.latent_shape)
    step = trainer_loop.eager_step(plan, recipe, device, randn)
    trainer = trainer_loop.Trainer(theirs)
    samples = trainer_loop.rollout(theirs.model, conditioning, draws, plan, recipe, step, randn)
    prompts = [theirs.prompts.prompts[i] for i in draws.prompt_index[draws.group_id].tolist()]
    advantages = trainer_loop.advantages_of(rewards, prompts, recipe)
    for share in shares:
        trainer.accumulate(samples, conditioning, advantages, share, step)
    next_latents, log_prob = (
        torch.stack([getattr(transition, name) for transition in trajectory.transitions], 1)
        for name in ("next_latents", "log_prob")
    )
    gradients = [_gradient(engine) for engine in (theirs, ours)]
    return {
        "latents": _distance(samples.next_latents, next_latents),
        "finished": _distance(samples.x0, trajectory.x0),
        "log_prob": float((samples.log_probs - log_prob).abs().max()),
        "advantages": float((advantages - batch.credit.advantages).abs().max()),
        "gradient": _distance(*gradients),
        "gradient_cosine": float(torch.cosine_similarity(*(g.double() for g in gradients), dim=0)),
        "gradient_norm": float(gradients[1].norm()),
    }


def recorded_noise(draws: Draws, plan: Plan, recipe: Recipe, shape: tuple[int, ...]) -> Randn:
    """Our rollout's noise in the order in which the other loop asks for it."""

    def noises() -> Iterator[Tensor]:
        for rows in row_slices(len(draws.seed), recipe.rollout_rows):
            start, group = draws.start_seed[rows], draws.group_id[rows]
            if recipe.topology.shares_start:  # one a group
                start = torch.stack([start[group == number][0] for number in group.unique()])
            yield philox_normal(start, shape, stream=START_NOISE_STREAM)
            for step in kept_steps(plan):
                yield philox_normal(draws.seed[rows], shape, step)

    waiting = noises()
    return lambda *_, **__: next(waiting)


def _nudged(engine: Engine) -> Engine:
    generator = torch.Generator().manual_seed(4)
    for parameter in engine.learner.parameters:
        parameter.data += _NUDGE * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    return engine


def _gradient(engine: Engine) -> Tensor:
    return torch.cat([p.grad.flatten() for p in engine.learner.parameters])


def _distance(other: Tensor, own: Tensor) -> float:
    return float((other - own).norm() / own.norm())
