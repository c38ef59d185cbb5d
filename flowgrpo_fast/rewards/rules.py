"""Rewards that need no download: the log-probability of the prompted digit, and the contrast of the ink."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from flowgrpo_fast.models.digits_data import digit_images
from flowgrpo_fast.models.digits_text import digits_of

_HIDDEN = 64
_NUM_STEPS = 400
_SEED = 0
_REAL_CONTRAST = 0.92


def digit_log_prob(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """log p(prompted digit | image) `[B]` fp32, <= 0, under a small network trained on the training half.

    The network (64-64-10, tanh) is trained at the first call, in about a second, always the same way. Raises
    ValueError for images that are not `[B, 1, 8, 8]`, not finite or outside [0, 1], and for bad prompts.
    """
    check_images(images, len(prompts), shape=(1, 8, 8))
    digits = digits_of(prompts).to(images.device)
    log_probs = functional.log_softmax(_logits(images.float(), _classifier()), dim=1)
    return log_probs.gather(1, digits[:, None]).squeeze(1)


def ink_contrast(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean of the brightest fifth of the pixels minus mean of the darkest two fifths, `[B]` fp32 in [0, 0.92].

    Strong ink on clean paper, over all frames of a video. Capped where real digits are on average: without the
    cap, strokes grow into blots. The prompts are not read. Raises ValueError as `digit_log_prob` does.
    """
    check_images(images, len(prompts))
    ranked = images.float().flatten(1).sort(dim=1).values  # [B, N] ascending
    num_pixels = ranked.shape[1]
    ink = ranked[:, -max(1, num_pixels // 5) :].mean(dim=1)
    paper = ranked[:, : max(1, num_pixels * 2 // 5)].mean(dim=1)
    return (ink - paper).clamp(max=_REAL_CONTRAST)


def check_images(images: Tensor, num_prompts: int, shape: tuple[int, int, int] | None = None) -> None:
    """Raises a one-line ValueError unless images are in [0, 1], one a prompt.

    `[B, C, H, W]`, or videos `[B, F, C, H, W]`; with a shape `[B, *shape]`.
    """
    wanted = "[B, C, H, W]" if shape is None else f"[B, {', '.join(map(str, shape))}]"
    fits = images.ndim in (4, 5) if shape is None else images.shape[1:] == shape
    if not fits or images.numel() == 0:
        raise ValueError(f"images must be {wanted} and not empty, got {list(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point in [0, 1], got {images.dtype}")
    if images.shape[0] != num_prompts:
        raise ValueError(
            f"got {images.shape[0]} images but {num_prompts} prompts; one prompt per image is needed"
        )
    inside = ((images >= 0.0) & (images <= 1.0)).flatten(1).all(dim=1)  # False for NaN too
    if not bool(inside.all()):
        first = int(inside.logical_not().nonzero()[0])
        bad = images[first][~((images[first] >= 0.0) & (images[first] <= 1.0))][0].item()
        raise ValueError(f"image {first} holds {bad}; pixels must be finite and in [0, 1]")


@lru_cache(maxsize=1)
def _classifier() -> tuple[Tensor, ...]:
    """Weights of the reward's network, trained full-batch on noisy, shifted copies of the training half."""
    data = digit_images("training")
    generator = torch.Generator().manual_seed(_SEED)
    shapes = ((64, _HIDDEN), (_HIDDEN,), (_HIDDEN, 10), (10,))
    weights = [torch.randn(s, generator=generator) * (0.1 if len(s) == 2 else 0.0) for s in shapes]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=0.01, weight_decay=0.05)
    with torch.enable_grad():
        for _ in range(_NUM_STEPS):
            noisy = data.images + 0.1 * torch.randn(data.images.shape, generator=generator)
            loss = functional.cross_entropy(_logits(noisy, tuple(weights)), data.digits)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return tuple(weight.detach() for weight in weights)


def _logits(images: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """`[B, 10]` for images `[B, 1, 8, 8]`, on the images' device."""
    first, bias, second, last_bias = (weight.to(images.device) for weight in weights)
    return torch.tanh(images.flatten(1) @ first + bias) @ second + last_bias
