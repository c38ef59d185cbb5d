"""Rollout and training step as published trainers write them: a look-up per sample, one PyTorch op after another.

The same model, recipe, draws' prompts, steps trained, micro-batches and optimiser as ours; only the way differs. Noise
comes from torch's generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flowgrpo_fast.ops import reference
from flowgrpo_fast.recipe import FlowSDE, Recipe
from flowgrpo_fast.sampling.schedule import Schedule, resolve_schedule
from flowgrpo_fast.sampling.step import row_slices
from flowgrpo_fast.training.draws import draw
from flowgrpo_fast.training.engine import Engine
from flowgrpo_fast.training.score import score_images
from flowgrpo_fast.types import Conditioning, Draws, FlowModel

# (latents, velocity, timestep [B], the stored next latents or None) -> next latents, log-prob [B]
Step = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
MakeStep = Callable[[Schedule, Recipe, torch.device], Step]


def eager_step(schedule: Schedule, recipe: Recipe, device: torch.device) -> Step:
    """Flow-SDE op by op, with the schedule looked up by timestep for each sample."""
    assert isinstance(recipe.dynamics, FlowSDE)
    noise_level = recipe.dynamics.noise_level
    sigmas, timesteps = schedule.sigmas.to(device), 1000 * schedule.sigmas[:-1].to(device)

    def step(
        latents: Tensor, velocity: Tensor, timestep: Tensor, following: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        velocity, sample = velocity.float(), latents.float()
        index = [int((timesteps == t).nonzero()[0].item()) for t in timestep]
        shape = (-1, *[1] * (sample.ndim - 1))
        sigma = sigmas[index].view(shape)
        dt = sigmas[[i + 1 for i in index]].view(shape) - sigma
        spared = torch.where(sigma == 1, sigmas[1].item(), sigma)
        rate = torch.sqrt(sigma / (1 - spared)) * noise_level
        mean = sample * (1 + rate**2 / (2 * sigma) * dt)
        mean = mean + velocity * (1 + rate**2 * (1 - sigma) / (2 * sigma)) * dt
        spread = rate * torch.sqrt(-1 * dt)
        if following is None:
            following = mean + spread * torch.randn(mean.shape, device=mean.device)
        log_prob = (
            -((following.detach().float() - mean) ** 2) / (2 * spread**2)
            - torch.log(spread)
            - math.log(math.sqrt(2 * math.pi))
        )
        return following.to(latents.dtype), log_prob.mean(dim=tuple(range(1, log_prob.ndim)))

    return step


def compiled_step(schedule: Schedule, recipe: Recipe, device: torch.device) -> Step:
    """torch.compile of the reference over the coefficient table, noise from torch's generator."""
    coeffs, timesteps = schedule.coeffs.to(device), 1000 * schedule.sigmas[:-1].to(device)

    @torch.compile(dynamic=False)
    def sampled(latents: Tensor, velocity: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn(latents.shape, device=latents.device)
        return reference.flow_step(latents, velocity, coeffs, index, noise)[:2]

    @torch.compile(dynamic=False)
    def replayed(latents: Tensor, velocity: Tensor, following: Tensor, index: Tensor) -> Tensor:
        return reference.flow_log_prob(latents, velocity, following, coeffs, index)[0]

    def step(
        latents: Tensor, velocity: Tensor, timestep: Tensor, following: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        index = (timesteps == timestep[:, None]).int().argmax(1)
        if following is None:
            return sampled(latents, velocity, index)
        return following, replayed(latents, velocity, following, index)

    return step


@dataclass
class Samples:
    """What a trainer keeps of its rollout."""

    latents: Tensor  # [B, K, *S]
    next_latents: Tensor  # [B, K, *S]
    log_probs: Tensor  # [B, K]
    timesteps: Tensor  # [B, K]
    x0: Tensor  # [B, *S]


@torch.no_grad()
def rollout(
    model: FlowModel, conditioning: Conditioning, draws: Draws, schedule: Schedule, recipe: Recipe, step: Step
) -> Samples:
    """Walks every micro-batch through all steps: stochastic ones through `step`, Euler elsewhere."""
    device, parts = draws.seed.device, []
    timesteps = 1000 * schedule.sigmas[:-1].to(device)
    for rows in row_slices(len(draws.seed), recipe.rollout_rows):
        part = conditioning.rows(torch.arange(rows.start, rows.stop, device=device))
        latents = start_noise(model, draws.group_id[rows], recipe)
        before, after, log_probs, kept = [], [], [], []
        for i, t in enumerate(timesteps):
            timestep = t.expand(latents.shape[0])
            velocity = model.velocity(latents, timestep / 1000, part)
            if i in schedule.kept:
                before.append(latents)
                latents, log_prob = step(latents, velocity, timestep, None)
                after.append(latents)
                log_probs.append(log_prob)
                kept.append(timestep)
            else:
                dt = schedule.sigmas[i + 1] - schedule.sigmas[i]
                latents = (latents.float() + dt * velocity.float()).to(latents.dtype)
        stacked = (torch.stack(values, dim=1) for values in (before, after, log_probs, kept))
        parts.append((*stacked, latents))
    return Samples(*(torch.cat(values) for values in zip(*parts, strict=True)))


def start_noise(model: FlowModel, group_id: Tensor, recipe: Recipe) -> Tensor:
    """From torch's generator; one a group where the recipe shares it."""
    if not recipe.share_start_noise:
        return torch.randn(len(group_id), *model.latent_shape, device=group_id.device)
    first = int(group_id[0])
    noise = torch.randn(int(group_id[-1]) + 1 - first, *model.latent_shape, device=group_id.device)
    return noise[group_id - first]


def advantages_of(rewards: Tensor, prompts: list[str], recipe: Recipe) -> Tensor:
    """z-scores per prompt, on the host in numpy."""
    values, names = rewards.cpu().numpy().astype(np.float64), np.array(prompts)
    advantages = np.empty_like(values)
    for prompt in np.unique(names):
        group = values[names == prompt]
        advantages[names == prompt] = (group - group.mean()) / (group.std() + recipe.credit.eps)
    clipped = np.clip(advantages, -recipe.credit.clip, recipe.credit.clip)
    return torch.as_tensor(clipped, dtype=torch.float32, device=rewards.device)


@dataclass
class Trainer:
    """A trainer on an engine of its own; `step()` is one training step."""

    engine: Engine
    make_step: MakeStep = eager_step
    info: dict[str, list[Tensor]] = field(default_factory=dict)

    def step(self) -> dict[str, float]:
        """Rollout, rewards, credit, update; returns the step's means."""
        engine, recipe = self.engine, self.engine.recipe
        draws = draw(recipe, len(engine.prompts), engine.step, engine.device)
        schedule = resolve_schedule(recipe, engine.step, engine.seq_len)
        conditioning = engine.conditioning.rows(draws.prompt_index[draws.group_id])
        step = self.make_step(schedule, recipe, engine.device)
        samples = rollout(engine.model, conditioning, draws, schedule, recipe, step)
        with torch.no_grad():
            images = engine.model.decode(samples.x0)
        prompts = [engine.prompts[i] for i in draws.prompt_index[draws.group_id].tolist()]
        rewards = score_images(engine, images, prompts).total
        advantages = advantages_of(rewards, prompts, recipe)
        self.info = {"loss": [], "ratio": [], "clip_fraction": []}
        for share in row_slices(len(advantages), recipe.rows_per_update):
            self.update(samples, conditioning, advantages, share, step)
        engine.step += 1
        return {name: torch.stack(values).mean().item() for name, values in self.info.items()} | {
            "reward": rewards.mean().item()
        }

    def update(
        self, samples: Samples, conditioning: Conditioning, advantages: Tensor, share: slice, step: Step
    ) -> None:
        """One optimiser step: every kept step of the share, each a forward and a backward."""
        engine, recipe = self.engine, self.engine.recipe
        num_kept = samples.timesteps.shape[1]
        accumulated = num_kept * (share.stop - share.start) // recipe.rollout_rows
        for j in range(num_kept):
            for part in row_slices(share.stop - share.start, recipe.rollout_rows):
                rows = slice(share.start + part.start, share.start + part.stop)
                loss = self.loss(samples, conditioning, advantages, (rows, j), step)
                (loss / accumulated).backward()
        parameters = [p for group in engine.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, recipe.optimizer.max_grad_norm)
        engine.optimizer.step()
        engine.optimizer.zero_grad()

    def loss(
        self,
        samples: Samples,
        conditioning: Conditioning,
        advantages: Tensor,
        where: tuple[slice, int],
        step: Step,
    ) -> Tensor:
        """PPO's clipped ratio of one micro-batch at one step."""
        (rows, j), engine = where, self.engine
        clip_range = engine.recipe.loss.clip_range
        index = torch.arange(rows.start, rows.stop, device=engine.device)
        timestep, latents = samples.timesteps[rows, j], samples.latents[rows, j]
        velocity = engine.model.velocity(latents, timestep / 1000, conditioning.rows(index))
        _, log_prob = step(latents, velocity, timestep, samples.next_latents[rows, j])
        ratio = torch.exp(log_prob - samples.log_probs[rows, j])
        unclipped = -advantages[rows] * ratio
        clipped = -advantages[rows] * torch.clamp(ratio, 1.0 - clip_range, 1.0 + clip_range)
        loss = torch.mean(torch.maximum(unclipped, clipped))
        self.info["loss"].append(loss.detach())
        self.info["ratio"].append(ratio.detach().mean())
        self.info["clip_fraction"].append(torch.mean((torch.abs(ratio.detach() - 1.0) > clip_range).float()))
        return loss
