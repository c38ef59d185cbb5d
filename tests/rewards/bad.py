"""Rewards that fail in every way, which a process of their own can import."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

_RELEASE = 60.0  # far beyond any limit of a test


class UnprintableError(Exception):
    def __init__(self, a: int, b: int) -> None:  # no pickle of it can be read
        super().__init__()

    def __str__(self) -> str:
        raise RuntimeError("no")


def value_error(images, prompts):
    raise ValueError("my own\nsecond line")


def exits(images, prompts):
    sys.exit(3)


def unprintable(images, prompts):
    raise UnprintableError(1, 2)


def key_error(images, prompts):
    return {}["missing"]


def generator_exit(images, prompts):
    raise GeneratorExit


def hangs(images, prompts):
    time.sleep(_RELEASE)


def spins(images, prompts):
    end = time.monotonic() + _RELEASE
    while time.monotonic() < end:
        pass


def complex_scores(images, prompts):
    return torch.zeros(len(prompts), dtype=torch.complex64)


def nothing(images, prompts):
    return None


def not_finite(images, prompts):
    return [float("nan")] * len(prompts)


def leaves(images, prompts):
    os._exit(0)


def killed(images, prompts):
    os.kill(os.getpid(), signal.SIGKILL)


def good(images, prompts):
    return images.flatten(1).mean(1)[:, None], ["info"][:0] or None


def good_list(images, prompts):
    return [0.5, *images.flatten(1).mean(1)[1:]], [{"a": 1}] * len(prompts)
