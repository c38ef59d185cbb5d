"""Calls with more asked of them: guidance, a second-order solver, gradients of residuals, rewards kept apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import Workload, make_workload, unfused_step
from benchmarks.cases import SD3, TOY, Case, Run, Selection, Size, nbytes
from benchmarks.cases.group import NUM_PROMPTS, NUM_REWARDS, advantages_by_prompt
from benchmarks.cases.matching import Predictions, make_predictions, mean_of
from flowgrpo_fast.ops import Guidance, compact, flow_step, group_advantages, matching, reference
from flowgrpo_fast.schedule.dynamics import DPMSolver2M, coefficients

SELECTION: Selection = ((SD3, torch.float32), (TOY, torch.float32))
SCALE = 4.5
STEP = 4  # of the solver: one with a step before it
WEIGHTS = (1.0, 0.5, 0.25)  # of the rewards

Errors = Callable[[Tensor], tuple[Tensor, ...]]


def guided_steps(w: Workload, negative: Tensor) -> dict[str, Run]:
    """A sampling step under guidance: ours, guidance and the trainer's step op by op, and compiled."""

    def eager() -> tuple[Tensor, Tensor]:
        return unfused_step(w, negative + SCALE * (w.velocity - negative))

    @torch.compile
    def compiled() -> tuple[Tensor, Tensor]:
        noise = torch.randn(w.velocity.shape, device=w.velocity.device)
        guidance = Guidance(negative, SCALE)
        return reference.flow_step(w.latents, w.velocity, w.coeffs, w.step_index, noise, guidance)[:2]

    guidance = Guidance(negative, SCALE)
    return {
        "ours": lambda: flow_step(w.latents, w.velocity, w.coeffs, w.step_index, w.seed, guidance)[:2],
        "eager": eager,
        "compiled": compiled,
    }


def multistep(w: Workload, sigmas: Tensor, x0_prev: Tensor) -> tuple[Tensor, Tensor]:
    """DPM-Solver++ 2M as schedulers have it: schedule on the host, two differences, three terms."""
    previous, now, following = (sigmas[STEP + k] for k in (-1, 0, 1))
    log_snr = [torch.log(1 - sigma) - torch.log(sigma) for sigma in (previous, now, following)]
    h, h_before = log_snr[2] - log_snr[1], log_snr[1] - log_snr[0]
    sample = w.latents.float()
    x0 = sample - now * w.velocity.float()
    first, second = x0, (h / h_before) * (x0 - x0_prev)
    weight = (1 - following) * (torch.exp(-h) - 1)
    return ((following / now) * sample - weight * first - 0.5 * weight * second).to(w.latents.dtype), x0


def solver_steps(w: Workload, x0_prev: Tensor) -> dict[str, Run]:
    """Next latents and x0 prediction of a second-order step, without noise."""
    sigmas = w.sigmas.cpu()
    rules = [DPMSolver2M()] * (len(sigmas) - 1)
    coeffs = coefficients(sigmas.double().numpy(), rules).to(w.latents.device)

    def ours() -> tuple[Tensor, Tensor | None]:
        out = flow_step(w.latents, w.velocity, coeffs, STEP, w.seed, x0_prev=x0_prev, return_x0_pred=True)
        return out.next_latents, out.x0_pred

    @torch.compile
    def compiled() -> tuple[Tensor, Tensor]:
        noise = x0_prev.new_zeros(())
        following, _, x0 = reference.flow_step(w.latents, w.velocity, coeffs, STEP, noise, x0_prev=x0_prev)
        return following, x0

    return {"ours": ours, "eager": lambda: multistep(w, sigmas, x0_prev), "compiled": compiled}


def weighted_errors(p: Predictions, weight: Tensor) -> dict[str, Errors]:
    """The error under a map of weights, as advantage-weighted losses have it."""

    def eager(velocity: Tensor) -> tuple[Tensor]:
        return (mean_of(weight * (velocity.float() - p.target.float()) ** 2),)

    def same(velocity: Tensor) -> tuple[Tensor]:
        return (reference.matching(velocity, p.target, weight=weight)["error"],)

    return {
        "ours": lambda velocity: matching(velocity, p.target, weight=weight)[:1],
        "eager": eager,
        "compiled": torch.compile(same),
    }


def preference_errors(p: Predictions) -> dict[str, Errors]:
    """Errors of the policy and of the reference, as Diffusion-DPO subtracts them."""

    def ours(velocity: Tensor) -> tuple[Tensor, ...]:
        means = matching(velocity, p.target, reference_velocity=p.reference_velocity)
        assert means.reference_error is not None
        return means.error, means.reference_error

    def eager(velocity: Tensor) -> tuple[Tensor, ...]:
        target = p.target.float()
        with torch.no_grad():
            reference_error = mean_of((p.reference_velocity.float() - target) ** 2)
        return mean_of((velocity.float() - target) ** 2), reference_error

    def same(velocity: Tensor) -> tuple[Tensor, ...]:
        means = reference.matching(velocity, p.target, reference_velocity=p.reference_velocity)
        return means["error"], means["reference_error"]

    return {"ours": ours, "eager": eager, "compiled": torch.compile(same)}


def with_gradient(errors: Errors, velocity: Tensor) -> Run:
    """The errors, and the gradient of a loss whose derivatives by the first are given."""
    leaf = velocity.clone().requires_grad_()
    incoming = torch.linspace(-1, 1, len(velocity), device=velocity.device)

    def run() -> Any:
        found = errors(leaf)
        return torch.autograd.grad(found[0], leaf, incoming)[0], *(each.detach() for each in found)

    return run


def apart_cases(size: Size, device: torch.device) -> Iterator[Case]:
    """Three rewards normalised one by one: their weighted sum, and each for a loss of its own."""
    group_id = torch.arange(NUM_PROMPTS, device=device).repeat_interleave(size.batch)
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(len(group_id), NUM_REWARDS, generator=generator).to(device)
    weight = torch.tensor(WEIGHTS, device=device)
    formula = torch.compile(reference.group_advantages)
    arguments = (rewards, group_id, NUM_PROMPTS, WEIGHTS)

    def eager(aggregate: str) -> Tensor:
        each = weight * advantages_by_prompt(rewards, group_id, "group")
        return each.sum(1) if aggregate == "per_objective" else each

    for aggregate, written in (("per_objective", rewards[:, 0]), ("separate", rewards)):
        runs = {
            "ours": partial(group_advantages, *arguments, aggregate),
            "eager": partial(eager, aggregate),
            "compiled": partial(formula, *arguments, aggregate),
        }
        name = f"group_advantages, {aggregate.replace('_', ' ')}"
        yield Case(name, size, torch.float32, nbytes(rewards, group_id, written), runs)


def compact_case(size: Size, dtype: torch.dtype, device: torch.device) -> Case:
    """The surviving half of three latents, into tensors that exist: what a captured graph reads."""
    generator = torch.Generator().manual_seed(2)
    buffers = [torch.randn(size.shape, generator=generator).to(device, dtype) for _ in range(3)]
    survivors = torch.randperm(size.batch, generator=generator)[: max(size.batch // 2, 1)].to(device)
    kept = {name: [buffer[survivors] for buffer in buffers] for name in ("ours", "eager", "compiled")}

    def eager() -> list[Tensor]:
        return [
            torch.index_select(buffer, 0, survivors, out=out)
            for buffer, out in zip(buffers, kept["eager"], strict=True)
        ]

    @torch.compile
    def compiled() -> list[Tensor]:
        gathered = zip(reference.compact(survivors, *buffers), kept["compiled"], strict=True)
        return [out.copy_(values) for values, out in gathered]

    runs = {
        "ours": lambda: list(compact(survivors, *buffers, out=kept["ours"])),
        "eager": eager,
        "compiled": compiled,
    }
    return Case("compact, in place", size, dtype, 2 * nbytes(*kept["ours"]) + nbytes(survivors), runs)


def cases(size: Size, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Steps read latents, velocity and one tensor more; the residuals' backward writes a gradient."""
    w = make_workload(size.shape, dtype)
    w = Workload(*(value.to(device) for value in vars(w).values()))
    other = w.velocity.flip(0).contiguous()
    whole, small = nbytes(w.latents), nbytes(w.coeffs, w.seed) + 4 * size.batch
    moved = 4 * whole + small + nbytes(w.step_index)
    yield Case("sampling_with_guidance", size, dtype, moved, guided_steps(w, other))
    steps = solver_steps(w, other.float())
    yield Case("solver_step, second order", size, dtype, 3 * whole + 8 * size.elements + small, steps)
    p = make_predictions(size.shape, dtype, device)
    weight = 0.5 + p.old_velocity[:, :1].float().abs()
    for name, functions, read in (
        ("weighted_matching", weighted_errors(p, weight), nbytes(p.velocity, p.target, weight)),
        ("dpo", preference_errors(p), nbytes(p.velocity, p.target, p.reference_velocity) + 4 * size.batch),
    ):
        run = {contender: with_gradient(errors, p.velocity) for contender, errors in functions.items()}
        yield Case(f"{name}_and_backward", size, dtype, read + whole + 4 * size.batch, run)
    yield compact_case(size, dtype, device)
    if dtype is torch.float32:
        yield from apart_cases(size, device)
