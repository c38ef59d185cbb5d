"""Philox4x32-10 in Python integers, and Box-Muller in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def philox4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One Philox4x32-10 block in Python integers (Salmon et al., SC 2011)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def normal_of_words(words: Tensor) -> Tensor:
    """Box-Muller in float64 on 32-bit words ``[..., n]`` (int64): pairs ``(r cos, r sin)``; n must be even."""
    pairs = words.to(torch.float64).unflatten(-1, (-1, 2))
    # The kernels take the upper 31 bits of the first word, rounded to float32.
    uniform = ((words.unflatten(-1, (-1, 2))[..., 0] >> 1).to(torch.float32) + 0.5).to(
        torch.float64
    ) * 2.0**-31
    radius, angle = (-2.0 * uniform.log()).sqrt(), pairs[..., 1] * (2.0 * torch.pi / 2.0**32)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(-2)
