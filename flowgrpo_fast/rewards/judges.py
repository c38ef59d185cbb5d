"""Judges: they measure, and never train. Another kind of model, on data that nothing else sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from sklearn.svm import SVC
from torch import Tensor

from flowgrpo_fast.models.digits_data import digit_images
from flowgrpo_fast.models.digits_text import digits_of
from flowgrpo_fast.rewards.rules import check_images


class Judge(Protocol):
    """An independent reader of the samples that training never sees."""

    def correct(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Which images `[B, C, H, W]` show what their prompt asks for, `[B]` bool."""
        ...


class DigitJudge:
    """Reads digits with a support vector machine (RBF kernel) fitted on the half that training never sees."""

    def __init__(self) -> None:
        data = digit_images("judge")
        self._machine = SVC(kernel="rbf", C=10.0, gamma=0.3)
        self._machine.fit(data.images.flatten(1).numpy(), data.digits.numpy())

    def read(self, images: Tensor) -> Tensor:
        """The digit `[B]` int64 (CPU) it reads in each image `[B, 1, 8, 8]`. Raises ValueError for other images."""
        check_images(images, len(images), shape=(1, 8, 8))
        pixels = images.detach().float().cpu().flatten(1).numpy()
        return torch.from_numpy(self._machine.predict(pixels)).to(torch.int64)

    def correct(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Whether it reads the prompted digit, `[B]` bool (CPU). Raises ValueError as `read`, and for bad prompts."""
        check_images(images, len(prompts), shape=(1, 8, 8))
        return self.read(images) == digits_of(prompts)

    def accuracy(self, images: Tensor, prompts: Sequence[str]) -> float:
        """The share of images in which it reads the prompted digit, 0..1."""
        return float(self.correct(images, prompts).float().mean())
