"""Walks a policy along a plan: every sampler, tree and funnel of the field goes through here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowgrpo_fast.ops import Guidance, compact, flow_log_prob, philox_normal
from flowgrpo_fast.sampling.graphs import Graphs
from flowgrpo_fast.sampling.policy import Policy
from flowgrpo_fast.sampling.prune import Candidates, survivors
from flowgrpo_fast.sampling.step import (
    Ask,
    Forwards,
    StepInput,
    StepLayout,
    StepResult,
    Wanted,
    lay_out,
    take_step,
)
from flowgrpo_fast.schedule.plan import Cut, Index, Plan
from flowgrpo_fast.types import Conditioning, Draws, Imposed, PreviewScore, Trajectory, Transitions

START_NOISE_STREAM = 1  # stream 0 is the noise of the steps
_MOST_BUFFERS = 16  # that `ops.compact` gathers in one launch


@dataclass(frozen=True, slots=True)
class Sampler:
    """Who is asked along a plan, and how many rows at once."""

    policy: Policy
    forwards: Forwards
    # Asked at rows whose edges are not kept, say a copy in low precision; None = policy.
    outside: Policy | None = None
    graphs: Graphs | None = None  # captured steps, replayed where they fit; None launches each kernel
    # Whether the update will read the unconditional half of guidance that the rollout computes at kept steps.
    keeps_unconditional: bool = False
    keeps_next: bool = True  # whether kept steps store what they lead to; False: the states before them alone

    def asked(self, ask: Ask) -> Policy:
        """The policy of an ask, its expert where all rows are at one sigma."""
        policy = self.policy if ask.trained or self.outside is None else self.outside
        return policy.at(ask.level)


@torch.no_grad()
def walk(
    sampler: Sampler,
    plan: Plan,
    conditioning: Conditioning,
    draws: Draws,
    score: PreviewScore | None = None,
    imposed: Imposed | None = None,
) -> Trajectory:
    """Samples the plan and keeps its transitions; its cuts leave fewer samples on the way.

    All rows move together, step by step. How many survive a cut is known beforehand, which ones only on the device: the
    latents wait for nothing there (a reward that runs on the host waits for its images).

    Args:
        conditioning: one row per sample, on the draws' device.
        draws: the seeds; every sample's noise is a function of (seed, step, element) alone.
        score: what a cut by reward asks.
        imposed: steps that some samples repeat: their log-probs are those of the policy that is asked now. Of plans in
            which every sample is a row of its own.

    Raises:
        ValueError: the model gave a NaN or infinite velocity; names step and sample.
    """
    device, num_prompts = draws.seed.device, len(draws.prompt_index)
    under_way = _UnderWay(
        sampler=sampler,
        plan=plan,
        coeffs=plan.coeffs.to(device, non_blocking=True),
        conditioning=conditioning,
        draws=draws,
        latents=_start(sampler, plan, draws),
        repeats=None if imposed is None else _Repeats.of(imposed, plan, device),
    )
    layouts = lay_out(plan, num_prompts, sampler.forwards, device)
    asked = [[under_way.asked(place, ask) for ask in layout.asks] for place, layout in enumerate(layouts)]
    if sampler.graphs is not None:
        first = under_way.given(layouts[0].asks[0])
        sampler.graphs.begin([each for step in asked for each in step], first, under_way.coeffs)
    for place, (layout, asks) in enumerate(zip(layouts, asked, strict=True)):
        answers = [under_way.answer(place, *each) for each in asks]
        under_way.move(layout, answers)
        cut = plan.steps[place].cut
        if cut is not None:
            under_way.cut(answers[0], cut, score)
        del answers  # the next step needs the memory
    check_finite(plan, num_prompts, under_way.log_probs)
    return Trajectory(
        plan=plan,
        draws=under_way.draws,
        x0=under_way.latents,
        transitions=tuple(under_way.kept),
        coeffs=under_way.coeffs,
        evaluations=under_way.evaluations,
    )


def _start(sampler: Sampler, plan: Plan, draws: Draws) -> Tensor:
    """Start noise of the `plan.width` rows of each prompt: that of the first sample behind a row."""
    seed = draws.start_seed
    if plan.width < plan.num_candidates:
        first = plan.num_candidates * np.arange(len(draws.prompt_index))[:, None] + plan.roots()
        seed = seed[torch.from_numpy(first.ravel()).to(seed.device, non_blocking=True)]
    return philox_normal(seed, sampler.policy.model.latent_shape, stream=START_NOISE_STREAM)


class _Answer(NamedTuple):
    """One ask of a step."""

    ask: Ask
    given: StepInput
    result: StepResult


@dataclass(slots=True, eq=False)
class _UnderWay:
    """The rows of a walk, all before the same step, and what is kept of their way."""

    sampler: Sampler
    plan: Plan
    coeffs: Tensor  # [N, 8], on the device
    conditioning: Conditioning  # one row per sample, as the draws
    draws: Draws
    latents: Tensor
    repeats: _Repeats | None
    x0_pred: Tensor | None = None  # of the step before, where something reads it
    kept: list[Transitions] = field(default_factory=list)
    # Of each ask: the place of its step, its rows after the step (None = all), its log-probs.
    log_probs: list[tuple[int, Tensor | None, Tensor]] = field(default_factory=list)
    evaluations: int = 0
    _fed: tuple[Tensor | None, Conditioning] | None = (
        None  # the samples last asked for, and their conditioning
    )

    def __post_init__(self) -> None:
        """Samples that repeat a walk begin where it began."""
        if self.repeats is not None:
            self.latents.index_copy_(0, self.repeats.index, self.repeats.states[0])

    def asked(self, place: int, ask: Ask) -> tuple[Policy, Wanted, Ask]:
        """Who is asked, and for what: known before the walk begins."""
        wanted = Wanted(
            fan=ask.fan,
            rows=ask.rows,
            noisy=ask.noisy,
            reads_x0=self.plan.reads_x0(place),
            gives_x0=self.plan.gives_x0(place),
            gives_velocity=self.plan.steps[place].cut is not None or self._repeats_at(place),
            # At every step, kept or not: captured steps of one shape stay one graph.
            gives_unconditional=self.sampler.keeps_unconditional and self.sampler.policy.halves == 2,
        )
        return self.sampler.asked(ask), wanted, ask

    def given(self, ask: Ask) -> StepInput:
        """What a step reads of the rows that are asked."""
        index = ask.sample_index
        if (
            self._fed is None or self._fed[0] is not index
        ):  # else as at the step before: nothing is gathered anew
            self._fed = index, self.conditioning if index is None else self.conditioning.rows(index)
        return StepInput(
            latents=_taken(self.latents, ask.head_index),
            conditioning=self._fed[1],
            seed=_taken(self.draws.seed, ask.seed_index),
            row=ask.row if ask.row_index is None else ask.row_index,
            x0_pred=None if self.x0_pred is None else _taken(self.x0_pred, ask.head_index),
        )

    def answer(self, place: int, policy: Policy, wanted: Wanted, ask: Ask) -> _Answer:
        """The children of some rows."""
        given, graphs = self.given(ask), self.sampler.graphs
        if graphs is None:
            result = take_step(policy, given, self.coeffs, wanted)
        else:
            result = graphs.take_step(policy, given, wanted)
        if self.repeats is not None and self._repeats_at(place):
            result = self.repeats.imposed(place, given, result, self.coeffs)
        if ask.trained:
            step = _transitions(place, ask, given, result, self.coeffs)
            self.kept.append(step if self.sampler.keeps_next else step.states())
        self.log_probs.append((place, ask.edge_index, result.out.log_prob))
        self.evaluations += ask.num_heads * policy.halves
        return _Answer(ask, given, result)

    def move(self, layout: StepLayout, answers: Sequence[_Answer]) -> None:
        """One step further: children go to their places, rows that wait to theirs."""
        if len(answers) == 1 and answers[0].ask.edge_index is None:
            out = answers[0].result.out
            self.latents, self.x0_pred = out.next_latents, out.x0_pred
            return
        shape = layout.num_rows, *self.latents.shape[1:]
        after, x0_pred = self.latents.new_empty(shape), None
        for ask, _, result in answers:
            assert ask.edge_index is not None, "several asks, or rows that wait: none has all edges"
            after.index_copy_(0, ask.edge_index, result.out.next_latents)
            if result.out.x0_pred is not None:
                x0_pred = result.out.x0_pred.new_zeros(shape) if x0_pred is None else x0_pred
                x0_pred.index_copy_(0, ask.edge_index, result.out.x0_pred)
        if layout.idle is not None:
            before_index, after_index = layout.idle
            after.index_copy_(0, after_index, self.latents.index_select(0, before_index))
        self.latents, self.x0_pred = after, x0_pred

    def cut(self, answer: _Answer, cut: Cut, score: PreviewScore | None) -> None:
        """Goes on with fewer samples, and with what is kept of them."""
        ask, given, result = answer
        draws, num_prompts = self.draws, len(self.draws.prompt_index)
        assert ask.fan == 1, "a cut is of samples"
        assert result.velocity is not None
        seen = Candidates(
            latents=given.latents,
            velocity=result.velocity,
            guidance=result.guidance,
            coeffs=self.coeffs,
            step=ask.row,
            x0_pred=result.out.x0_pred,
            num_groups=num_prompts,
            grid=self.sampler.policy.model.latent_grid,
        )
        index = survivors(seen, cut, score)
        held = [self.latents, draws.group_id, draws.seed, draws.start_seed]
        held += [] if self.x0_pred is None else [self.x0_pred]
        for kept in self.kept:
            held += [kept.next_latents, kept.log_prob]
            if kept.fan == 1:
                held += [kept.latents] if kept.unconditional is None else [kept.latents, kept.unconditional]
        moved = _gathered(index, held)
        samples = np.arange(num_prompts * cut.size)[:, None]
        on_device = torch.arange(len(samples), device=index.device)[:, None]
        offsets = np.arange(num_prompts + 1) * cut.size
        self.kept = [_survived(kept, moved, on_device, samples, offsets) for kept in self.kept]
        self.latents = moved[self.latents]
        self.x0_pred = None if self.x0_pred is None else moved[self.x0_pred]
        self.draws = replace(
            draws,
            group_id=moved[draws.group_id],
            seed=moved[draws.seed],
            start_seed=moved[draws.start_seed],
        )
        self.conditioning, self._fed = self.conditioning.rows(index), None

    def _repeats_at(self, place: int) -> bool:
        return self.repeats is not None and place + 1 < len(self.repeats.states)


@dataclass(frozen=True, slots=True, eq=False)
class _Repeats:
    """Samples that go where they once went, up to where their own steps begin."""

    index: Tensor  # [N] int64
    states: tuple[Tensor, ...]  # [N, *S] each, as of `Imposed`

    @staticmethod
    def of(imposed: Imposed, plan: Plan, device: torch.device) -> _Repeats:
        """On the device."""
        assert plan.width == plan.num_candidates, "walks are imposed on samples, not on groups"
        assert not plan.cuts, "no sample that repeats a walk is cut"
        return _Repeats(torch.from_numpy(imposed.samples).to(device, non_blocking=True), imposed.states)

    def imposed(self, place: int, given: StepInput, result: StepResult, coeffs: Tensor) -> StepResult:
        """A step in which they do, scored as the policy scores it that is asked now."""
        assert result.velocity is not None
        assert isinstance(given.row, int)
        after, guidance = self.states[place + 1], result.guidance
        if guidance is not None:
            guidance = Guidance(guidance.negative_velocity.index_select(0, self.index), guidance.scale)
        log_prob = flow_log_prob(
            given.latents.index_select(0, self.index),
            result.velocity.index_select(0, self.index),
            after,
            coeffs,
            given.row,
            guidance=guidance,
        )
        out = result.out._replace(
            next_latents=result.out.next_latents.index_copy(0, self.index, after),
            log_prob=result.out.log_prob.index_copy(0, self.index, log_prob),
        )
        return replace(result, out=out)


def _transitions(place: int, ask: Ask, given: StepInput, result: StepResult, coeffs: Tensor) -> Transitions:
    """The kept edges of a step."""
    assert ask.kept_row is not None
    assert ask.samples is not None
    assert ask.samples_host is not None
    if ask.row_index is None:
        sigma = coeffs[ask.row, 0].expand(ask.num_heads)
    else:
        sigma = coeffs[:, 0].index_select(0, ask.kept_row[:: ask.kept_fan])
    return Transitions(
        row=ask.kept_row,
        latents=given.latents,
        next_latents=_taken(result.out.next_latents, ask.kept_index),
        log_prob=_taken(result.out.log_prob, ask.kept_index),
        samples=ask.samples,
        samples_host=ask.samples_host,
        sigma=sigma,
        offsets=ask.offsets,
        unconditional=result.unconditional,
        level=ask.level,
        fan=ask.kept_fan,
        place=place,
        rows=ask.rows,
    )


def _survived(
    kept: Transitions, moved: dict[Tensor, Tensor], samples: Tensor, samples_host: Index, offsets: Index
) -> Transitions:
    """The transitions of the samples that go on, numbered anew; each has one edge a step, all by one row."""
    num_samples, alone = len(samples_host), kept.fan == 1
    return replace(
        kept,
        row=kept.row[:num_samples],
        # Rows that a group shares all stay, with fewer children.
        latents=moved[kept.latents] if alone else kept.latents,
        next_latents=moved[kept.next_latents],
        log_prob=moved[kept.log_prob],
        samples=samples,
        samples_host=samples_host,
        sigma=kept.sigma[:num_samples] if alone else kept.sigma,
        offsets=offsets if alone else kept.offsets,
        unconditional=moved[kept.unconditional]
        if alone and kept.unconditional is not None
        else kept.unconditional,
        fan=1 if alone else num_samples // (len(offsets) - 1),
    )


def _gathered(index: Tensor, values: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Rows `index` of each, by itself. What a step ends at the next begins with: one tensor, which moves once."""
    distinct = list(dict.fromkeys(values))
    moved: list[Tensor] = []
    for first in range(0, len(distinct), _MOST_BUFFERS):
        moved += compact(index, *distinct[first : first + _MOST_BUFFERS])
    return dict(zip(distinct, moved, strict=True))


def _taken(values: Tensor, index: Tensor | None) -> Tensor:
    return values if index is None else values.index_select(0, index)


def check_finite(
    plan: Plan, num_prompts: int, log_probs: Sequence[tuple[int, Tensor | None, Tensor]]
) -> None:
    """Refuses a walk with a NaN or infinite velocity: log-probs are not finite exactly there. Waits once.

    Args:
        plan: what was walked.
        log_probs: of each ask the place of its step, its rows after the step (None = all), and their log-probs.

    Raises:
        ValueError: names the first step and sample, as samples are numbered in that step.
    """
    if bool(torch.isfinite(torch.cat([log_prob for _, _, log_prob in log_probs])).all()):
        return
    sizes, first, hit = plan.candidates(), -1, dict[int, set[int]]()
    for place, index, log_prob in log_probs:
        if first >= 0 and any(step.cut for step in plan.steps[first:place]):
            break  # after a cut others have these numbers
        bad = ~torch.isfinite(log_prob)
        edges = (torch.arange(len(bad), device=bad.device) if index is None else index)[bad].tolist()
        for edge in edges:
            prompt, child = divmod(edge, len(plan.steps[place].parent))
            leaves = plan.behind()[place][child]
            hit.setdefault(place, set()).update(prompt * sizes[place] + leaf for leaf in leaves)
        first = min(hit, default=-1)
    raise ValueError(
        f"the velocity is NaN or infinite at step {plan.steps[first].step}, sample {min(hit[first])} "
        f"({len(set().union(*hit.values()))} of {num_prompts * sizes[first]} samples are hit); lower the learning "
        "rate or the guidance scale, or run in a wider precision"
    )
