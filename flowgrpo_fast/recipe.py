"""A recipe: one method of the literature as data. Its parts carry their own behaviour; here they are put together.

Validation is one loop: what each part requires is compared with what the others give, and what is missing becomes one
line that says what, who would give it, and the remedy. Paper numbers live in `recipes`; this file holds no algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from flowgrpo_fast.checks import at_most, finite, one_of, positive, require
from flowgrpo_fast.credit.chain import CreditStep
from flowgrpo_fast.credit.normalise import Normalise
from flowgrpo_fast.credit.shape import Bound, DropIdle
from flowgrpo_fast.credit.steps import AtLastStep
from flowgrpo_fast.credit.tree import TreeBackup
from flowgrpo_fast.data.prompts import Prompts, Source
from flowgrpo_fast.experience.experience import Experience
from flowgrpo_fast.experience.replay_buffer import Replayed
from flowgrpo_fast.experience.rollout import Rollout
from flowgrpo_fast.experience.scouts import Scouts
from flowgrpo_fast.models.network import FullFineTuning, LoRA, Network
from flowgrpo_fast.objectives.chunks import ChunkRatio
from flowgrpo_fast.objectives.distillation import Distillation
from flowgrpo_fast.objectives.forward_error import ForwardError
from flowgrpo_fast.objectives.nft import NFT
from flowgrpo_fast.objectives.objective import Objective, Requires
from flowgrpo_fast.objectives.policy_gradient import PolicyGradient
from flowgrpo_fast.objectives.regularizers import TransitionKL, VelocityKL
from flowgrpo_fast.objectives.reward_gradient import LeapAlign
from flowgrpo_fast.objectives.snapshots import EMA, Frozen, Loaded, Ramp, ResetWhen, SnapshotRule
from flowgrpo_fast.objectives.surrogates import PathLogProb
from flowgrpo_fast.objectives.trust import Clip
from flowgrpo_fast.precision.parts import LowPrecision, RolloutPrecision, TrainingPrecision
from flowgrpo_fast.rewards.terms import Reward, RewardTerm
from flowgrpo_fast.sampling.policy import Precision
from flowgrpo_fast.sampling.step import Forwards
from flowgrpo_fast.schedule.dynamics import (
    CPS,
    DanceSDE,
    DPMSolver2M,
    Dynamics,
    Euler,
    FlowSDE,
    Solver,
    WanSDE,
)
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.schedule.sigmas import DynamicShift, Sigmas
from flowgrpo_fast.schedule.topology import (
    Comb,
    Course,
    Cuts,
    Independent,
    OneStepEach,
    SharedStart,
    Topology,
    Tree,
    ode_plan,
)
from flowgrpo_fast.schedule.windows import (
    AllSteps,
    Deterministic,
    EarlySteps,
    FractionOfSteps,
    FrozenWindow,
    GeometricWindow,
    RandomPair,
    RandomWindow,
    SlidingWindow,
    Window,
)
from flowgrpo_fast.types import FlowModel, Partition


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """AdamW and its surroundings."""

    lr: float = 1e-5
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    num_updates: int = 1  # optimiser steps an epoch over a rollout, each on its own share of the samples
    # How samples are shared out: "groups", neighbours (whole groups where num_updates divides num_prompts);
    # "across_groups", members i n to (i + 1) n of every group; "shuffled", a permutation drawn from (seed, step).
    partition: Partition = "groups"
    num_epochs: int = 1  # over a rollout's samples, each shuffled anew
    ema_decay: float = 0.0  # 0 = off; else evaluation and the final weights use the moving average
    ema_every: int = 1  # optimiser steps between two averages
    ema_warm_up: bool = False  # as of `EMA.warm_up`
    ema_calls: int = 1  # as of `EMA.calls`

    def __post_init__(self) -> None:
        """Rates are positive, decays not negative, those of averages below 1."""
        positive(self, lr=self.lr, max_grad_norm=self.max_grad_norm)
        at_most(self, 10, lr=self.lr)
        finite(self, weight_decay=self.weight_decay)
        positive(self, num_updates=self.num_updates, num_epochs=self.num_epochs)
        positive(self, ema_every=self.ema_every, ema_calls=self.ema_calls)
        one_of(self, ("groups", "across_groups", "shuffled"), partition=self.partition)
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"Optimizer.betas is {self.betas}; it must be two numbers in [0, 1)",
        )
        require(0 <= self.ema_decay < 1, f"Optimizer.ema_decay is {self.ema_decay}; it must be in [0, 1)")
        require(
            self.weight_decay >= 0, f"Optimizer.weight_decay is {self.weight_decay}; it must be at least 0"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """How a run uses its device. None of it changes what is learnt, but for the precisions and `replay_rows`."""

    precision: Precision = "fp32"  # of the network's matrix products
    rollout_precision: RolloutPrecision = field(
        default_factory=TrainingPrecision
    )  # of steps without a log-prob
    # What these two leave at 0 the planner chooses when a run starts on a GPU: the most that fit into its memory.
    rows_per_forward: int = (
        0  # samples per forward in rollout and replay; 0 = else as many as one update takes
    )
    steps_per_forward: int = 0  # trained steps of a sample that one forward of the update takes; 0 = else 1
    prompts_per_chunk: int = 0  # that are rolled out, then scored meanwhile (RewardTerm.where); 0 = all
    graphs: bool = False  # rollout steps as captured CUDA graphs
    # Where the unconditional half carries no gradient, the rollout's own serves the update until its first optimiser
    # step: same weights.
    reuse_unconditional: bool = True
    replay_rows: int = 0  # samples per forward of the replay; 0 = as in the rollout: first ratio exactly 1
    max_ratio_error: float = 0.0  # of the self-test before the first update; 0 = the trust region's range

    def __post_init__(self) -> None:
        """Known words; counts are not negative."""
        one_of(self, ("fp32", "bf16"), precision=self.precision)
        counts = ("rows_per_forward", "steps_per_forward", "prompts_per_chunk", "replay_rows")
        for name in (*counts, "max_ratio_error"):
            value = getattr(self, name)
            require(value >= 0, f"Machine.{name} is {value}; it must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Where a look at the model differs from training: what is left at its default is as in training."""

    prompts: str = ""  # a prompt file of its own, as `Prompts.path`; empty = the prompts that are trained on
    num_inference_steps: int = 0  # of the Euler ODE; 0 = as many as in training
    guidance_scale: float | None = None
    height: int = 0  # pixels
    width: int = 0
    num_frames: int = 0
    rewards: tuple[Reward, ...] = ()  # empty = those of training
    num_saved: int = 16  # samples that are kept as files in full size, the first ones; the grid shows more

    def __post_init__(self) -> None:
        """No count is negative; metrics go by the rewards' names."""
        for name in ("num_inference_steps", "height", "width", "num_frames", "num_saved"):
            value = getattr(self, name)
            require(value >= 0, f"Evaluation.{name} is {value}; it must be at least 0")
            at_most(self, 100_000, **{name: value})
        finite(self, guidance_scale=1.0 if self.guidance_scale is None else self.guidance_scale)
        _check_names("Evaluation", self.rewards)

    def sampled_by(self, sigmas: Sigmas) -> Sigmas:
        """The noise schedule of a look."""
        return replace(sigmas, num_inference_steps=self.num_inference_steps or sigmas.num_inference_steps)

    def sized(self, model: FlowModel, network: Network) -> FlowModel:
        """The model that a look samples from; the trained one where the size is its own.

        Raises:
            ValueError: a size that the model cannot make.
        """
        wanted = {name: getattr(self, name) for name in ("height", "width", "num_frames")}
        changes = {name: value for name, value in wanted.items() if value not in (0, getattr(network, name))}
        return (
            model.sized(**{name: changes.get(name, getattr(network, name)) for name in wanted})
            if changes
            else model
        )


def _check_names(owner: str, rewards: tuple[Reward, ...]) -> None:
    names = [term.objective for term in rewards]
    for name in names:
        require(
            names.count(name) == 1,
            f"{owner}.rewards names {name!r} twice; metrics go by that name, so give each its own",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is trained, by which rewards, and who judges it."""

    model: str = "digits"  # a module of flowgrpo_fast.models, or package.module:function
    rewards: tuple[Reward, ...] = (
        RewardTerm(function="flowgrpo_fast.rewards.rules:digit_log_prob", differentiable=True),
        RewardTerm(function="flowgrpo_fast.rewards.rules:ink_contrast", weight=0.2, differentiable=True),
    )
    reward_processes: int = 1  # for rewards with where="process"
    judge: str = "flowgrpo_fast.rewards.judges:DigitJudge"  # empty = none
    num_eval_samples: int = 500
    eval_every: int = 10
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        """There is something to learn from."""
        require(len(self.rewards) > 0, "Task.rewards is empty; name at least one reward function")
        _check_names("Task", self.rewards)
        positive(self, num_eval_samples=self.num_eval_samples, eval_every=self.eval_every)
        positive(self, reward_processes=self.reward_processes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything a run depends on, besides its code."""

    name: str
    sigmas: Sigmas = field(default_factory=Sigmas)
    dynamics: Dynamics = field(default_factory=FlowSDE)  # of stochastic steps
    solver: Solver = field(default_factory=Euler)  # of the steps after them; before them Euler's
    topology: Topology = field(default_factory=Independent)
    guidance_scale: float = 1.0
    # Whether the unconditional half of guidance is differentiated, too; False holds it constant, which saves a backward
    # in two and lets the first optimiser step take that half from the rollout, for another gradient.
    unconditional_gradient: bool = False
    group_size: int = 24  # samples a prompt that are trained on; cuts and scouts start from more
    num_prompts: int = 48  # per training step
    experience: Experience = field(default_factory=Rollout)
    credit: tuple[CreditStep, ...] = (Normalise(), Bound(), DropIdle())
    objective: Objective = field(default_factory=PolicyGradient)
    optimizer: Optimizer = field(default_factory=Optimizer)
    network: Network = field(default_factory=Network)
    machine: Machine = field(default_factory=Machine)
    data: Source = field(default_factory=Prompts)
    task: Task = field(default_factory=Task)
    num_steps: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        """Whatever the fields can break; what needs the model is checked where it is loaded."""
        require(
            self.group_size >= (2 if self.credit else 1),
            f"Recipe.group_size is {self.group_size}; an advantage needs at least 2 samples per prompt",
        )
        positive(self, num_prompts=self.num_prompts, num_steps=self.num_steps)
        at_most(self, 10_000_000, num_steps=self.num_steps)
        at_most(self, 1_000_000, num_prompts=self.num_prompts, group_size=self.group_size)
        finite(self, guidance_scale=self.guidance_scale)
        require(self.seed >= 0, f"Recipe.seed is {self.seed}; it must be at least 0")
        require(
            self.num_prompts * self.group_size % self.optimizer.num_updates == 0,
            f"Optimizer.num_updates is {self.optimizer.num_updates}; it must divide "
            f"num_prompts * group_size = {self.num_prompts * self.group_size}",
        )
        require(
            self.optimizer.partition != "across_groups" or self.group_size % self.optimizer.num_updates == 0,
            f"Optimizer.partition is 'across_groups' with num_updates {self.optimizer.num_updates}, which must divide "
            f"group_size = {self.group_size}: each optimiser step takes as many members of every group",
        )
        self.topology.num_candidates(self.group_size)
        self.experience.check(
            self.sigmas.num_inference_steps, self.group_size, self.topology.stages, self.topology.shares_start
        )
        self._check_rows()
        for line in self._missing():
            raise ValueError(line)

    # ---------------------------------------------------------------------------------- what fits what

    @property
    def requires(self) -> Requires:
        """What the parts need together."""
        needs = self.objective.requires.joined(self.experience.requires)
        for step in self.credit:
            needs = needs.joined(step.requires)
        return needs

    @property
    def snapshots(self) -> dict[str, SnapshotRule]:
        """The other weights that a run keeps, by name: what the parts require, and the moving average."""
        rules = dict(self.requires.snapshots)
        if self.optimizer.ema_decay > 0:
            rules["average"] = EMA(
                decay=self.optimizer.ema_decay,
                every=self.optimizer.ema_every,
                warm_up=self.optimizer.ema_warm_up,
                calls=self.optimizer.ema_calls,
            )
        return rules

    def _missing(self) -> Iterator[str]:
        """What a part needs and no other gives, one line each."""
        needs, name, num_steps = self.requires, type(self.objective).__name__, self.sigmas.num_inference_steps
        window = type(self.topology.at).__name__
        if needs.log_probs and self.topology.at.latest_start(num_steps) >= num_steps:
            yield (
                f"{name} needs log-probs; the window {window} has no stochastic step: choose one that has, such as "
                "topology.at=AllSteps"
            )
        if needs.log_probs and not self.experience.gives_transitions:
            yield (
                f"{name} needs log-probs, which the samples of {type(self.experience).__name__} have not; "
                "set its regenerate to true"
            )
        if self.topology.shares_start and self.topology.at.latest_start(num_steps) >= num_steps:
            yield (
                f"the topology {type(self.topology).__name__} shares start noise and no step is stochastic; a group's "
                "samples would all be equal: use Independent"
            )
        if needs.no_guidance and self.guidance_scale > 1:
            yield (
                f"Recipe.guidance_scale is {self.guidance_scale}; {name} samples and trains without guidance, at 1"
            )
        if needs.all_steps:
            found = self.topology.at.steps(num_steps, 0, self.seed)
            if found.num_trained < len(found.kept) or self.topology.stages:
                yield (
                    f"{name} joins all stochastic steps of a sample; the window {window} trains {found.num_trained} of "
                    f"{len(found.kept)}{', and cuts lose some' if self.topology.stages else ''}: choose a window "
                    "that trains every step, and no Cuts"
                )
        updates = f"num_updates={self.optimizer.num_updates}"
        if needs.whole_groups and not self.whole_groups:
            yield (
                f"{name} joins the samples of a group, which partition={self.optimizer.partition!r} with {updates} "
                "splits: set optimizer.partition=groups, and num_updates to a divisor of num_prompts"
            )
        if needs.equal_updates and self.optimizer.num_updates > 1 and self.optimizer.partition != "shuffled":
            yield (
                "DropIdle(mode='filtered') shares the samples that teach out anew, which "
                f"partition={self.optimizer.partition!r} with {updates} does not: set optimizer.partition=shuffled, or "
                "mode=dropped"
            )
        if needs.sampled_by and needs.sampled_by not in self.snapshots:
            yield f"{name} samples from the snapshot {needs.sampled_by!r}, which no part keeps"
        if needs.reward_gradient and not all(term.differentiable for term in self.task.rewards):
            bad = next(term for term in self.task.rewards if not term.differentiable)
            yield (
                f"{name} needs the gradient of every reward; {bad.label!r} is not marked differentiable: set "
                "differentiable=true on its term if it is a differentiable function of its images"
            )
        if needs.pairs and not self.data.gives_pairs:
            yield f"{name} learns from pairs; {type(self.data).__name__} gives none: use a source of pairs"
        trained = self.topology.at.steps(num_steps, 0, self.seed)
        self.machine.rollout_precision.check_replay(
            self.machine.replay_rows in (0, self.rollout_rows)
            and trained.num_trained == len(trained.kept)  # else each sample replays steps of its own
            and self.splits_contiguously  # else its forwards hold other rows together
            and self.steps_per_forward == 1
            and not self.topology.stages
            and self.experience.scout_precision is None
        )
        scout = self.experience.scout_precision
        if scout is not None and scout.shares_base and scout != self.machine.rollout_precision:
            yield (
                "Scouts.precision.mode is 'shared_base': that is the training model itself. Give rollout_precision the "
                "same, or choose 'merged', 'branch' or 'bare_layers' for scouts"
            )

    def _check_rows(self) -> None:
        """Rollout and update must be able to run the same forwards."""
        machine = self.machine
        for name in ("rows_per_forward", "replay_rows"):
            rows, whole = getattr(machine, name), self.rows_per_update * self.steps_per_forward
            require(
                whole % (rows or 1) == 0,
                f"Machine.{name} is {rows}; it must divide {whole}, the samples of one update"
                + (f" at {self.steps_per_forward} steps" if self.steps_per_forward > 1 else ""),
            )
        sizes = (*self.topology.stages, self.group_size)
        for size in sizes:
            require(
                self.num_prompts * size % self.rollout_rows == 0,
                f"Machine.rows_per_forward is {machine.rows_per_forward}; it must divide {self.num_prompts * size}, "
                f"the candidates of {size} a prompt, so that rollout and replay run the same forwards",
            )
        chunk = machine.prompts_per_chunk
        require(
            self.num_prompts % (chunk or 1) == 0,
            f"Machine.prompts_per_chunk is {chunk}; it must divide num_prompts = {self.num_prompts}",
        )
        for size in sizes:
            require(
                chunk * size % self.rollout_rows == 0,
                f"Machine.prompts_per_chunk is {chunk}: {chunk * size} samples, which must be whole forwards "
                f"of {self.rollout_rows}; set rows_per_forward to {math.gcd(*sizes)}, say",
            )

    # --------------------------------------------------------------------------------------- its numbers

    @property
    def num_candidates(self) -> int:
        """Samples a prompt that the rollout starts with."""
        return self.topology.num_candidates(self.group_size)

    @property
    def num_drawn(self) -> int:
        """Seeds a prompt that a step begins with, scouts included."""
        return self.experience.num_drawn(self.num_candidates)

    @property
    def rows_per_update(self) -> int:
        """Samples behind one optimiser step."""
        return self.num_prompts * self.group_size // self.optimizer.num_updates

    @property
    def steps_per_forward(self) -> int:
        """Trained steps of a sample that one forward of the update takes."""
        return self.machine.steps_per_forward or 1

    @property
    def splits_contiguously(self) -> bool:
        """Whether an optimiser step takes neighbours of the batch."""
        return self.optimizer.num_updates == 1 or self.optimizer.partition == "groups"

    @property
    def whole_groups(self) -> bool:
        """Whether an optimiser step takes all members of a group or none."""
        return self.splits_contiguously and self.rows_per_update % self.group_size == 0

    @property
    def reuses_unconditional(self) -> bool:
        """Whether the update takes the unconditional half of guidance from the rollout, while the weights are those."""
        return (
            self.machine.reuse_unconditional
            and not self.unconditional_gradient
            and self.objective.requires.log_probs
        )

    @property
    def rollout_rows(self) -> int:
        """Samples per forward of the rollout; where candidates are cut, what divides them before and after."""
        stages = (self.num_prompts * size for size in self.topology.stages)
        return self.machine.rows_per_forward or math.gcd(self.rows_per_update, *stages)

    @property
    def forwards(self) -> Forwards:
        """How rows are cut into forwards: optimiser steps and chunks are whole numbers of them."""
        # Rows that members share all come in every optimiser step that takes some of each group.
        each = self.rows_per_update // self.group_size if self.splits_contiguously else self.num_prompts
        prompts = math.gcd(each, self.machine.prompts_per_chunk or self.num_prompts)
        return Forwards(rows=self.rollout_rows, prompts=max(1, prompts))

    def plan(self, iteration: int, seq_len: int | None = None) -> Plan:
        """The walk of one training step.

        Args:
            seq_len: image tokens of a sample; a dynamic shift needs it.

        Raises:
            ValueError: the topology does not fit the schedule.
        """
        plan = self.topology.plan(self.course(iteration, seq_len))
        self.objective.check(plan)
        self.experience.check_plan(plan)
        return plan

    def course(self, iteration: int, seq_len: int | None = None) -> Course:
        """What the topology makes that walk of; arguments as of `plan`."""
        return Course(
            sigmas=self.sigmas.grid(seq_len),
            shift=self.sigmas.shift_value(seq_len),
            dynamics=self.dynamics,
            solver=self.solver,
            iteration=iteration,
            seed=self.seed,
            num_prompts=self.num_prompts,
            group_size=self.group_size,
            keeps=self.requires.log_probs or self.requires.states,
            whole_groups=self.whole_groups,
            some_edges=not self.splits_contiguously,
        )

    def scout_plan(self, num_steps: int, group_size: int, seq_len: int | None = None) -> Plan:
        """An ODE walk in so many steps, of so many samples a prompt."""
        sigmas = replace(self.sigmas, num_inference_steps=num_steps)
        return ode_plan(sigmas.grid(seq_len), self.solver, group_size)


PARTS: dict[str, type] = {
    part.__name__: part
    for part in (
        *(
            Recipe,
            Optimizer,
            Machine,
            Task,
            Evaluation,
            Network,
            LoRA,
            FullFineTuning,
            TrainingPrecision,
            LowPrecision,
        ),
        *(Sigmas, DynamicShift, FlowSDE, DanceSDE, WanSDE, CPS, Euler, DPMSolver2M),
        *(
            Deterministic,
            RandomPair,
            AllSteps,
            EarlySteps,
            FractionOfSteps,
            RandomWindow,
            FrozenWindow,
            GeometricWindow,
            SlidingWindow,
        ),
        *(Independent, SharedStart, Tree, Comb, OneStepEach, Cuts),
        *(PolicyGradient, PathLogProb, ForwardError, Clip, TransitionKL, VelocityKL),
        *(NFT, ChunkRatio, LeapAlign, Distillation),
        *(Frozen, EMA, Ramp, ResetWhen, Loaded),
        *(Normalise, Bound, DropIdle, AtLastStep, TreeBackup, Rollout, Scouts, Replayed, Prompts, RewardTerm),
    )
}
# The kinds of part that a field of a recipe may name, for whoever writes one: each is a protocol.
KINDS = (Dynamics, Solver, Window, Topology, Objective, CreditStep, Experience, Source, Reward)
