"""Rewards that a process of their own can import. Processes tell each other how far they are by files in `SIGNS`."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor

from flowgrpo_fast.rewards.terms import Seen

HANGS = 300  # seconds after which what is waited for will not come
SIGNS = "FLOWGRPO_FAST_TEST_SIGNS"  # an environment variable, which a new process inherits


def put_sign(name: str) -> None:
    """Says that something has begun, to whoever waits for it."""
    Path(os.environ[SIGNS], name).touch()


def count_signs(what: str) -> int:
    return len(list(Path(os.environ[SIGNS]).glob(f"{what} *")))


def wait_for_signs(what: str, number: int) -> None:
    """Waits until this many of a kind are there."""
    deadline = time.monotonic() + HANGS
    while count_signs(what) < number:
        if time.monotonic() > deadline:
            raise ValueError(f"{what} {number} has not begun")
        time.sleep(0.005)


def shown(images: Tensor) -> Seen:
    """Images as a reward sees them that reads no more than those."""
    rows = len(images)
    return Seen(images, [""] * rows, [{}] * rows, None, torch.zeros(rows, dtype=torch.int64), None, 1)


def bright(images: Tensor, prompts: list[str]) -> Tensor:
    sign = torch.tensor([-1.0 if p == "low" else 1.0 for p in prompts])
    return sign * (images.flatten(1).mean(1) - 0.5)


def edge(images: Tensor, prompts: list[str]) -> Tensor:
    return images.flatten(1).double().std(1)


def meets_next_rollout(images: Tensor, prompts: list[str]) -> Tensor:
    """The reward of one of four chunks: ends when the rollout of the next has begun; the last has none to wait for."""
    number = count_signs("reward") + 1
    put_sign(f"reward {number}")
    if number % 4:
        wait_for_signs("rollout", number + 1)
    return bright(images, prompts)


def stuck(images: Tensor, prompts: list[str]) -> Tensor:
    put_sign(f"stuck {os.getpid()}")
    time.sleep(100_000)
    return bright(images, prompts)


def refuses(images: Tensor, prompts: list[str]) -> Tensor:
    raise ValueError("image 3 is no image")


def breaks(images: Tensor, prompts: list[str]) -> Tensor:
    raise KeyError("missing\nand more")


def dies(images: Tensor, prompts: list[str]) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return bright(images, prompts)


def listed(images: Tensor, prompts: list[str]) -> list[str]:
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
