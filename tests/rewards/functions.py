"""Rewards of every form, which a process of their own can import."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgrpo_fast.rewards.terms import Seen
from flowgrpo_fast.types import Scores

not_a_function = 3


def mean(images: Tensor, prompts: list[str]) -> Tensor:
    return images.flatten(1).mean(1)


def length(images: Tensor, prompts: list[str]) -> list[int]:
    return [len(prompt) for prompt in prompts]


def counted(
    images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
) -> tuple[list[float], dict[str, Any]]:
    """flow_grpo's signature: how far from the wished-for number."""
    assert [entry["prompt"] for entry in metadata] == prompts
    return [float(entry["count"]) for entry in metadata], {"unread": object}


def several(
    images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """As flow_grpo's `multi_score` returns them: lists, lists of 0-d tensors, and their weighted sum as "avg"."""
    strict = list(images.flatten(1).amax(1))
    loose = [len(prompt) for prompt in prompts]
    return {
        "strict": strict,
        "loose": loose,
        "avg": [a + 0.5 * b for a, b in zip(strict, loose, strict=True)],
    }, {}


def everything(seen: Seen) -> Scores:
    """All that a record can say, made of all that it shows."""
    assert seen.latents is not None
    base = seen.latents.float().flatten(1).sum(1) + seen.group
    return Scores(
        total=base.double(),
        objectives={
            "style": base + 1,
            "text": torch.tensor([float(entry["count"]) for entry in seen.metadata]),
        },
        signals={"map": seen.images[:, 0] > 0.5, "frames": np.asarray(seen.images.flatten(1)[:, :3])},
        valid=torch.tensor([len(prompt) != 3 for prompt in seen.prompts]),
    )


def vandal(seen: Seen) -> Tensor:
    """Writes to all it is given, images also through numpy, which no counter of torch's notices."""
    total = seen.images.flatten(1).mean(1)
    seen.images.numpy()[:] = 7.0
    seen.images.zero_()
    seen.group.zero_()
    if seen.latents is not None:
        seen.latents.zero_()
    seen.prompts.sort(reverse=True)
    seen.prompts.append("more")
    for entry in seen.metadata:
        entry["count"] = 100
        entry.setdefault("list", []).append("more")
    seen.metadata.clear()
    return total


def win_rate(seen: Seen) -> Tensor:
    """The share of its group that a sample is brighter than."""
    value = seen.images.flatten(1).mean(1)
    same = seen.group[:, None] == seen.group[None]
    others = same.sum(1) - 1
    assert int(seen.group.max()) == seen.num_groups - 1
    return ((value[:, None] > value[None]) & same).sum(1) / others.clamp_min(1)


def smooth(images: Tensor, prompts: list[str]) -> Tensor:
    return images.square().flatten(1).sum(1)


def without_graph(images: Tensor, prompts: list[str]) -> list[float]:
    return images.square().flatten(1).sum(1).tolist()


def holes(seen: Seen) -> Scores:
    """Every other sample has no score."""
    valid = torch.arange(len(seen)) % 2 == 0
    return Scores(total=torch.where(valid, seen.images.flatten(1).mean(1), torch.nan), valid=valid)
