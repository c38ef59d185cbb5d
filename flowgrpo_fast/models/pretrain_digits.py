"""Pretraining of the digits model: conditional flow matching on the training half of the data.

    loss = mean || v(x_sigma, sigma, prompt) - (noise - x0) ||^2,  x_sigma = (1 - sigma) x0 + sigma noise

(Lipman et al., arXiv 2210.02747; logit-normal sigma as Esser et al., arXiv 2403.03206). A share of the captions is
wrong, as captions scraped from the web are: the start that ships draws digits, but often another one than asked,
and reinforcement learning has something left to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from flowgrpo_fast.models.digits import DigitsConfig, DigitsNetwork, save_pretrained
from flowgrpo_fast.models.digits_data import digit_images
from flowgrpo_fast.models.digits_text import NUM_TOKENS, PHRASINGS, all_prompts, tokenize

NUM_STEPS = 2000
BATCH_SIZE = 128
LEARNING_RATE = 2e-3
PROMPT_DROPOUT = 0.1  # share of empty prompts, for classifier-free guidance
CAPTION_NOISE = 0.28  # share of captions that name a random digit


def pretrain(
    out_path: Path | str,
    seed: int = 0,
    num_steps: int = NUM_STEPS,
    config: DigitsConfig | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> float:
    """Trains from scratch on the CPU, writes `out_path` (safetensors), gives the mean loss of the last 100 steps.

    The same seed gives the same file on the same machine. `on_step(step, loss)` is called after every step. Raises
    ValueError for fewer than one step, or a folder that does not exist.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if not Path(out_path).absolute().parent.is_dir():
        raise ValueError(f"cannot write {out_path}: its folder does not exist")
    network = _new_network(config or DigitsConfig(), seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, num_steps))
    generator = torch.Generator().manual_seed(seed)
    tokens = tokenize(all_prompts()).reshape(len(PHRASINGS), 10, NUM_TOKENS)
    losses: list[float] = []
    for step in range(num_steps):
        loss = _flow_matching_loss(network, tokens, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step, losses[-1])
    save_pretrained(network, out_path)
    last = losses[-100:]
    return sum(last) / len(last)


def _new_network(config: DigitsConfig, seed: int) -> DigitsNetwork:
    """Fresh weights from `seed`, the caller's random state left as it was (module constructors draw globally)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitsNetwork(config)


def _flow_matching_loss(network: DigitsNetwork, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """The loss of one random batch; tokens `[phrasings, 10, L]`."""
    data = digit_images("training")
    index = torch.randint(len(data.digits), (BATCH_SIZE,), generator=generator)
    x0 = data.images[index] * 2.0 - 1.0
    careless = torch.rand(BATCH_SIZE, generator=generator) < CAPTION_NOISE
    anything = torch.randint(10, (BATCH_SIZE,), generator=generator)
    digits = torch.where(careless, anything, data.digits[index])
    phrasing = torch.randint(tokens.shape[0], (BATCH_SIZE,), generator=generator)
    dropped = torch.rand(BATCH_SIZE, generator=generator) < PROMPT_DROPOUT
    words = tokens[phrasing, digits] * ~dropped[:, None]  # token 0 is padding, so this is the empty prompt
    embeds, pooled = network.embed(words)
    sigma = torch.randn(BATCH_SIZE, generator=generator).sigmoid()
    noise = torch.randn(x0.shape, generator=generator)
    weight = sigma.reshape(-1, 1, 1, 1)
    velocity = network((1.0 - weight) * x0 + weight * noise, sigma, embeds, pooled)
    return (velocity - (noise - x0)).square().mean()


def _warm_cosine(step: int, num_steps: int) -> float:
    """Learning-rate factor: up over 50 steps, and half a cosine from 1 down to a tenth."""
    return min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / num_steps))
