"""Rewards that a process of their own can import."""

from __future__ import annotations

import os
import signal
import time

import torch
from torch import Tensor

from flowgrpo_fast.rewards.terms import Seen

NAP = 0.4  # seconds a call


def seen(images: Tensor) -> Seen:
    """These images, and nothing else to tell of them; one group."""
    count = len(images)
    group = torch.zeros(count, dtype=torch.int64, device=images.device)
    return Seen(images, [""] * count, [{} for _ in range(count)], None, group, None, 1)


def bright(images: Tensor, prompts: list[str]) -> Tensor:
    sign = torch.tensor([-1.0 if p == "low" else 1.0 for p in prompts])
    return sign * (images.flatten(1).mean(1) - 0.5)


def edge(images: Tensor, prompts: list[str]) -> Tensor:
    return images.flatten(1).double().std(1)


def sleepy(images: Tensor, prompts: list[str]) -> Tensor:
    time.sleep(NAP)
    return bright(images, prompts)


def stuck(images: Tensor, prompts: list[str]) -> Tensor:
    time.sleep(1000)
    return bright(images, prompts)


def refuses(images: Tensor, prompts: list[str]) -> Tensor:
    raise ValueError("image 3 is no image")


def breaks(images: Tensor, prompts: list[str]) -> Tensor:
    raise KeyError("missing\nand more")


def dies(images: Tensor, prompts: list[str]) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return bright(images, prompts)


def listed(images: Tensor, prompts: list[str]) -> list[float]:
    return bright(images, prompts).tolist()


def worded(images: Tensor, prompts: list[str]) -> list[str]:
    return ["good" for _ in images]


def nan(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.full((len(images),), float("nan"))


def too_few(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.zeros(3)


def where(images: Tensor, prompts: list[str]) -> Tensor:
    """The process, and whether an interrupt reaches it."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return torch.tensor([float(os.getpid()), float(ignored)] + [0.0] * (len(images) - 2))


def without_gradient(images: Tensor, prompts: list[str]) -> Tensor:
    assert not torch.is_grad_enabled()
    return bright(images, prompts)
