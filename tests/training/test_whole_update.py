"""A whole update of each recipe, against the authors' loop written out in fp64: who is in which optimiser step, what
the mean divides by, advantages, loss, clip, AdamW and moving averages. The loop shares no code with the product's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowgrpo_fast.ops import philox_normal
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.recipes import RECIPES
from flowgrpo_fast.training.engine import Engine, build_engine
from flowgrpo_fast.training.loop import make_batch
from flowgrpo_fast.training.update import update
from flowgrpo_fast.types import Batch, Scored, Scores
from tests.training.steps import CPU, drawn, weights
from tests.training.test_update import in_fp64, moved

PROMPTS, ORDER_STREAM = 4, 7


def rewards(num_prompts: int, group_size: int) -> Tensor:
    """Two objectives `[B, 2]` in fp64; every score of the second group is equal, and one of the first is its mean.

    In 64ths: sums are exact, and so is an advantage of 0.
    """
    table = (64 * np.random.default_rng(5).normal(size=(num_prompts, group_size, 2))).round() / 64
    table[1] = table[1, :1]
    table[0, 3] = 0.25
    table[0, 2] += group_size * 0.25 - table[0].sum(0)  # the mean of the first group is 0.25
    return torch.from_numpy(table.reshape(-1, 2))


def judged(engine: Engine, values: Tensor) -> Batch:
    """A rollout of the engine with these scores, everything of it in fp64 from here on."""
    recipe = engine.recipe
    draws = drawn(recipe, engine.step, len(engine.prompts))
    samples = recipe.experience.collect(engine.stage, draws, engine.step).scored().samples
    named = {"first": values[:, 0], "second": values[:, 1]}
    scores = Scores(total=values @ torch.tensor(WEIGHTS, dtype=values.dtype), objectives=named)
    scored = Scored(samples, scores, dict(zip(named, WEIGHTS, strict=True)))
    return in_fp64(make_batch(engine, scored))


WEIGHTS = (1.5, 0.5)

# ------------------------------------------------------------------------------ the authors' loops, in numpy and torch


def flow_grpo_advantages(values: np.ndarray, group: int) -> np.ndarray:
    """Mean of the prompt, std of the batch, of the weighted sum."""
    total = (values * WEIGHTS).sum(1)
    mean = total.reshape(-1, group).mean(1).repeat(group)
    return (total - mean) / (total.std() + 1e-4)


def sample_std_advantages(values: np.ndarray, group: int, shares: tuple[float, float]) -> np.ndarray:
    """DanceGRPO and MixGRPO: a z-score of each reward with the sample's std, weighted and summed."""
    total = np.zeros(len(values))
    for column, share in zip(values.T, shares, strict=True):
        own = column.reshape(-1, group)
        z = (own - own.mean(1, keepdims=True)) / (own.std(1, ddof=1, keepdims=True) + 1e-8)
        total += share * z.ravel()
    return total


def tree_advantages(values: np.ndarray, group: int, depth: int, fan: int) -> np.ndarray:
    """TreeGRPO's plain mean over children, [B, depth]: of the edge on each leaf's way at each depth."""
    total = (values * WEIGHTS).sum(1)
    own = total.reshape(-1, group)
    leaf = ((own - own.mean(1, keepdims=True)) / (own.std(1, keepdims=True) + 1e-8)).clip(-5, 5).ravel()
    columns = []
    for level in range(depth):
        behind = fan ** (depth - level - 1)
        columns.append(leaf.reshape(-1, behind).mean(1).repeat(behind))
    return np.stack(columns, 1)


def shuffled(recipe: Recipe, keep: np.ndarray, epoch: int = 0) -> list[np.ndarray]:
    """Flow-GRPO: samples of advantage 0 go, some come back until the parts are equal, the rest is shuffled and cut."""
    order = np.random.default_rng([recipe.seed, ORDER_STREAM, 0, epoch]).permutation(len(keep))
    num_updates = recipe.optimizer.num_updates
    mask = keep.copy()
    false = [sample for sample in order if not keep[sample]]
    if mask.sum() % num_updates:
        mask[false[: num_updates - mask.sum() % num_updates]] = True
    return np.split(np.array([sample for sample in order if mask[sample]]), num_updates)


def across(group: int, num_updates: int) -> list[np.ndarray]:
    """DanceGRPO, MixGRPO: a device has a prompt and steps after every `group / num_updates` of its samples."""
    each = group // num_updates
    return [
        np.array([prompt * group + place * each + i for prompt in range(PROMPTS) for i in range(each)])
        for place in range(num_updates)
    ]


def guided(model: Any, x: Tensor, sigma: Tensor, conditioning: Any, scale: float, constant: bool) -> Tensor:
    """Classifier-free guidance; with gradient in both halves, or `constant` in the unconditional one."""
    velocity = model.velocity(x, sigma, conditioning)
    if scale == 1:
        return velocity
    negative = model.velocity(x, sigma, conditioning.negative())
    negative = negative.detach() if constant else negative
    return negative + scale * (velocity - negative)


def kept_steps(batch: Batch) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """Of each kept step: its row of the table, latents before and after `[B, *S]`, old log-probs `[B]`."""
    found = []
    for kept in batch.samples.transitions:
        row = batch.samples.plan.steps[kept.place].step
        edge = torch.empty(len(batch), dtype=torch.int64)
        edge[kept.samples] = torch.arange(len(kept.row))[:, None]
        head = edge // kept.fan
        found.append((row, kept.latents[head], kept.next_latents[edge], kept.log_prob[edge]))
    return found


def path_loss(
    recipe: Recipe, model: Any, start: Any, batch: Batch, rows: np.ndarray, worth: Tensor
) -> Tensor:
    """Clipped ratios and Flow-GRPO's KL: a mean over the samples of the step and what each trains on."""
    samples, index = batch.samples, torch.from_numpy(rows)
    (beta,) = [part.beta for part in recipe.objective.regularizers] or [0.0]
    clip = recipe.objective.trust.range
    steps = kept_steps(batch)
    num_trained = samples.plan.num_trained
    # Where a sample trains on some of its steps: which, a function of (seed, step), as the rollout's choices.
    taken = batch.choices.taken(len(steps), num_trained)
    total = torch.zeros((), dtype=torch.float64)
    for column, (row, before, after, old) in enumerate(steps):
        here = torch.from_numpy((taken[rows] == column).any(1))
        sigma, a, b, _, _, inv_var, log_norm, _ = samples.coeffs[row].double()
        # 2 q^2, from numbers that are kept in fp32.
        interval = (samples.plan.sigmas[row] - samples.plan.sigmas[row + 1]).double()
        twice_rate = (2 * samples.coeffs[row, 3].square()).double() / interval
        x, cond = before[index], batch.conditioning.rows(index)
        levels, constant = sigma.expand(len(x)), not recipe.unconditional_gradient
        mean = a * x + b * guided(model, x, levels, cond, recipe.guidance_scale, constant)
        log_prob = -0.5 * inv_var * (after[index] - mean).square().mean(1) + log_norm
        ratio = torch.exp(log_prob - old[index])
        own = worth[index] if worth.ndim == 1 else worth[index, column]
        loss = torch.maximum(-own * ratio, -own * ratio.clamp(1 - clip, 1 + clip))
        if beta:
            with torch.no_grad():
                reference = a * x + b * guided(start, x, levels, cond, recipe.guidance_scale, constant)
            loss = loss + beta * (mean - reference).square().mean(1) / twice_rate
        total = total + loss[here].sum()
    return total / (len(rows) * num_trained)


def tree_loss(
    recipe: Recipe, model: Any, start: Any, batch: Batch, rows: np.ndarray, worth: Tensor
) -> Tensor:
    """TreeGRPO: a mean over the nodes of these trees of the sum over their children, node by node."""
    group, samples = recipe.group_size, batch.samples
    prompts = sorted({int(row) // group for row in rows})
    assert len(prompts) * group == len(rows)
    clip, sums, num_nodes = recipe.objective.trust.range, [], 0
    for depth, (kept, column) in enumerate(zip(samples.transitions, worth.T, strict=True)):
        row = samples.plan.steps[kept.place].step
        sigma, a, b, _, _, inv_var, log_norm, _ = samples.coeffs[row].double()
        for node in range(kept.num_heads):
            leaves = kept.samples[node * kept.fan : (node + 1) * kept.fan]
            if int(leaves[0, 0]) // group not in prompts:
                continue
            assert leaves.shape[1] == kept.fan ** (len(worth.T) - depth - 1)
            num_nodes += 1
            x, cond = kept.latents[node : node + 1], batch.conditioning.rows(leaves[:1, 0])
            mean = a * x + b * guided(model, x, sigma.expand(1), cond, recipe.guidance_scale, False)
            for child in range(kept.fan):
                edge = node * kept.fan + child
                after = kept.next_latents[edge : edge + 1]
                log_prob = -0.5 * inv_var * (after - mean).square().mean() + log_norm
                ratio, own = torch.exp(log_prob - kept.log_prob[edge]), column[leaves[child, 0]]
                sums.append(torch.maximum(-own * ratio, -own * ratio.clamp(1 - clip, 1 + clip)))
    return torch.stack(sums).sum() / num_nodes


def chunk_loss(
    recipe: Recipe, model: Any, start: Any, batch: Batch, rows: np.ndarray, worth: Tensor
) -> Tensor:
    """GCPO: one ratio a chunk of steps, of the mean log-ratio."""
    index, ratios = torch.from_numpy(rows), []
    for row, before, after, old in kept_steps(batch):
        sigma, a, b, _, _, inv_var, log_norm, _ = batch.samples.coeffs[row].double()
        x, cond = before[index], batch.conditioning.rows(index)
        mean = a * x + b * model.velocity(x, sigma.expand(len(x)), cond)
        log_prob = -0.5 * inv_var * (after[index] - mean).square().mean(1) + log_norm
        ratios.append(log_prob - old[index])
    clip, own, terms, first = recipe.objective.trust.range, worth[index], [], 0
    for size in recipe.objective.sizes:
        ratio = torch.exp(torch.stack(ratios[first : first + size]).mean(0))
        terms.append(torch.maximum(-own * ratio, -own * ratio.clamp(1 - clip, 1 + clip)))
        first += size
    return torch.stack(terms).mean()


def noised(batch: Batch, rows: np.ndarray, sigma: Tensor, turn: np.ndarray) -> tuple[Tensor, Tensor]:
    """Finished samples noised to sigma, whose noise is of fp32, and the velocity there."""
    x0, index = batch.samples.x0, torch.from_numpy(rows)
    seed = batch.samples.draws.seed[index].contiguous()
    step = torch.from_numpy(np.ascontiguousarray(turn))
    noise = philox_normal(seed, (6,), step=step, stream=2)
    wide = sigma[:, None].float()
    return (1 - wide) * x0[index] + wide * noise, noise - x0[index]


def nft_loss(recipe: Recipe, model: Any, start: Any, batch: Batch, rows: np.ndarray, worth: Tensor) -> Tensor:
    """DiffusionNFT, arXiv 2509.16117; the old policy is the start here."""
    part, sigmas = recipe.objective, batch.samples.plan.sigmas.double()
    num_steps, index = len(sigmas) - 1, torch.from_numpy(rows)
    taken = batch.choices.taken(num_steps, max(1, int(part.fraction * num_steps)))[rows]
    good = (worth[index] / 5).clamp(-1, 1) / 2 + 0.5
    cond, total = batch.conditioning.rows(index), torch.zeros((), dtype=torch.float64)
    for turn in range(taken.shape[1]):
        sigma = sigmas[torch.from_numpy(np.ascontiguousarray(taken[:, turn]))]
        x, target = noised(batch, rows, sigma, taken[:, turn])
        v = model.velocity(x, sigma, cond)
        with torch.no_grad():
            old = start.velocity(x, sigma, cond)
        errors = []
        for implicit in ((1 - part.beta) * old + part.beta * v, (1 + part.beta) * old - part.beta * v):
            gap = sigma[:, None] * (target - implicit)
            errors.append(gap.square().mean(1) / gap.detach().abs().mean(1).clamp_min(1e-5))
        loss = 5 / part.beta * (good * errors[0] + (1 - good) * errors[1])
        total = total + (loss + part.kl_beta * (v - old).square().mean(1)).sum()
    return total / (len(rows) * taken.shape[1])


def awm_loss(recipe: Recipe, model: Any, start: Any, batch: Batch, rows: np.ndarray, worth: Tensor) -> Tensor:
    """AWM's ghuber surrogate, the old log-prob detached, and two velocity KLs; both snapshots are the start here."""
    part, sigmas, index = (
        recipe.objective.surrogate,
        batch.samples.plan.sigmas.double(),
        torch.from_numpy(rows),
    )
    drawn_numbers = batch.choices.uniform(part.times)[rows]
    end = int(part.fraction * (len(sigmas) - 1))
    bounds = np.linspace(part.skip, end, part.times + 1).astype(int)
    own, cond = worth[index], batch.conditioning.rows(index)
    betas = [one.beta for one in recipe.objective.regularizers]
    total = torch.zeros((), dtype=torch.float64)
    for turn in range(part.times):
        step = bounds[turn] + (drawn_numbers[:, turn] * (bounds[turn + 1] - bounds[turn])).astype(int)
        sigma = sigmas[torch.from_numpy(step)]
        x, target = noised(batch, rows, sigma, np.full(len(rows), turn))
        v = model.velocity(x, sigma, cond)
        with torch.no_grad():
            reference = start.velocity(x, sigma, cond)
        error = (v - target).square().mean(1)
        log_prob = -sigma / part.power * ((error + 1e-10) ** part.power - 1e-10**part.power)
        ratio = torch.exp(log_prob - log_prob.detach())  # 1: no clip acts
        total = total + (-own * ratio + sum(betas) * (v - reference).square().mean(1)).sum()
    return total / (len(rows) * part.times)


# -------------------------------------------------------------------------------------------------------- the recipes


def whole(recipe: Recipe) -> list[np.ndarray]:
    """One optimiser step, of everyone."""
    assert recipe.optimizer.num_updates == 1
    return [np.arange(PROMPTS * recipe.group_size)]


def by_flow_grpo(recipe: Recipe, values: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    worth = flow_grpo_advantages(values, recipe.group_size).clip(-5, 5)
    return worth, shuffled(recipe, worth != 0)


def by_dance(recipe: Recipe, values: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    worth = sample_std_advantages(values, recipe.group_size, WEIGHTS).clip(-5, 5)
    return worth, across(recipe.group_size, recipe.optimizer.num_updates)


def by_mix(recipe: Recipe, values: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    shares = tuple(weight / sum(WEIGHTS) for weight in WEIGHTS)
    worth = sample_std_advantages(values, recipe.group_size, shares).clip(-5, 5)
    return worth, across(recipe.group_size, recipe.optimizer.num_updates)


def by_nft(recipe: Recipe, values: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    return flow_grpo_advantages(values, recipe.group_size).clip(-5, 5), whole(recipe)


def by_awm(recipe: Recipe, values: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    return flow_grpo_advantages(values, recipe.group_size).clip(-5, 5) / 5, whole(recipe)


def by_tree(recipe: Recipe, values: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    worth = tree_advantages(values, recipe.group_size, 4, 2)
    return worth, np.split(np.arange(PROMPTS * recipe.group_size), recipe.optimizer.num_updates)


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "flow_grpo": (by_flow_grpo, path_loss),
    "flow_grpo_fast": (by_flow_grpo, path_loss),
    "flow_cps": (by_flow_grpo, path_loss),
    "dance_grpo": (by_dance, path_loss),
    "pro_grpo": (by_flow_grpo, path_loss),
    "pro_grpo_flash": (by_flow_grpo, path_loss),
    "op_grpo": (by_flow_grpo, path_loss),
    "mix_grpo": (by_mix, path_loss),
    "mix_grpo_flash": (by_mix, path_loss),
    "gcpo": (by_dance, chunk_loss),
    "tree_grpo": (by_tree, tree_loss),
    "diffusion_nft": (by_nft, nft_loss),
    "naive_scaling": (by_nft, nft_loss),
    "awm": (by_awm, awm_loss),
}


def average_kept(recipe: Recipe, num_updates: int) -> float:
    """What Flow-GRPO's EMAModuleWrapper keeps after an optimiser step: its calls of one global step, multiplied up."""
    part = recipe.optimizer
    if part.ema_decay == 0 or (num_updates + 1) % part.ema_every:
        return 1.0
    return min((1 + num_updates) / (10 + num_updates), part.ema_decay) ** part.ema_calls


@pytest.mark.parametrize("first_update", [0, 6])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_authors_loop_written_out(toy_recipe, name, first_update) -> None:
    """At the recipe's own numbers but prompts; `first_update`: so many optimiser steps were before."""
    share_out, loss_of = CASES[name]
    paper = RECIPES[name].make()
    task = replace(toy_recipe().task, model="tests.training.own_parts:load_wide", judge="")
    optimizer = replace(paper.optimizer, max_grad_norm=0.05)  # low enough to be met
    recipe = replace(paper, num_prompts=PROMPTS, task=task, optimizer=optimizer)
    engine = build_engine(recipe, CPU)
    values = rewards(PROMPTS, recipe.group_size)
    batch, start = judged(engine, values), copy.deepcopy(engine.model)
    moved(engine, 1e-4)
    engine.learner.num_updates = first_update
    model, average = copy.deepcopy(engine.model), copy.deepcopy(start)
    worth, shares = share_out(recipe, values.numpy())
    worth = worth.astype(np.float32).astype(np.float64)  # as credit is stored
    assert sum(len(share) for share in shares) <= PROMPTS * recipe.group_size
    theirs = torch.optim.AdamW(
        model.module.parameters(), lr=optimizer.lr, betas=optimizer.betas, weight_decay=optimizer.weight_decay
    )
    norms = []
    for number, rows in enumerate(shares, first_update + 1):
        theirs.zero_grad()
        loss_of(recipe, model, start, batch, rows, torch.from_numpy(worth)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.module.parameters(), 0.05)))
        theirs.step()
        kept = average_kept(recipe, number)
        with torch.no_grad():
            for old, new in zip(average.module.parameters(), model.module.parameters(), strict=True):
                old.mul_(kept).add_(new, alpha=1 - kept)
    before = weights(engine)
    metrics = update(engine.learner, batch)
    assert metrics["grad_norm"] == pytest.approx(float(np.mean(norms)), rel=1e-6)
    change, expected = weights(engine) - before, weights(model) - before
    assert expected.norm() > 0
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    if "average" in engine.learner.snapshots:
        held = torch.cat([value.flatten() for value in engine.learner.snapshots["average"].values])
        torch.testing.assert_close(
            held - weights(start), weights(average) - weights(start), rtol=1e-5, atol=1e-12
        )
