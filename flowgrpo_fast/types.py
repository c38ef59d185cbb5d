"""The records that flow through a training step, one way: conditioning -> trajectory -> rewards -> batch.

Dimensions: B samples, P prompts, G group members, T steps, K kept steps, *S latent shape, L tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the model is fed, one row per prompt (or per sample after `rows`)."""

    prompt_embeds: Tensor  # [P, L, C]
    pooled_prompt_embeds: Tensor | None = None  # [P, C']
    negative_prompt_embeds: Tensor | None = None  # [P, L, C]
    negative_pooled_prompt_embeds: Tensor | None = None  # [P, C']
    extra: dict[str, Tensor] = field(default_factory=dict)  # name -> [P, ...]: source image, mask, ...

    def rows(self, index: Tensor) -> Conditioning:
        """Rows `index [B]` (int64) of every field; used to repeat prompts over their group."""
        picked = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return Conditioning(
            **{k: None if v is None else v.index_select(0, index) for k, v in picked.items()},
            extra={k: v.index_select(0, index) for k, v in self.extra.items()},
        )

    def negative(self) -> Conditioning:
        """The unconditional half of classifier-free guidance."""
        if self.negative_prompt_embeds is None:
            raise ValueError("guidance_scale > 1 needs negative_prompt_embeds; the model's encode gave none")
        return replace(
            self,
            prompt_embeds=self.negative_prompt_embeds,
            pooled_prompt_embeds=self.negative_pooled_prompt_embeds,
        )


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One rollout. Kept steps are the stochastic ones: they carry a log-prob and can be replayed."""

    sigmas: Tensor  # [T+1] fp32, host: 1 = noise, last = 0
    coeffs: Tensor  # [T, 8] fp32, device
    step_index: Tensor  # [K] int64, host: which of the T steps were kept
    latents: Tensor  # [B, K, *S] before each kept step, storage dtype
    next_latents: Tensor  # [B, K, *S] after it, as stored
    log_prob: Tensor  # [B, K] fp32, mean over latent elements
    seed: Tensor  # [B] int64
    group_id: Tensor  # [B] int64, 0..P-1
    x0: Tensor  # [B, *S] the finished samples
    policy_version: int = 0  # training step whose weights made it


@dataclass(frozen=True, slots=True)
class RewardOutput:
    """Rewards of B samples. `total` is what credit is computed on unless it works per objective."""

    total: Tensor  # [B] fp32
    objectives: dict[str, Tensor] = field(default_factory=dict)  # name -> [B], unweighted
    valid: Tensor | None = None  # [B] bool; None = all


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """A trajectory with its credit."""

    trajectory: Trajectory
    conditioning: Conditioning  # one row per sample [B, ...]
    advantages: Tensor  # [B] fp32
    weight: Tensor  # [B] fp32: 0 drops a sample from the loss, else 1
    step_position: Tensor  # [B, N] int64: which of the K kept steps each sample trains on, in order


def batch_size(trajectory: Trajectory) -> int:
    """B of a trajectory."""
    return int(trajectory.x0.shape[0])


def device_of(trajectory: Trajectory) -> torch.device:
    """Where a trajectory lives."""
    return trajectory.x0.device
