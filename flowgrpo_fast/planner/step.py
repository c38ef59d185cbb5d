"""FLOPs of one iteration of a recipe, phase by phase, and the seconds they need at least.

Nothing is known here of a method: rows are counted on the plans that the rollout walks, and what an update asks at them
is what the objective says.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from typing import NamedTuple

from flowgrpo_fast.planner.architectures import Counts
from flowgrpo_fast.planner.devices import Gpu
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.sampling.policy import Policy
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.types import FlowModel

MOST_ITERATIONS = 1000  # of a run, over which a moving window is averaged
# Of a reward's gradient: the images are decoded, decoded again in the backward, and differentiated.
_DECODES, _REWARDS = 3, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How a trainer runs a recipe. The defaults are what this engine does; others model other trainers."""

    recompute_old_log_prob: bool = False  # one forward more at each trained row
    trained_of_group: int = 0  # finished samples of a group that the update takes; 0: all
    share_first_step: bool = True  # a group's first stochastic step once, where it shares what comes before
    text_each_sample: bool = False  # encode a prompt anew for each of its samples
    num_reward_towers: int = 1  # of ViT-H/14 size, per finished sample


class Evaluations(NamedTuple):
    """Rows that go through the network in one training step, each half of guidance one; and what is decoded besides."""

    kept: float  # of the rollout: their edges are trained
    others: float  # of the rollout
    scouts: float
    update: float  # forwards of the update, with gradient or without
    backwards: float
    previews: float  # candidates whose x0 prediction is decoded and rewarded
    rewarded: float  # finished samples that are decoded and rewarded with gradient

    @property
    def rollout(self) -> float:
        """All that sample."""
        return self.kept + self.others + self.scouts


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
        low = self.rollout.low + self.update_low
        rest = self.total - low - self.scouts.low
        return rest / rate + low / (low_rate or rate) + self.scouts.low / (scout_rate or rate)

    def floor(self, gpu: Gpu) -> float:
        """GPU-seconds on that GPU, bf16 where the recipe asks for nothing lower."""
        return self.seconds(gpu.rate(), gpu.rate(self.low_format), gpu.rate(self.scout_format))

    def phases(self, gpu: Gpu) -> dict[str, tuple[float, float]]:
        """FLOPs and GPU-seconds of each phase; text also where it costs nothing a step."""
        low, scout = self.low_format, self.scout_format
        parts = {
            "rollout": (self.rollout.total, self.rollout.low, low),
            "scouts": (self.scouts.total, self.scouts.low, scout),
            "update": (self.update, self.update_low, low),
            "decode": (self.decode, 0.0, low),
            "text": (self.text, 0.0, low),
            "reward": (self.reward, 0.0, low),
        }
        return {
            name: (flops, (flops - lower) / gpu.rate() + lower / gpu.rate(form))
            for name, (flops, lower, form) in parts.items()
            if flops or name == "text"
        }


def plan_step(counts: Counts, recipe: Recipe, execution: Execution | None = None) -> StepFlops:
    """FLOPs of one iteration, averaged over those of a run where the window moves.

    Raises:
        ValueError: the topology does not fit the schedule.
    """
    execution = execution or Execution()
    work, precision = counts.forward, recipe.machine.rollout_precision
    sums = [0.0] * len(Evaluations._fields)
    for plan, share in plans(recipe, counts.sequence, execution):
        rows = evaluations(recipe, plan, execution, counts.sequence)
        sums = [total + share * value for total, value in zip(sums, rows, strict=True)]
    rows = Evaluations(*sums)
    in_low = rows.others + rows.kept * precision.shares_base
    low_share = precision.low_share(work.linear, work.adapted)
    rollout = Flops(
        training=(rows.kept + rows.others) * (work.forward - work.linear)
        + in_low * (1 - low_share) * work.linear,
        low=in_low * low_share * work.linear,
        window=rows.kept * (not precision.shares_base) * work.linear,
    )
    ranking = recipe.experience.scout_precision
    scout_share = ranking.low_share(work.linear, work.adapted) if ranking is not None else 0.0
    scout_low = rows.scouts * scout_share * work.linear
    # What a checkpointed block keeps nothing of is computed again on the way back.
    again = rows.backwards * (recipe.network.checkpointing == "full")
    samples = recipe.num_prompts * recipe.group_size
    scored = samples + rows.previews + recipe.num_prompts * recipe.experience.walks.num_scouts
    rewards = scored + _REWARDS * rows.rewarded
    return StepFlops(
        rollout=rollout,
        scouts=Flops(rows.scouts * work.forward - scout_low, scout_low),
        update=(rows.update + again) * work.forward + rows.backwards * work.backward(counts.trained_share),
        update_low=(rows.update + again) * work.linear * precision.shares_base,
        decode=(scored + _DECODES * rows.rewarded) * counts.decode,
        text=samples * counts.text if execution.text_each_sample else 0.0,
        reward=rewards * counts.reward * execution.num_reward_towers,
        forwards=rows.rollout,
        samples=samples,
        low_format=precision.format_name,
        scout_format=ranking.format_name if ranking is not None else "bf16",
    )


def halves(recipe: Recipe) -> int:
    """Forwards of a velocity, as the policy runs them."""
    return Policy(FlowModel(), recipe.guidance_scale).halves


def differentiated_halves(recipe: Recipe) -> int:
    """Those of them that go back through the network."""
    return halves(recipe) if recipe.unconditional_gradient else 1


def plans(
    recipe: Recipe, seq_len: int | None = None, execution: Execution | None = None
) -> list[tuple[Plan, float]]:
    """The plans of a run that differ, each with its share of the iterations: a plan's size follows its window."""
    iterations = min(recipe.num_steps, MOST_ITERATIONS)
    first: dict[object, int] = {}
    times: Counter[object] = Counter()
    for iteration in range(iterations):
        window = recipe.topology.at.steps(recipe.sigmas.num_inference_steps, iteration, recipe.seed)
        first.setdefault(window, iteration)
        times[window] += 1
    apart = execution is not None and not execution.share_first_step
    return [
        (
            # A group whose members an update may split has its first stochastic step member by member.
            recipe.topology.plan(
                recipe.course(iteration, seq_len)._replace(whole_groups=False, some_edges=False)
            )
            if apart
            else recipe.plan(iteration, seq_len),
            times[window] / iterations,
        )
        for window, iteration in first.items()
    ]


def evaluations(
    recipe: Recipe, plan: Plan, execution: Execution | None = None, seq_len: int | None = None
) -> Evaluations:
    """What one training step along a plan evaluates, if every group teaches something."""
    execution, walks, num_prompts = execution or Execution(), recipe.experience.walks, recipe.num_prompts
    objective = recipe.objective
    both, differentiated = halves(recipe), differentiated_halves(recipe)
    learnt = plan if walks.full else recipe.scout_plan(walks.scout_steps, recipe.group_size, seq_len)
    scouts = 0
    if walks.num_scouts:
        scouts = recipe.scout_plan(walks.scout_steps, walks.num_scouts, seq_len).evaluations(num_prompts)
    asked = plan.evaluations(num_prompts) * walks.full
    kept = sum(step.kept_of(num_prompts)[0] for step in plan.steps) * walks.full
    previews = sum(len(plan.steps[place].parent) for place, cut in plan.cuts if cut.score == "reward")
    costs = objective.costs(learnt, num_prompts)
    learnt_rows = costs.rows
    if not recipe.splits_contiguously and objective.requires.log_probs:
        # A row that members share is asked in every optimiser step that takes some of them.
        kept_steps = (step.kept_of(num_prompts) for step in learnt.steps)
        shared = sum(heads for heads, edges in kept_steps if edges > heads)
        learnt_rows += shared * (recipe.optimizer.num_updates - 1)
    rows = learnt_rows * (execution.trained_of_group or recipe.group_size) / recipe.group_size
    rows *= recipe.optimizer.num_epochs
    passes = 2 if objective.couples else 1  # a coupled loss is measured once for its slopes alone
    trained = rows * costs.trained
    update = both * (passes * (trained + rows * costs.frozen) + rows * execution.recompute_old_log_prob)
    if both == 2 and recipe.reuses_unconditional:
        # Until the first optimiser step the rollout's own unconditional half serves.
        update -= passes * trained / (recipe.optimizer.num_updates * recipe.optimizer.num_epochs)
    return Evaluations(
        kept=both * kept,
        others=both * (asked - kept),
        scouts=both * scouts,
        update=update,
        backwards=trained * differentiated,
        previews=num_prompts * previews,
        rewarded=costs.rewarded * recipe.optimizer.num_epochs,
    )


def as_dict(step: StepFlops) -> dict[str, float]:
    """Plain numbers, for JSON."""
    values = {f.name: getattr(step, f.name) for f in fields(step)}
    return {**values, "rollout": step.rollout.total, "scouts": step.scouts.total}
