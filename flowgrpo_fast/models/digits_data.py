"""The 8x8 handwritten digits that ship inside scikit-learn, cut once into two halves.

The generator and the reward learn from the first half. The judge learns from the second, which nothing else ever
sees, so a reward that is gamed shows as a judge that does not follow.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

Half = Literal["training", "judge"]
_SPLIT_SEED = 0


class DigitImages(NamedTuple):
    """Images with their digits."""

    images: Tensor  # [N, 1, 8, 8] fp32 in [0, 1], 1 = ink
    digits: Tensor  # [N] int64, 0..9


@lru_cache(maxsize=2)
def digit_images(half: Half) -> DigitImages:
    """One half of the data (898 or 899 images, the ten digits equally spread), in a fixed order, on the CPU."""
    pixels, digits = load_digits(return_X_y=True)
    parts = train_test_split(pixels, digits, test_size=0.5, stratify=digits, random_state=_SPLIT_SEED)
    side = ("training", "judge").index(half)
    images = torch.from_numpy(parts[side]).to(torch.float32).reshape(-1, 1, 8, 8) / 16.0
    return DigitImages(images, torch.from_numpy(parts[2 + side]).to(torch.int64))
