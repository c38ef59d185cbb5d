"""Rollout and training step as published trainers write them: a look-up per sample, one PyTorch op after another.

The same model, recipe, draws' prompts, steps trained, micro-batches and optimiser as ours; only the way differs:

- both halves of guidance are one forward of twice the rows, in the update too; where the recipe holds the unconditional
  half constant, its output is detached only afterwards;
- the start weights' transition is computed like the policy's, log-prob included, for the KL of each trained step;
- weights stay in fp32 under autocast, which casts frozen ones anew in every forward, and so does the autoencoder;
- nothing is fused, shared or compiled, and noise comes from torch's generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from flowgrpo_fast.data.draws import draw
from flowgrpo_fast.models.pipeline import PipelineModel
from flowgrpo_fast.ops import reference
from flowgrpo_fast.recipe import FlowSDE, PolicyGradient, Recipe
from flowgrpo_fast.sampling.step import row_slices
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.training.engine import Engine
from flowgrpo_fast.training.loop import StepReport
from flowgrpo_fast.types import Conditioning, Draws, FlowModel


class Moved(NamedTuple):
    """What a step gives; the last two are read by the KL alone."""

    following: Tensor  # [B, *S] the next latents
    log_prob: Tensor  # [B]
    mean: Tensor | None = None  # [B, *S]
    rate: Tensor | None = None  # [B, 1, ...] of the noise, without the square root of the time step


# (latents, velocity, timestep [B], the stored next latents or None)
Step = Callable[[Tensor, Tensor, Tensor, Tensor | None], Moved]
MakeStep = Callable[[Plan, Recipe, torch.device], Step]
Randn = Callable[..., Tensor]


def eager_step(plan: Plan, recipe: Recipe, device: torch.device, randn: Randn = torch.randn) -> Step:
    """Flow-SDE op by op, with the schedule looked up by timestep for each sample."""
    assert isinstance(recipe.dynamics, FlowSDE)
    noise_level = recipe.dynamics.noise_level
    sigmas, timesteps = plan.sigmas.to(device), 1000 * plan.sigmas[:-1].to(device)

    def step(latents: Tensor, velocity: Tensor, timestep: Tensor, following: Tensor | None) -> Moved:
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
            following = mean + spread * randn(mean.shape, device=mean.device)
        log_prob = (
            -((following.detach().float() - mean) ** 2) / (2 * spread**2)
            - torch.log(spread)
            - math.log(math.sqrt(2 * math.pi))
        )
        log_prob = log_prob.mean(dim=tuple(range(1, log_prob.ndim)))
        return Moved(following.to(latents.dtype), log_prob, mean, rate)

    return step


def compiled_step(plan: Plan, recipe: Recipe, device: torch.device) -> Step:
    """torch.compile of the reference over the coefficient table, noise from torch's generator."""
    coeffs, timesteps = plan.coeffs.to(device), 1000 * plan.sigmas[:-1].to(device)

    @torch.compile(dynamic=False)
    def sampled(latents: Tensor, velocity: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn(latents.shape, device=latents.device)
        return reference.flow_step(latents, velocity, coeffs, index, noise)[:2]

    @torch.compile(dynamic=False)
    def replayed(latents: Tensor, velocity: Tensor, following: Tensor, index: Tensor) -> Tensor:
        return reference.flow_log_prob(latents, velocity, following, coeffs, index)[0]

    def step(latents: Tensor, velocity: Tensor, timestep: Tensor, following: Tensor | None) -> Moved:
        index = (timesteps == timestep[:, None]).int().argmax(1)
        if following is None:
            return Moved(*sampled(latents, velocity, index))
        return Moved(following, replayed(latents, velocity, following, index))

    return step


def drawn(recipe: Recipe, set_size: int, step: int, device: torch.device) -> Draws:
    """The prompts and seeds of a training step, as the engine draws them."""
    return draw(
        recipe.data.draw(step, recipe.seed, recipe.num_prompts, set_size),
        step=step,
        seed=recipe.seed,
        num_drawn=recipe.num_drawn,
        share_start=recipe.topology.shares_start,
        device=device,
    )


def kept_steps(plan: Plan) -> list[int]:
    """The steps whose transitions are trained on."""
    return [plan.steps[place].step for place in plan.kept]


@dataclass
class Samples:
    """What a trainer keeps of its rollout."""

    latents: Tensor  # [B, K, *S]
    next_latents: Tensor  # [B, K, *S]
    log_probs: Tensor  # [B, K]
    timesteps: Tensor  # [B, K]
    x0: Tensor  # [B, *S]


def predict(
    model: FlowModel, latents: Tensor, timestep: Tensor, conditioning: Conditioning, recipe: Recipe
) -> Tensor:
    """The guided velocity, of one forward for both halves."""
    with torch.autocast(
        latents.device.type, dtype=torch.bfloat16, enabled=recipe.machine.precision == "bf16"
    ):
        if recipe.guidance_scale == 1.0:
            return model.velocity(latents, timestep / 1000, conditioning)
        twice, timesteps = torch.cat([latents] * 2), torch.cat([timestep] * 2)
        both = model.velocity(twice, timesteps / 1000, joined(conditioning.negative(), conditioning))
    negative, positive = both.float().chunk(2)
    negative = negative if recipe.unconditional_gradient else negative.detach()
    return negative + recipe.guidance_scale * (positive - negative)


def joined(first: Conditioning, second: Conditioning) -> Conditioning:
    """The rows of both, of the fields a forward reads."""
    extra = {key: torch.cat([value, second.extra[key]]) for key, value in first.extra.items()}
    names = ("prompt_embeds", "pooled_prompt_embeds")
    pairs = {name: (getattr(first, name), getattr(second, name)) for name in names}
    values = {name: torch.cat(pair) for name, pair in pairs.items() if pair[0] is not None}
    return Conditioning(**values, extra=extra)


@torch.no_grad()
def rollout(
    model: FlowModel,
    conditioning: Conditioning,
    draws: Draws,
    plan: Plan,
    recipe: Recipe,
    step: Step,
    randn: Randn = torch.randn,
) -> Samples:
    """Walks every micro-batch through all steps: stochastic ones through `step`, Euler elsewhere."""
    device, parts, stochastic = draws.seed.device, [], kept_steps(plan)
    timesteps = 1000 * plan.sigmas[:-1].to(device)
    for rows in row_slices(len(draws.seed), recipe.rollout_rows):
        part = conditioning.rows(torch.arange(rows.start, rows.stop, device=device))
        latents = start_noise(model, draws.group_id[rows], recipe, randn)
        before, after, log_probs, kept = [], [], [], []
        for i, t in enumerate(timesteps):
            timestep = t.expand(latents.shape[0])
            velocity = predict(model, latents, timestep, part, recipe)
            if i in stochastic:
                before.append(latents)
                latents, log_prob, *_ = step(latents, velocity, timestep, None)
                after.append(latents)
                log_probs.append(log_prob)
                kept.append(timestep)
            else:
                dt = plan.sigmas[i + 1] - plan.sigmas[i]
                latents = (latents.float() + dt * velocity.float()).to(latents.dtype)
        stacked = (torch.stack(values, dim=1) for values in (before, after, log_probs, kept))
        parts.append((*stacked, latents))
    return Samples(*(torch.cat(values) for values in zip(*parts, strict=True)))


def start_noise(model: FlowModel, group_id: Tensor, recipe: Recipe, randn: Randn = torch.randn) -> Tensor:
    """From torch's generator; one a group where the recipe shares it."""
    if not recipe.topology.shares_start:
        return randn((len(group_id), *model.latent_shape), device=group_id.device)
    first = int(group_id[0])
    noise = randn((int(group_id[-1]) + 1 - first, *model.latent_shape), device=group_id.device)
    return noise[group_id - first]


def advantages_of(rewards: Tensor, prompts: list[str], recipe: Recipe) -> Tensor:
    """z-scores per prompt, on the host in numpy; the batch's deviation where the recipe says so."""
    normalise, bound = recipe.credit[:2]
    values, names = rewards.cpu().numpy().astype(np.float64), np.array(prompts)
    advantages = np.empty_like(values)
    for prompt in np.unique(names):
        group = values[names == prompt]
        spread = values.std() if normalise.std == "batch" else group.std()
        advantages[names == prompt] = (group - group.mean()) / (spread + normalise.eps)
    clipped = np.clip(advantages, -bound.limit, bound.limit)
    return torch.as_tensor(clipped, dtype=torch.float32, device=rewards.device)


@dataclass
class Trainer:
    """A trainer on an engine of its own; `step()` is one training step."""

    engine: Engine
    make_step: MakeStep = eager_step
    info: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Weights as trainers leave them: in fp32, under autocast."""
        model = self.engine.model
        model.module.float()
        if isinstance(model, PipelineModel):
            model.pipe.vae.float()
        for layer in model.module.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.cast_input_dtype_enabled = True  # peft's default

    def step(self) -> StepReport:
        """Rollout, rewards, credit, update; reports the step's means."""
        engine, recipe, report = self.engine, self.engine.recipe, StepReport(self.engine.step + 1)
        with report.phase("rollout"):
            draws = drawn(recipe, len(engine.prompts), engine.step, engine.device)
            plan = recipe.plan(engine.step, engine.seq_len)
            conditioning = engine.stage.conditioning.rows(draws.prompt_index[draws.group_id])
            step = self.make_step(plan, recipe, engine.device)
            samples = rollout(engine.model, conditioning, draws, plan, recipe, step)
            wait(engine.device)
        with report.phase("reward"), torch.no_grad():
            images = engine.model.decode(samples.x0)
            asked = engine.prompts.rows(draws.prompt_index[draws.group_id])
            scores = engine.stage.scorer.score(images, asked, draws.group_id, len(draws.prompt_index))
            rewards = scores.total
            advantages = advantages_of(rewards, list(asked.prompts), recipe)
        with report.phase("update"):
            self.info = {}
            for share in row_slices(len(advantages), recipe.rows_per_update):
                self.update(samples, conditioning, advantages, share, step)
            report.metrics = {name: torch.stack(values).mean().item() for name, values in self.info.items()}
        engine.step += 1
        report.metrics["reward"] = rewards.mean().item()
        return report

    def update(
        self, samples: Samples, conditioning: Conditioning, advantages: Tensor, share: slice, step: Step
    ) -> None:
        """One optimiser step: every kept step of the share, each a forward and a backward."""
        optimizer, max_norm = self.engine.learner.optimizer, self.engine.recipe.optimizer.max_grad_norm
        self.accumulate(samples, conditioning, advantages, share, step)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        optimizer.zero_grad()

    def accumulate(
        self, samples: Samples, conditioning: Conditioning, advantages: Tensor, share: slice, step: Step
    ) -> None:
        """The gradient of one share, one micro-batch and step after another."""
        recipe, num_kept = self.engine.recipe, samples.timesteps.shape[1]
        accumulated = num_kept * (share.stop - share.start) // recipe.rollout_rows
        for part in row_slices(share.stop - share.start, recipe.rollout_rows):
            rows = slice(share.start + part.start, share.start + part.stop)
            for j in range(num_kept):
                loss = self.loss(samples, conditioning, advantages, (rows, j), step)
                (loss / accumulated).backward()

    def loss(
        self,
        samples: Samples,
        conditioning: Conditioning,
        advantages: Tensor,
        where: tuple[slice, int],
        step: Step,
    ) -> Tensor:
        """PPO's clipped ratio of one micro-batch at one step, and the KL to the start weights."""
        (rows, j), engine = where, self.engine
        part = engine.recipe.objective
        assert isinstance(part, PolicyGradient)
        clip_range, start = part.trust.range, engine.learner.snapshots.get("start")
        index = torch.arange(rows.start, rows.stop, device=engine.device)
        timestep, latents = samples.timesteps[rows, j], samples.latents[rows, j]
        following, own = samples.next_latents[rows, j], conditioning.rows(index)
        moved = step(
            latents, predict(engine.model, latents, timestep, own, engine.recipe), timestep, following
        )
        ratio = torch.exp(moved.log_prob - samples.log_probs[rows, j])
        unclipped = -advantages[rows] * ratio
        clipped = -advantages[rows] * torch.clamp(ratio, 1.0 - clip_range, 1.0 + clip_range)
        loss = torch.mean(torch.maximum(unclipped, clipped))
        self.note(policy_loss=loss, ratio=ratio.mean())
        self.note(clip_fraction=torch.mean((torch.abs(ratio - 1.0) > clip_range).float()))
        if start is not None:
            with torch.no_grad():
                velocity = predict(start, latents, timestep, own, engine.recipe)
                reference = step(latents, velocity, timestep, following)
            every = tuple(range(1, latents.ndim))
            distance = ((moved.mean - reference.mean) ** 2).mean(dim=every, keepdim=True)
            kl = torch.mean(distance / (2 * moved.rate**2))
            loss = loss + part.regularizers[0].beta * kl
            self.note(kl=kl)
        self.note(loss=loss)
        return loss

    def note(self, **values: Tensor) -> None:
        """Keeps what is averaged at the end of the step."""
        for name, value in values.items():
            self.info.setdefault(name, []).append(value.detach())


def wait(device: torch.device) -> None:
    """For a GPU's queue, so that a phase's time is its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
