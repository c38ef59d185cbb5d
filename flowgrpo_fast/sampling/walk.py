"""Walks a policy along a plan: every sampler, tree and funnel of the field goes through here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flowgrpo_fast.ops import Guidance, compact, flow_log_prob, philox_normal
from flowgrpo_fast.sampling.graphs import Graphs
from flowgrpo_fast.sampling.policy import Policy
from flowgrpo_fast.sampling.prune import Candidates, survivors
from flowgrpo_fast.sampling.step import Ask, Forwards, StepInput, StepResult, Wanted, lay_out, take_step
from flowgrpo_fast.schedule.plan import Index, Plan
from flowgrpo_fast.types import Conditioning, Draws, Imposed, PreviewScore, Trajectory, Transitions

START_NOISE_STREAM = 1  # stream 0 is the noise of the steps


@dataclass(frozen=True, slots=True)
class Sampler:
    """Who is asked along a plan, and how many rows at once."""

    policy: Policy
    forwards: Forwards
    outside: Policy | None = (
        None  # asked at rows whose edges are not kept, say a copy in low precision; None = policy
    )
    graphs: Graphs | None = None  # captured steps, replayed where they fit; None launches each kernel
    # Whether the update will read the unconditional half of guidance that the rollout computes at kept steps.
    keeps_unconditional: bool = False

    def asked(self, ask: Ask, level: Tensor) -> Policy:
        """The policy of an ask, its expert where all rows are at one sigma, 0-d on the host."""
        policy = self.policy if ask.trained or self.outside is None else self.outside
        return policy.at(level if ask.uniform else None)


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
    coeffs = plan.coeffs.to(device, non_blocking=True)
    layouts = lay_out(plan, num_prompts, sampler.forwards, device)
    roots = torch.from_numpy(_over_prompts(plan.roots(), num_prompts, plan.num_candidates))
    own = (
        draws.start_seed
        if plan.width == plan.num_candidates
        else draws.start_seed[roots.to(device, non_blocking=True)]
    )
    latents = philox_normal(own, sampler.policy.model.latent_shape, stream=START_NOISE_STREAM)
    if imposed is not None:
        assert plan.width == plan.num_candidates and not plan.cuts, (
            "a walk is imposed on samples, not on groups"
        )
        imposed_index = torch.from_numpy(imposed.samples).to(device, non_blocking=True)
        latents.index_copy_(0, imposed_index, imposed.states[0])
    fed = _Fed(conditioning)
    num_imposed = 0 if imposed is None else len(imposed.states) - 1
    wanted = [
        _wanted(sampler, plan, place, layout.asks, place < num_imposed)
        for place, layout in enumerate(layouts)
    ]
    if sampler.graphs is not None:
        steps = [
            (sampler.asked(ask, coeffs_level(plan, ask)), want, ask)
            for layout, wants in zip(layouts, wanted, strict=True)
            for ask, want in zip(layout.asks, wants, strict=True)
        ]
        first = layouts[0].asks[0]
        given = StepInput(latents, fed.rows(first.first_samples), draws.seed, 0)
        sampler.graphs.begin(steps, given, coeffs)
    x0_pred: Tensor | None = None
    kept: list[Transitions] = []
    log_probs: list[tuple[int, Tensor, Index]] = []
    evaluations = 0
    for place, (step, layout) in enumerate(zip(plan.steps, layouts, strict=True)):
        alone = len(layout.asks) == 1 and layout.idle is None
        after = None if alone else latents.new_empty(layout.num_rows, *latents.shape[1:])
        after_x0 = None
        seen: Candidates | None = None
        for ask, want in zip(layout.asks, wanted[place], strict=True):
            level = coeffs_level(plan, ask)
            policy = sampler.asked(ask, level)
            given = StepInput(
                latents=_taken(latents, ask.head_index),
                conditioning=fed.rows(ask.first_samples),
                seed=_taken(draws.seed, ask.seed_index),
                row=ask.row,
                x0_pred=None if x0_pred is None else _taken(x0_pred, ask.head_index),
            )
            if sampler.graphs is None:
                result = take_step(policy, given, coeffs, want)
            else:
                result = sampler.graphs.take_step(policy, given, want)
            if imposed is not None and place < num_imposed:
                result = _repeated(given, result, coeffs, imposed_index, imposed.states[place + 1])
            evaluations += ask.num_heads * policy.halves
            log_probs.append((step.step, result.out.log_prob, np.repeat(ask.first_samples, ask.fan)))
            if ask.trained:
                assert layout.samples is not None
                kept.append(_transitions(place, ask, given, result, coeffs, layout.samples, level))
            if after is None and ask.edge_index is None:
                next_latents, next_x0 = result.out.next_latents, result.out.x0_pred
            else:
                if after is None:
                    after = latents.new_empty(layout.num_rows, *latents.shape[1:])
                next_latents = after.index_copy_(0, _all(ask.edge_index, after), result.out.next_latents)
                if result.out.x0_pred is not None:
                    if after_x0 is None:
                        after_x0 = result.out.x0_pred.new_zeros(layout.num_rows, *latents.shape[1:])
                    after_x0.index_copy_(0, _all(ask.edge_index, after), result.out.x0_pred)
                next_x0 = after_x0
            if step.cut is not None:
                assert alone and ask.fan == 1 and isinstance(ask.row, int) and result.velocity is not None
                seen = Candidates(
                    latents=given.latents,
                    velocity=result.velocity,
                    guidance=result.guidance,
                    coeffs=coeffs,
                    step=ask.row,
                    x0_pred=result.out.x0_pred,
                    num_groups=num_prompts,
                    grid=sampler.policy.model.latent_grid,
                )
        if layout.idle is not None:
            before_index, after_index = layout.idle
            next_latents.index_copy_(0, after_index, latents.index_select(0, before_index))
        latents, x0_pred = next_latents, next_x0
        if step.cut is not None:
            assert seen is not None
            index = survivors(seen, step.cut, score)
            moved = compact(index, latents, draws.group_id, draws.seed, draws.start_seed)
            latents = moved[0]
            draws = replace(draws, group_id=moved[1], seed=moved[2], start_seed=moved[3])
            x0_pred = None if x0_pred is None else compact(index, x0_pred)[0]
            kept = [_survived(t, index, step.cut.size, num_prompts) for t in kept]
            fed = _Fed(fed.whole.rows(index))
    check_finite(log_probs)
    return Trajectory(plan, draws, latents, tuple(kept), coeffs, evaluations)


def _repeated(
    given: StepInput, result: StepResult, coeffs: Tensor, samples: Tensor, after: Tensor
) -> StepResult:
    """A step in which some samples go where they once went."""
    assert result.velocity is not None and isinstance(given.row, int)
    guidance = result.guidance
    if guidance is not None:
        guidance = Guidance(guidance.negative_velocity.index_select(0, samples), guidance.scale)
    log_prob = flow_log_prob(
        given.latents.index_select(0, samples),
        result.velocity.index_select(0, samples),
        after,
        coeffs,
        given.row,
        guidance=guidance,
    )
    out = result.out._replace(
        next_latents=result.out.next_latents.index_copy(0, samples, after),
        log_prob=result.out.log_prob.index_copy(0, samples, log_prob),
    )
    return replace(result, out=out)


def coeffs_level(plan: Plan, ask: Ask) -> Tensor:
    """The sigma of an ask's rows, 0-d on the host; of the first one's where they differ."""
    return plan.coeffs[ask.row, 0] if isinstance(ask.row, int) else plan.sigmas[0]


class _Fed:
    """The conditioning of the rows that are asked, gathered anew only when they are others than before."""

    def __init__(self, whole: Conditioning) -> None:
        self.whole = whole
        self._index: Index | None = None
        self._rows = whole

    def rows(self, index: Index) -> Conditioning:
        """The rows of samples `index` (host)."""
        if self._index is None or not np.array_equal(self._index, index):
            embeds, self._index = self.whole.prompt_embeds, index
            if np.array_equal(index, np.arange(len(embeds))):
                self._rows = self.whole
            else:
                on_device = torch.from_numpy(np.ascontiguousarray(index)).to(embeds.device, non_blocking=True)
                self._rows = self.whole.rows(on_device)
        return self._rows


def _wanted(
    sampler: Sampler, plan: Plan, place: int, asks: tuple[Ask, ...], is_imposed: bool
) -> list[Wanted]:
    return [
        Wanted(
            fan=ask.fan,
            rows=ask.rows,
            reads_x0=plan.reads_x0(place),
            gives_x0=plan.gives_x0(place),
            gives_velocity=plan.steps[place].cut is not None or is_imposed,
            gives_unconditional=sampler.keeps_unconditional and sampler.policy.halves == 2,
        )
        for ask in asks
    ]


def _transitions(
    place: int, ask: Ask, given: StepInput, result: StepResult, coeffs: Tensor, samples: Index, level: Tensor
) -> Transitions:
    """The kept edges of a step."""
    if isinstance(ask.row, int):
        row = torch.full((ask.num_heads * ask.fan,), ask.row, device=coeffs.device)
    else:
        row = ask.row
    row = _taken(row, ask.kept_index)
    return Transitions(
        row=row,
        latents=given.latents,
        next_latents=_taken(result.out.next_latents, ask.kept_index),
        log_prob=_taken(result.out.log_prob, ask.kept_index),
        samples=torch.from_numpy(samples).to(row.device, non_blocking=True),
        samples_host=samples,
        sigma=coeffs[:, 0].index_select(0, row[:: ask.kept_fan]),
        offsets=ask.offsets,
        unconditional=result.unconditional,
        level=level if ask.uniform else None,
        fan=ask.kept_fan,
        place=place,
        rows=ask.rows,
    )


def _survived(kept: Transitions, index: Tensor, size: int, num_prompts: int) -> Transitions:
    """The transitions of the candidates that go on, `size` of each prompt; each had one edge a step."""
    edges = compact(index, kept.next_latents, kept.log_prob, kept.row)
    behind = np.arange(len(index))[:, None]
    samples = torch.arange(len(index), device=index.device)[:, None]
    if kept.fan > 1:  # the prompts' shared rows all stay, with fewer children
        return replace(
            kept,
            row=edges[2],
            next_latents=edges[0],
            log_prob=edges[1],
            samples=samples,
            samples_host=behind,
            fan=size,
        )
    heads = [kept.latents, kept.sigma]
    heads += [] if kept.unconditional is None else [kept.unconditional]
    moved = compact(index, *heads)
    return replace(
        kept,
        row=edges[2],
        latents=moved[0],
        next_latents=edges[0],
        log_prob=edges[1],
        samples=samples,
        samples_host=behind,
        sigma=moved[1],
        offsets=np.arange(num_prompts + 1) * size,
        unconditional=None if kept.unconditional is None else moved[2],
    )


def _taken(values: Tensor, index: Tensor | None) -> Tensor:
    return values if index is None else values.index_select(0, index)


def _all(index: Tensor | None, values: Tensor) -> Tensor:
    return torch.arange(len(values), device=values.device) if index is None else index


def _over_prompts(index: Index, num_prompts: int, size: int) -> Index:
    """Places within a prompt's samples -> those of all prompts'."""
    return (np.arange(num_prompts)[:, None] * size + index).ravel()


def check_finite(log_probs: list[tuple[int, Tensor, Index]]) -> None:
    """Refuses a rollout with a NaN or infinite velocity: a step's log-probs are not finite exactly there. Waits once.

    Args:
        log_probs: of each step its number, its log-probs `[E]`, and the first sample behind each (host).

    Raises:
        ValueError: names the first step and sample.
    """
    if bool(torch.stack([torch.isfinite(log_prob).all() for _, log_prob, _ in log_probs]).all()):
        return
    step, bad, sample = next(
        (number, ~torch.isfinite(log_prob), samples)
        for number, log_prob, samples in log_probs
        if not torch.isfinite(log_prob).all()
    )
    raise ValueError(
        f"the velocity is NaN or infinite at step {step}, sample {sample[int(bad.nonzero()[0])]} "
        f"({int(bad.sum())} of {len(bad)} samples are hit); lower the learning rate or the guidance "
        "scale, or run in a wider precision"
    )
