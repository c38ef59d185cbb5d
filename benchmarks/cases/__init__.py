"""What is measured: one `Case` an operation and size, made by the modules of this package, one a family of ops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Size:
    """Latents `[batch, *sample]` of a real model, or something smaller."""

    name: str
    batch: int
    sample: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, *self.sample)

    @property
    def elements(self) -> int:
        return self.batch * math.prod(self.sample)


SD3 = Size("SD3.5 512 x24", 24, (16, 64, 64))
TOY = Size("toy x8", 8, (1, 8, 8))
SIZES = (
    SD3,
    Size("SD3.5 512 x12", 12, (16, 64, 64)),
    Size("SD3.5 512 x1", 1, (16, 64, 64)),
    Size("FLUX 720 x24", 24, (2025, 64)),
    Size("FLUX 720 x12", 12, (2025, 64)),
    Size("Wan 480p 81 frames x4", 4, (16, 21, 60, 104)),
    Size("HunyuanVideo 480 53 frames x4", 4, (16, 14, 60, 60)),
    TOY,
)


@dataclass(frozen=True)
class Case:
    """One operation on one size: our op, the same as trainers write it, and `torch.compile` of its reference.

    `contenders` holds "ours", "eager" and, where the reference is traceable, "compiled", each ready to be called;
    they must compute the same, which a test checks on a toy size. `bytes` is the least any of them has to move: every
    input read once and every output written once.
    """

    operation: str
    size: Size
    dtype: torch.dtype
    bytes: int
    contenders: dict[str, Run]

    @property
    def group(self) -> str:
        """What pytest-benchmark groups the contenders of a case by."""
        return f"{self.operation} {self.size.name} {str(self.dtype).removeprefix('torch.')}"


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


Selection = tuple[tuple[Size, torch.dtype], ...]
