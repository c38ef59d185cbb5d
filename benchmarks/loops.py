"""Rollouts and training steps as cases: ours, the trainer's loop, and that loop with a compiled step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import trainer_loop
from benchmarks.cases import SD3, Case, Run, Size
from flowgrpo_fast.recipe import AllSteps, Recipe, SharedStart, Sigmas
from flowgrpo_fast.recipes import digits
from flowgrpo_fast.recipes.trajectory import mix_grpo
from flowgrpo_fast.sampling.policy import Policy
from flowgrpo_fast.sampling.walk import Sampler, walk
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import train_step
from flowgrpo_fast.types import Conditioning, FlowModel, PromptRows


class SyntheticModel(FlowModel):
    """A velocity field over SD3.5 latents that costs little: two layers over the channels of each pixel."""

    latent_shape: tuple[int, ...] = SD3.sample

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        channels = self.latent_shape[0]
        self.module = nn.Sequential(nn.Conv2d(channels, 32, 1), nn.SiLU(), nn.Conv2d(32, channels, 1)).to(
            device
        )
        for parameter in self.module.parameters():
            parameter.data = (0.2 * torch.randn(parameter.shape, generator=generator)).to(device)

    def encode(self, prompts: Sequence[str], images: Sequence[Path] = ()) -> Conditioning:
        return Conditioning(torch.zeros(len(prompts), 1, 1, device=next(self.module.parameters()).device))

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return self.module(latents) * sigma[:, None, None, None]

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3].sigmoid()


def synthetic_recipe() -> Recipe:
    """A group of 24 through ten steps, all but the last stochastic (Flow-GRPO), one forward for the group."""
    return replace(
        mix_grpo(),
        name="synthetic",
        sigmas=Sigmas(num_inference_steps=10, shift=3.0),
        topology=SharedStart(at=AllSteps()),
        group_size=SD3.batch,
        num_prompts=1,
        optimizer=replace(mix_grpo().optimizer, num_updates=1),
    )


def rollout_cases(device: torch.device) -> Iterator[Case]:
    """The shipped digits under the default job's recipe, and the synthetic field.

    "network" is the velocities alone: what is above it is the sampler's.
    """
    recipe = digits(mix_grpo())
    engine = build_engine(recipe, device)
    yield rollout_case("digits", engine.model, engine.stage.conditioning, recipe, device, len(engine.prompts))
    model = SyntheticModel(device)
    yield rollout_case("synthetic SD3.5 512", model, model.encode([""]), synthetic_recipe(), device)


def rollout_case(
    name: str, model: FlowModel, prompts: PromptRows, recipe: Recipe, device: torch.device, num_known: int = 1
) -> Case:
    """One whole rollout of some of `num_known` prompts; bytes are not stated, most of them are the network's."""
    draws = trainer_loop.drawn(recipe, num_known, 0, device)
    plan = recipe.plan(0)
    conditioning = prompts.rows(draws.prompt_index[draws.group_id])
    size = Size(f"{name} x{len(draws.seed)}", len(draws.seed), model.latent_shape)
    theirs = partial(trainer_loop.rollout, model, conditioning, draws, plan, recipe)
    policy = Policy(model, recipe.guidance_scale, recipe.machine.precision)
    sampler = Sampler(policy=policy, forwards=recipe.forwards)
    contenders: dict[str, Run] = {
        "ours": lambda: walk(sampler, plan, conditioning, draws),
        "eager": partial(theirs, trainer_loop.eager_step(plan, recipe, device)),
        "compiled": partial(theirs, trainer_loop.compiled_step(plan, recipe, device)),
    }
    rows = recipe.rollout_rows
    latents = torch.zeros(rows, *model.latent_shape, device=device)
    part = conditioning.rows(torch.arange(rows, device=device))
    sigma = torch.ones(rows, device=device)

    @torch.no_grad()
    def network() -> None:
        for _ in range(len(draws.seed) // rows * len(plan.steps)):
            model.velocity(latents, sigma, part)

    return Case("rollout", size, torch.float32, 0, contenders | {"network": network})


def train_step_cases(device: torch.device) -> Iterator[Case]:
    """One step of the default job, each contender on an engine of its own that goes on training."""
    recipe = digits(mix_grpo())
    ours, eager, compiled = (build_engine(recipe, device) for _ in range(3))
    size = Size("digits x240", recipe.num_prompts * recipe.group_size, ours.model.latent_shape)
    contenders: dict[str, Run] = {
        "ours": lambda: train_step(ours),
        "eager": trainer_loop.Trainer(eager).step,
        "compiled": trainer_loop.Trainer(compiled, trainer_loop.compiled_step).step,
    }
    yield Case("train_step", size, torch.float32, 0, contenders)


LEVELS: dict[str, Callable[[torch.device], Iterator[Case]]] = {
    "rollout": rollout_cases,
    "train_step": train_step_cases,
}
