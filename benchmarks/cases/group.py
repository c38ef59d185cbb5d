"""The ops on groups, each next to what trainers run in its place: numpy per prompt, scans, Python loops, indexing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import Case, Size, nbytes
from flowgrpo_fast.ops import (
    best_variance_subset,
    compact,
    group_advantages,
    pareto_fronts,
    reference,
    top_bottom,
)

NUM_PROMPTS = 48
NUM_REWARDS = 3
EXPLORED = 4  # candidates for each sample that is trained on (Sol-RL: 96 for 24)
MAX_FRONT = 64


def advantages_by_prompt(rewards: Tensor, group_id: Tensor, std: str) -> Tensor:
    """Flow-GRPO's way: to numpy, find the prompts, normalise each one's rewards in a Python loop, and back."""
    values, ids = rewards.cpu().numpy().astype(np.float64), group_id.cpu().numpy()
    advantages = np.empty_like(values)
    for group in np.unique(ids):
        own = values[ids == group]
        spread = own.std(axis=0, keepdims=True) if std == "group" else values.std(axis=0, keepdims=True)
        advantages[ids == group] = (own - own.mean(axis=0, keepdims=True)) / (spread + 1e-4)
    return torch.as_tensor(advantages, dtype=rewards.dtype, device=rewards.device).clamp(-5, 5)


def gdpo_by_reward(rewards: Tensor, group_id: Tensor) -> Tensor:
    """Flow-Factory's "gdpo" in numpy: each reward within each group, their sum, then the batch."""
    values, ids = rewards.cpu().numpy().astype(np.float64), group_id.cpu().numpy()
    total = np.zeros(len(ids))
    for column in range(values.shape[1]):
        for group in np.unique(ids):
            own = values[ids == group, column]
            total[ids == group] += (own - own.mean()) / (own.std() + 1e-4)
    total = (total - total.mean()) / (total.std() + 1e-4)
    return torch.as_tensor(total, dtype=rewards.dtype, device=rewards.device).clamp(-5, 5)


def subset_by_scan(rewards: Tensor, k: int) -> Tensor:
    """Pro-GRPO's filter as its note states it: for each prompt the variance of every split into lowest and highest."""
    chosen = []
    for row in rewards:
        order = torch.argsort(row, stable=True)
        splits = [torch.cat([order[:i], order[len(order) - k + i :]]) for i in range(k + 1)]
        variances = torch.stack([row[split].double().var(correction=0) for split in splits])
        chosen.append(splits[int(variances.argmax())].sort().values)
    return torch.stack(chosen)


def ends_by_sort(rewards: Tensor, num: int) -> Tensor:
    """Sol-RL's best and worst: one sort a prompt."""
    order = [torch.argsort(row, descending=True, stable=True) for row in rewards]
    return torch.stack([torch.cat([o[:num], o[-num:].flip(0)]) for o in order])


def fronts_by_loops(objectives: Tensor) -> Tensor:
    """Non-dominated sorting as Python code has it: pairs, then peeling."""
    fronts = []
    for points in objectives.tolist():
        left, ranks, front = set(range(len(points))), [0] * len(points), 0
        dominators = [
            {j for j, q in enumerate(points) if q != p and all(b >= a for a, b in zip(p, q, strict=True))}
            for p in points
        ]
        while left:
            peeled = {i for i in left if not dominators[i] & left}
            for i in peeled:
                ranks[i] = front
            left -= peeled
            front += 1
        fronts.append(ranks)
    return torch.tensor(fronts, device=objectives.device)


def rows_by_buffer(indices: Tensor, buffers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One index_select a buffer."""
    return tuple(torch.index_select(buffer, 0, indices) for buffer in buffers)


def advantage_cases(size: Size, device: torch.device) -> Iterator[Case]:
    """The z-score of one reward, and three rewards normalised one by one and then over the batch."""
    group_id = torch.arange(NUM_PROMPTS, device=device).repeat_interleave(size.batch)
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(len(group_id), NUM_REWARDS, generator=generator).to(device)
    total = rewards.sum(1)
    formula = torch.compile(reference.group_advantages)
    clip = (5.0, None)
    for std in ("group", "batch"):
        yield Case(
            f"group_advantages, {std} std",
            size,
            torch.float32,
            nbytes(total, group_id, total),
            {
                "ours": lambda std=std: group_advantages(total, group_id, NUM_PROMPTS, std=std, clip=5.0),
                "eager": lambda std=std: advantages_by_prompt(total, group_id, std),
                "compiled": lambda std=std: formula(
                    total, group_id, NUM_PROMPTS, None, "sum", std, clip=clip
                ),
            },
        )
    yield Case(
        "group_advantages, gdpo",
        size,
        torch.float32,
        nbytes(rewards, group_id, total),
        {
            "ours": lambda: group_advantages(rewards, group_id, NUM_PROMPTS, None, "gdpo", clip=5.0),
            "eager": lambda: gdpo_by_reward(rewards, group_id),
            "compiled": lambda: formula(rewards, group_id, NUM_PROMPTS, None, "gdpo", clip=clip),
        },
    )


def selection_cases(size: Size, device: torch.device) -> Iterator[Case]:
    """A quarter of the candidates survives; Pareto fronts of what is trained on."""
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(NUM_PROMPTS, EXPLORED * size.batch, generator=generator).to(device)
    k = size.batch
    subset, ends = torch.compile(reference.best_variance_subset), torch.compile(reference.top_bottom)
    yield Case(
        "best_variance_subset",
        size,
        torch.float32,
        nbytes(rewards) + 8 * NUM_PROMPTS * k,
        {
            "ours": lambda: best_variance_subset(rewards, k),
            "eager": lambda: subset_by_scan(rewards, k),
            "compiled": lambda: subset(rewards, k),
        },
    )
    yield Case(
        "top_bottom",
        size,
        torch.float32,
        nbytes(rewards) + 16 * NUM_PROMPTS * k,
        {
            "ours": lambda: top_bottom(rewards, k, k),
            "eager": lambda: ends_by_sort(rewards, k),
            "compiled": lambda: ends(rewards, k, k),
        },
    )
    candidates = min(size.batch, MAX_FRONT)
    objectives = torch.randn(NUM_PROMPTS, candidates, NUM_REWARDS, generator=generator).to(device)
    fronts = torch.compile(reference.pareto_fronts)
    yield Case(
        "pareto_fronts",
        size,
        torch.float32,
        nbytes(objectives) + 8 * NUM_PROMPTS * candidates,
        {
            "ours": lambda: pareto_fronts(objectives),
            "eager": lambda: fronts_by_loops(objectives),
            "compiled": lambda: fronts(objectives),
        },
    )


def compact_case(size: Size, dtype: torch.dtype, device: torch.device) -> Case:
    """What the surviving half of a batch keeps: three latents, log-probabilities, seeds and a flag."""
    generator = torch.Generator().manual_seed(2)
    latents = [torch.randn(size.shape, generator=generator).to(device, dtype) for _ in range(3)]
    log_prob, seed = torch.randn(size.batch, device=device), torch.arange(size.batch, device=device)
    buffers = (*latents, log_prob, seed, log_prob > 0)
    survivors = (
        torch.randperm(size.batch, generator=generator)[: max(size.batch // 2, 1)].sort().values.to(device)
    )
    gather = torch.compile(reference.compact)
    return Case(
        "compact",
        size,
        dtype,
        2 * sum(nbytes(buffer) // size.batch * len(survivors) for buffer in buffers) + nbytes(survivors),
        {
            "ours": lambda: compact(survivors, *buffers),
            "eager": lambda: rows_by_buffer(survivors, buffers),
            "compiled": lambda: gather(survivors, *buffers),
        },
    )


def cases(size: Size, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Rewards are float32 whatever the latents are, so their ops come with float32 alone."""
    if dtype is torch.float32:
        yield from advantage_cases(size, device)
        yield from selection_cases(size, device)
    yield compact_case(size, dtype, device)
