"""The state of a run: its learners, the stage on which samples are made, and who judges them."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowgrpo_fast.checks import require
from flowgrpo_fast.data.prompts import Prompts
from flowgrpo_fast.experience.experience import Stage
from flowgrpo_fast.models.adapters import has_adapter
from flowgrpo_fast.models.loading import load_model
from flowgrpo_fast.models.network import ModelSetup
from flowgrpo_fast.names import resolve
from flowgrpo_fast.objectives.snapshots import SnapshotRule
from flowgrpo_fast.precision import LowPrecisionModel, check_masters, check_training_precision
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.rewards.judges import Judge
from flowgrpo_fast.rewards.scoring import Scorer
from flowgrpo_fast.rewards.terms import Seen
from flowgrpo_fast.sampling.graphs import Graphs
from flowgrpo_fast.sampling.policy import Policy
from flowgrpo_fast.sampling.prune import check_cells
from flowgrpo_fast.sampling.walk import Sampler
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.schedule.topology import ode_plan
from flowgrpo_fast.training.learner import Learner
from flowgrpo_fast.training.snapshots import (
    Snapshot,
    Through,
    View,
    WithoutAdapter,
    load_weights,
    trained_parameters,
)
from flowgrpo_fast.types import FlowModel, PromptRows, PromptSet


@dataclass(frozen=True, slots=True, eq=False)
class Exam:
    """What every look at the model asks of it; training's own where the recipe says nothing else."""

    model: FlowModel  # of the size that is looked at, on the trained model's weights
    prompts: PromptSet
    conditioning: PromptRows
    scorer: Scorer
    guidance_scale: float
    plan: Plan


@dataclass(slots=True)
class Engine:
    """Everything a step reads or changes."""

    recipe: Recipe
    model: FlowModel
    prompts: PromptSet
    stage: Stage
    learners: tuple[Learner, ...]
    judge: Judge | None
    exam: Exam
    device: torch.device
    copies: tuple[LowPrecisionModel, ...]  # that follow the policy that samples
    prompts_digest: str  # of all that is asked for, by which a resumed run knows that it is still the same
    step: int = 0  # finished training steps
    updates_then: int = 0  # optimiser steps of the learner when the last of them was finished

    @property
    def seq_len(self) -> int | None:
        """Image tokens of a sample, where the model says so; a dynamic shift needs them."""
        return self.model.image_seq_len

    @property
    def learner(self) -> Learner:
        """The one that trains the generator."""
        return self.learners[0]

    @property
    def is_whole(self) -> bool:
        """Whether the state is that after `step` steps, to the bit: nothing but the update of a step changes it."""
        return self.learner.num_updates == self.updates_then

    @property
    def sampled(self) -> FlowModel:
        """The policy that training samples come from."""
        return self._sampling_snapshot or self.model

    @property
    def _sampling_snapshot(self) -> View | None:
        """The snapshot that samples; None where that is the trained policy itself."""
        return self.learner.snapshots.get(self.recipe.requires.sampled_by)

    @property
    def evaluated(self) -> Policy:
        """The policy that evaluation samples from and that the user takes home."""
        model, average = self.exam.model, self.learner.snapshots.get("average")
        if average is not None:
            model = average if model is self.model else Through(average, model)
        return replace(self.learner.policy, model=model, guidance_scale=self.exam.guidance_scale)

    def refresh(self) -> None:
        """Brings copies in low precision up to the policy that samples, in place; all else shares its weights."""
        snapshot = self._sampling_snapshot
        with snapshot.changed() if snapshot is not None else nullcontext():
            for copy in self.copies:
                copy.refresh()

    def close(self) -> None:
        """Ends what runs beside the run."""
        self.stage.scorer.close()
        self.exam.scorer.close()


def build_engine(recipe: Recipe, device: torch.device, scored: bool = True) -> Engine:
    """Loads model, prompts, rewards and judge as the recipe names them.

    Args:
        scored: whether there are rewards and a judge; an engine that only samples is made without them.

    Raises:
        ValueError: a name that does not resolve, an empty prompt file, or what the model cannot be.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # also for what asks for the current one: torch, rewards
    task, machine = recipe.task, recipe.machine
    require(not recipe.requires.incomplete, recipe.requires.incomplete)
    check_training_precision(machine.precision, device)
    rewards = task.rewards if scored else ()
    judge = resolve(task.judge) if task.judge and scored else None
    require(
        judge is None or isinstance(judge, type),
        f"judge {task.judge!r} is a {type(judge).__name__}; name a class with a method correct(images, prompts), or "
        "leave it empty: task.judge=",
    )
    setup = ModelSetup(network=recipe.network, precision=machine.precision, seed=recipe.seed)
    for term in (*rewards, *task.evaluation.rewards) if scored else ():
        term.resolve()  # a name that is not there is found before anything is loaded
    model = load_model(task.model, device, setup)
    prompts = recipe.data.load(model.own_prompts())
    _check_metadata(recipe, prompts)
    check_cells(recipe.plan(0, model.image_seq_len), model)
    check_masters(model.module)
    model.module.eval()  # no dropout: rollout and replay must agree to the bit
    with torch.no_grad():
        conditioning = model.prompt_rows(list(prompts.prompts), list(prompts.images))
    low_precision = machine.rollout_precision.build(model)
    scouting = recipe.experience.scout_precision
    scouts = None
    if scouting is not None:
        scouts = low_precision if scouting == machine.rollout_precision else scouting.build(model)
    scorer = Scorer(rewards, model.decode, device, task.reward_processes)
    learner = _learner(recipe, model, scorer)
    if recipe.requires.reward_gradient and scored:
        _check_gradient(learner, prompts, device)
    sampled = learner.snapshots.get(recipe.requires.sampled_by)
    policy, graphs = learner.policy.of(sampled or model), Graphs() if machine.graphs else None

    def in_low_precision(copy: LowPrecisionModel | None) -> Policy:
        if copy is None:
            return policy
        return policy.of(copy.model if sampled is None else Through(sampled, copy.model))

    sampler = Sampler(
        policy=policy,
        forwards=recipe.forwards,
        outside=in_low_precision(low_precision),
        graphs=graphs,
        keeps_unconditional=recipe.reuses_unconditional,
        keeps_next=recipe.requires.log_probs,
    )
    stage = Stage(
        sampler=sampler,
        scout=replace(
            sampler, policy=in_low_precision(scouts) if scouting is not None else policy, outside=None
        ),
        prompts=prompts,
        conditioning=conditioning,
        scorer=scorer,
        group_size=recipe.group_size,
        num_steps=recipe.sigmas.num_inference_steps,
        plan=lambda step: recipe.plan(step, model.image_seq_len),
        ode=lambda num_steps, group_size: recipe.scout_plan(num_steps, group_size, model.image_seq_len),
        prompts_per_chunk=machine.prompts_per_chunk,
    )
    copies = [copy for copy in (low_precision, scouts) if copy is not None]
    return Engine(
        recipe=recipe,
        model=model,
        prompts=prompts,
        stage=stage,
        learners=(learner,),
        judge=judge() if judge else None,
        exam=_exam(recipe, model, stage, scored),
        device=device,
        copies=tuple(dict.fromkeys(copies)),
        prompts_digest=_digest(prompts),
    )


def _digest(prompts: PromptSet) -> str:
    """SHA-256 of the prompts in their order, what is known of them, and their source images' names and sizes."""
    digest = hashlib.sha256()
    for prompt, known in zip(prompts.prompts, prompts.metadata, strict=True):
        digest.update(json.dumps([prompt, known], sort_keys=True, default=str).encode() + b"\n")
    for image in prompts.images:
        digest.update(f"{image.name} {image.stat().st_size}\n".encode())
    return digest.hexdigest()


def _exam(recipe: Recipe, model: FlowModel, stage: Stage, scored: bool) -> Exam:
    """What looks ask, the training's prompts, rows and rewards shared where they are the same."""
    part, device = recipe.task.evaluation, stage.scorer.device
    looked_at = part.sized(model, recipe.network)
    prompts, conditioning, scorer = stage.prompts, stage.conditioning, stage.scorer
    if part.prompts:
        prompts = Prompts(path=part.prompts).load()
    if part.prompts or looked_at is not model:  # a source image is embedded in the size that is made
        with torch.no_grad():
            conditioning = looked_at.prompt_rows(list(prompts.prompts), list(prompts.images))
    if scored and (part.rewards or looked_at is not model):
        terms = part.rewards or scorer.terms
        scorer = Scorer(terms, looked_at.decode, device, recipe.task.reward_processes)
    scale = recipe.guidance_scale if part.guidance_scale is None else part.guidance_scale
    return Exam(
        model=looked_at,
        prompts=prompts,
        conditioning=conditioning,
        scorer=scorer,
        guidance_scale=scale,
        plan=ode_plan(part.sampled_by(recipe.sigmas).grid(looked_at.image_seq_len)),
    )


def _check_metadata(recipe: Recipe, prompts: PromptSet) -> None:
    """Refuses a prompt whose metadata a part could not read, before a step far into the run meets it."""
    for name, known in recipe.requires.metadata.items():
        for prompt, entry in zip(prompts.prompts, prompts.metadata, strict=True):
            require(
                str(entry.get(name, "")) in known,
                f"the prompt {prompt!r} has {name} = {entry.get(name, '')!r} in its metadata; "
                f"{type(recipe.objective).__name__} knows {', '.join(map(repr, known))}: name one of them in its line "
                "of the prompt file (.jsonl)",
            )


def _check_gradient(learner: Learner, prompts: PromptSet, device: torch.device) -> None:
    """Asks for one reward's gradient: a decoder or a reward without one is refused before anything is sampled."""
    assert learner.reward_gradient is not None
    model = learner.policy.model
    x0 = torch.zeros(1, *model.latent_shape, device=device, requires_grad=True)
    rewards = learner.reward_gradient(x0, prompts.part(slice(0, 1)))
    (gradient,) = torch.autograd.grad(rewards.sum(), x0, allow_unused=True)
    require(
        gradient is not None,
        f"the rewards' gradient does not reach the latents; {model.family()}'s decode_with_grad and every "
        "differentiable reward must compute in torch, without no_grad, detach and numpy",
    )


def _learner(recipe: Recipe, model: FlowModel, scorer: Scorer) -> Learner:
    """Optimiser and snapshots of the generator."""

    def reward_gradient(x0: Tensor, asked: PromptSet) -> Tensor:
        seen = Seen(
            images=model.decode_with_grad(x0),
            prompts=list(asked.prompts),
            metadata=list(asked.metadata),
            source_images=list(asked.images) if asked.images else None,
            group=torch.arange(len(asked), device=x0.device),
            latents=x0,
            num_groups=len(asked),
        )
        return scorer.with_gradient(seen)

    part, machine = recipe.optimizer, recipe.machine
    optimizer = torch.optim.AdamW(
        trained_parameters(model.module),
        lr=part.lr,
        betas=part.betas,
        weight_decay=part.weight_decay,
        fused=True,
    )
    return Learner(
        policy=Policy(model, recipe.guidance_scale, machine.precision, recipe.unconditional_gradient),
        objective=recipe.objective,
        optimizer=optimizer,
        max_grad_norm=part.max_grad_norm,
        updates_per_step=part.num_updates,
        partition=part.partition,
        epochs=part.num_epochs,
        rows=recipe.rollout_rows,
        replay_rows=machine.replay_rows,
        steps_per_forward=recipe.steps_per_forward,
        reward_gradient=reward_gradient,
        snapshots={name: _snapshot(recipe, model, name, rule) for name, rule in recipe.snapshots.items()},
        rules=recipe.snapshots,
    )


def _snapshot(recipe: Recipe, model: FlowModel, name: str, rule: SnapshotRule) -> View:
    """The model under other weights; the start of a fresh adapter is the base alone, for no memory at all."""
    if name == "start" and has_adapter(model.module) and recipe.network.train.starts_from_base:
        return WithoutAdapter(model)
    snapshot = Snapshot(model)
    if rule.path:
        load_weights(snapshot, rule.path)
    return snapshot
