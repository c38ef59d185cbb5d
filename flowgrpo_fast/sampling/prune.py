"""Who survives: candidates of a prompt chosen by a score or by their spread, and the rows that go on.

How many survive is known on the host; who does, only on the device. Nothing here waits for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowgrpo_fast.ops import Guidance, PreviewOutput, best_variance_subset, preview, top_bottom
from flowgrpo_fast.schedule.plan import Cut, Plan
from flowgrpo_fast.types import FlowModel, PreviewScore


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a cut may look at: one step of R samples, groups of equal size in a row."""

    latents: Tensor  # [R, *S] before the step
    velocity: Tensor  # [R, *S]
    guidance: Guidance | None
    coeffs: Tensor  # [T, 8]
    step: int  # its row of the table
    x0_pred: Tensor | None  # [R, *S] what the step would jump to
    num_groups: int
    grid: tuple[int, ...] | None  # of packed latents


def check_cells(plan: Plan, model: FlowModel) -> None:
    """Refuses cells that do not tile the model's latents, before anything is sampled.

    Raises:
        ValueError: names the latents' size, or that they have none.
    """
    for _, cut in plan.cuts:
        if cut.score != "latents":
            continue
        sides = (model.latent_grid or model.latent_shape[1:])[-2:]
        if len(sides) < 2:
            raise ValueError(
                f"Cuts.score is 'latents', but the model's are {list(model.latent_shape)}, which have no height and "
                "width (a model with packed ones says its grid by latent_grid); use score='reward'"
            )
        if any(side % cut.pool for side in sides):
            raise ValueError(
                f"Cuts.pool is {cut.pool}; it must divide the latents' height and width, {sides[0]} x {sides[1]}: "
                f"set {math.gcd(*sides, cut.pool)}, say"
            )


def survivors(seen: Candidates, cut: Cut, score: PreviewScore | None) -> Tensor:
    """The rows `[P * size]` int64 that go on.

    Raises:
        ValueError: scoring by reward without `score`, or scores of a wrong shape.
    """
    group_size = len(seen.latents) // seen.num_groups
    if cut.score == "latents":
        pooled = preview(
            seen.latents,
            seen.velocity,
            seen.coeffs,
            seen.step,
            cut.pool,
            seen.guidance,
            seen.grid,
            group_size,
        )
        assert isinstance(pooled, PreviewOutput)
        return group_rows(spread_subset(pooled.gram, cut.size), group_size)
    if score is None or seen.x0_pred is None:
        raise ValueError(
            "Cuts.score is 'reward', but the rollout was given no score; use 'latents' or pass one"
        )
    scores = score(seen.x0_pred)
    if scores.shape != (len(seen.latents),):
        raise ValueError(f"a preview's scores have shape {list(scores.shape)}, must be [{len(seen.latents)}]")
    return choose(scores.view(seen.num_groups, group_size), cut.size, cut.select)


def choose(scores: Tensor, size: int, select: str) -> Tensor:
    """The rows `[P * size]` int64 of the batch that a selection by scores `[P, G]` fp32 leaves, in order.

    "variance": the subset of maximal variance (Pro-GRPO); "top_bottom": half the best, half the worst, an odd one to
    the best; "random": the first, for seeds are drawn at random.
    """
    if select == "variance":
        members = best_variance_subset(scores, size)
    elif select == "top_bottom":
        members = top_bottom(scores, size - size // 2, size // 2)
    else:
        members = torch.arange(size, device=scores.device).expand(len(scores), -1)
    return group_rows(members, scores.shape[1])


def group_rows(members: Tensor, group_size: int) -> Tensor:
    """Members `[P, k]` of groups of neighbours -> rows of the batch `[P * k]`, ascending."""
    first = group_size * torch.arange(len(members), device=members.device)
    return (members.sort(dim=1).values + first[:, None]).flatten()


def spread_subset(gram: Tensor, size: int) -> Tensor:
    """`size` candidates of each group, far from each other, `[P, size]` int64: large total variance, greedily.

    The total variance of k vectors is the sum of their pairwise squared distances over k^2. First the two farthest
    from each other, then, one at a time, the candidate with the largest sum of squared distances to those chosen: in
    each step the largest gain. (The exact optimum of vectors, unlike that of numbers, is NP-hard.)

    Args:
        gram: `[P, G, G]` inner products, as `ops.preview` returns them.
        size: 1 to G.
    """
    square = gram.diagonal(dim1=1, dim2=2)
    distance = square[:, :, None] + square[:, None, :] - 2 * gram
    group_size = gram.shape[1]
    member = distance.amax(2).argmax(1)
    chosen = [member]
    gain = torch.zeros_like(square)
    for _ in range(size - 1):
        index = member[:, None, None].expand(-1, 1, group_size)
        gain = gain + distance.gather(1, index)[:, 0]
        gain = gain.scatter(1, member[:, None], float("-inf"))
        member = gain.argmax(1)
        chosen.append(member)
    return torch.stack(chosen, dim=1)
