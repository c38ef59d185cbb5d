"""FLOPs of one iteration of a recipe, phase by phase, and the seconds they need at least."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields

from flowgrpo_fast.planner.architectures import Counts
from flowgrpo_fast.planner.devices import Gpu
from flowgrpo_fast.recipe import ClippedRatio, KeepAll, Prune, Recipe, Scouts
from flowgrpo_fast.sampling.schedule import Schedule, resolve_schedule
from flowgrpo_fast.sampling.windows import window_steps

_MOST_ITERATIONS = 1000  # of a run, over which a moving window is averaged


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How a trainer runs a recipe. The defaults are what this engine does; others model other trainers."""

    uncond_gradient: bool = False  # the unconditional half goes through autograd, for nothing
    recompute_old_log_prob: bool = False  # one forward more for each trained step
    # that half again in the update, where its weights are still the rollout's
    recompute_unconditional: bool = False
    # policies beside the trained one in a loss that matches velocities; -1: the loss's
    num_frozen_forwards: int = -1
    trained_steps: int = 0  # steps a sample trains on; 0: the window's
    trained_of_group: int = 0  # finished samples of a group that the update takes; 0: all
    share_prefix: bool = True  # steps before the window once a group, where the start noise is shared
    share_first_step: bool = True  # the update's first stochastic step once a group
    share_first_forward: bool = True  # and the rollout's
    text_each_sample: bool = False  # encode a prompt anew for each of its samples
    num_reward_towers: int = 1  # of ViT-H/14 size, per finished sample


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs by the precision they may run in."""

    training: float = 0.0  # in the training precision
    low: float = 0.0  # linear layers of steps without a log-prob, or of all: what LowPrecision covers
    window: float = 0.0  # linear layers of the rollout's other steps

    @property
    def total(self) -> float:
        """All of it."""
        return self.training + self.low + self.window

    def __add__(self, other: Flops) -> Flops:
        """Sum of each kind."""
        return Flops(self.training + other.training, self.low + other.low, self.window + other.window)


@dataclass(frozen=True, slots=True)
class StepFlops:
    """One training step over all GPUs, averaged over a run's iterations."""

    rollout: Flops
    scouts: Flops
    update: float
    update_low: float  # of it, what runs in low precision: the forwards' linear layers on a shared base
    decode: float
    text: float
    reward: float
    forwards: float  # network evaluations of the rollout, scouts included, each half of guidance one
    samples: int  # that are trained on
    low_format: str  # "bf16", "fp8" or "fp4": what the recipe asks for on steps without a log-prob
    scout_format: str

    @property
    def total(self) -> float:
        """FLOPs of the step."""
        return self.rollout.total + self.scouts.total + self.update + self.decode + self.text + self.reward

    def seconds(self, rate: float, low_rate: float | None = None, scout_rate: float | None = None) -> float:
        """GPU-seconds at these rates in FLOP/s: all matrix work at `rate`, but what the recipe runs lower."""
        low_flops = self.rollout.low + self.update_low
        low = low_flops / (low_rate or rate)
        scout_linear = self.scouts.low / (scout_rate or rate)
        rest = self.total - low_flops - self.scouts.low
        return rest / rate + low + scout_linear

    def floor(self, gpu: Gpu) -> float:
        """GPU-seconds on that GPU, bf16 where the recipe asks for nothing lower."""
        return self.seconds(gpu.rate(), gpu.rate(self.low_format), gpu.rate(self.scout_format))

    def phases(self, gpu: Gpu) -> dict[str, tuple[float, float]]:
        """FLOPs and GPU-seconds of each phase; text also where it costs nothing a step."""
        rate = gpu.rate()
        values = {}
        for name, flops, form in (
            ("rollout", self.rollout, self.low_format),
            ("scouts", self.scouts, self.scout_format),
        ):
            seconds = (flops.training + flops.window) / rate + flops.low / gpu.rate(form)
            values[name] = (flops.total, seconds)
        low = self.update_low
        values["update"] = (self.update, (self.update - low) / rate + low / gpu.rate(self.low_format))
        for name in ("decode", "text", "reward"):
            flops_here = getattr(self, name)
            values[name] = (flops_here, flops_here / rate)
        return {name: value for name, value in values.items() if value[0] or name == "text"}


def plan_step(counts: Counts, recipe: Recipe, execution: Execution | None = None) -> StepFlops:
    """FLOPs of one iteration, averaged over those of a run where the window moves.

    Raises:
        ValueError: the window does not fit the schedule.
    """
    execution = execution or Execution()
    rollout, forwards, update, update_low = Flops(), 0.0, 0.0, 0.0
    regenerate = not isinstance(recipe.explore, Scouts) or recipe.explore.regenerate
    for schedule, weight in _schedules(recipe, counts.sequence):
        if regenerate:
            part, evaluations = _rollout(counts, recipe, execution, schedule)
            scaled = Flops(part.training * weight, part.low * weight, part.window * weight)
            rollout, forwards = rollout + scaled, forwards + evaluations * weight
        whole, low = _update(counts, recipe, execution, schedule)
        update, update_low = update + weight * whole, update_low + weight * low
    scouts, scout_forwards, scouted = _scouts(counts, recipe)
    samples = recipe.num_prompts * recipe.group_size
    previewed = _previewed(recipe)
    scored = scouted + previewed + (samples if regenerate else 0)
    return StepFlops(
        rollout=rollout,
        scouts=scouts,
        update=update,
        update_low=update_low,
        decode=scored * counts.decode,
        text=samples * counts.text if execution.text_each_sample else 0.0,
        reward=scored * counts.reward * execution.num_reward_towers,
        forwards=forwards + scout_forwards,
        samples=samples,
        low_format=recipe.rollout_precision.format_name,
        scout_format=recipe.explore.precision.format_name if isinstance(recipe.explore, Scouts) else "bf16",
    )


def _schedules(recipe: Recipe, sequence: int | None) -> list[tuple[Schedule, float]]:
    """The distinct schedules of a run, each with its share of the iterations."""
    schedules: dict[object, Schedule] = {}
    times: Counter[object] = Counter()
    iterations = min(recipe.num_steps, _MOST_ITERATIONS)
    for iteration in range(iterations):
        window = window_steps(recipe.window, recipe.sigmas.num_inference_steps, iteration, recipe.seed)
        if window not in schedules:
            schedules[window] = resolve_schedule(recipe, iteration, sequence)
        times[window] += 1
    return [(schedules[window], count / iterations) for window, count in times.items()]


def _halves(recipe: Recipe) -> int:
    return 1 if recipe.guidance_scale == 1.0 else 2


def _group_sizes(recipe: Recipe, num_steps: int) -> list[int]:
    """Samples of a prompt at each step."""
    if isinstance(recipe.prune, KeepAll):
        return [recipe.group_size] * num_steps
    sizes = (*recipe.prune.sizes, recipe.group_size)
    return [sizes[sum(step >= cut for cut in recipe.prune.at)] for step in range(num_steps)]


def _previewed(recipe: Recipe) -> int:
    """Candidates whose decoded one-step prediction is rewarded."""
    if isinstance(recipe.prune, Prune) and recipe.prune.score == "reward":
        return recipe.num_prompts * sum(recipe.prune.sizes)
    return 0


def _rollout(counts: Counts, recipe: Recipe, execution: Execution, schedule: Schedule) -> tuple[Flops, float]:
    """FLOPs and network evaluations of the rollout."""
    work = counts.forward
    share = recipe.rollout_precision.low_share(work.linear, work.adapted)
    sizes = _group_sizes(recipe, schedule.num_steps)
    shares = recipe.share_start_noise and recipe.share_prefix and bool(schedule.kept)
    first = schedule.kept[0] if shares else -1
    first_forward = execution.share_first_forward and _shares_first(recipe, schedule)
    training = low = window = evaluations = 0.0
    for step, size in enumerate(sizes):
        shared = (execution.share_prefix and step < first) or (first_forward and step == first)
        rows = recipe.num_prompts * (1 if shared else size) * _halves(recipe)
        evaluations += rows
        training += rows * (work.forward - work.linear)
        if step in schedule.kept and not recipe.rollout_precision.shares_base:
            window += rows * work.linear
        else:
            low += rows * share * work.linear
            training += rows * (1 - share) * work.linear
    return Flops(training, low, window), evaluations


def _shares_first(recipe: Recipe, schedule: Schedule) -> bool:
    """Whether a group's first stochastic step is one row: `sampling.step.shares_first` without draws."""
    whole = recipe.rows_per_update % recipe.group_size == 0
    trains_all = 0 < len(schedule.kept) == schedule.num_trained
    return recipe.share_start_noise and recipe.share_prefix and trains_all and whole


def _scouts(counts: Counts, recipe: Recipe) -> tuple[Flops, float, int]:
    """FLOPs, network evaluations and finished samples of the first stage."""
    explore = recipe.explore
    if not isinstance(explore, Scouts):
        return Flops(), 0.0, 0
    samples = recipe.num_prompts * explore.num_scouts
    rows = float(samples * explore.num_inference_steps * _halves(recipe))
    work = counts.forward
    share = explore.precision.low_share(work.linear, work.adapted)
    linear = rows * work.linear
    attention = rows * work.forward - linear
    return Flops(attention + (1 - share) * linear, share * linear), rows, samples


def _update(counts: Counts, recipe: Recipe, execution: Execution, schedule: Schedule) -> tuple[float, float]:
    """FLOPs of the update: forwards with and without gradient, backwards, what checkpointing computes again.

    And those of them that run in low precision.
    """
    work, halves = counts.forward, _halves(recipe)
    matches = not isinstance(recipe.loss, ClippedRatio)
    with_gradient = halves if execution.uncond_gradient else 1
    forwards = float(halves)
    if execution.num_frozen_forwards >= 0:
        forwards += halves * execution.num_frozen_forwards
    else:  # the start weights where there is a KL; the old policy where the loss matches velocities
        forwards += halves * (getattr(recipe.loss, "kl_beta", 0.0) > 0) + halves * matches
    forwards += halves * execution.recompute_old_log_prob
    recomputes = (
        execution.recompute_unconditional or execution.uncond_gradient or not recipe.reuse_unconditional
    )
    if halves == 2 and not matches and not recomputes:
        forwards -= 1 / recipe.optimizer.num_updates  # of the samples, those of the first optimiser step
    if recipe.network.checkpointing == "full":
        forwards += with_gradient
    each = forwards * work.forward + with_gradient * work.backward(counts.trained_share)
    samples = recipe.num_prompts * (execution.trained_of_group or recipe.group_size)
    steps = execution.trained_steps or schedule.num_trained
    if matches and not execution.trained_steps:
        # On finished samples, noised to a share of the schedule's sigmas.
        steps = max(1, int(getattr(recipe.loss, "fraction", 1.0) * schedule.num_steps))
    evaluations = samples * steps
    if execution.share_first_step and _shares_first(recipe, schedule):
        evaluations -= samples - recipe.num_prompts
    return evaluations * each, evaluations * forwards * work.linear * recipe.rollout_precision.shares_base


def as_dict(step: StepFlops) -> dict[str, float]:
    """Plain numbers, for JSON."""
    values: dict[str, float] = {}
    for f in fields(step):
        value = getattr(step, f.name)
        values[f.name] = value.total if isinstance(value, Flops) else value
    return values
