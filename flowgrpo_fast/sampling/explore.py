"""How well cheap scouts foretell the full samples: ranks, and who is in the better half."""

from __future__ import annotations

import torch
from torch import Tensor

from flowgrpo_fast.ops import top_bottom


def ranks(values: Tensor) -> Tensor:
    """Ranks 1..G of each row of `[P, G]`, fp64; equal values share their mean rank."""
    above = (values[:, :, None] > values[:, None, :]).sum(2)
    equal = (values[:, :, None] == values[:, None, :]).sum(2)
    return above.double() + (equal.double() + 1) / 2


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of the rows of two `[P, G]`, `[P]` fp64; 0 where all of a row are equal."""
    x, y = (r - r.mean(1, keepdim=True) for r in (ranks(a), ranks(b)))
    size = (x.square().sum(1) * y.square().sum(1)).sqrt()
    return torch.where(size > 0, (x * y).sum(1) / size.clamp_min(1e-300), 0.0)


def top_overlap(a: Tensor, b: Tensor, k: int) -> Tensor:
    """The share of the `k` highest of each row of `a [P, G]` that are among the `k` highest of `b`, `[P]`."""
    inside = [torch.zeros_like(x, dtype=torch.bool).scatter_(1, top_bottom(x, k, 0), True) for x in (a, b)]
    return (inside[0] & inside[1]).sum(1) / k
