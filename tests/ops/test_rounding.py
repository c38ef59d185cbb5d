"""Storage rounding of the kernels against torch's, on every 16-bit value and on the values between."""

from __future__ import annotations

import pytest
import torch

from flowgrpo_fast.ops import Extras, flow_log_prob, flow_step

IDENTITY = torch.tensor([[0, 1, 0, 0, 0, 0, 0, 0.0]])  # next = mean = latents


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_stored_value_survives(dtype):
    stored = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    kept = flow_step(
        stored, torch.zeros_like(stored), IDENTITY, 0, torch.zeros(1, dtype=torch.int64)
    ).next_latents
    same = torch.equal(kept[stored.isfinite()], stored[stored.isfinite()])
    assert same
    assert torch.equal(kept.isnan(), stored.isnan())
    mean = flow_log_prob(stored, torch.zeros_like(stored), stored, IDENTITY, 0, extras=Extras(mean=True)).mean
    finite = ~stored.isnan()
    assert torch.equal(mean[finite], stored.float()[finite])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_to_nearest_even_like_torch(dtype):
    latents = torch.zeros(1, 200_000, dtype=dtype)
    row = IDENTITY.clone()
    row[0, 2] = 1  # next = velocity
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, latents.shape, generator=generator).to(torch.int32)
    small = torch.randn(latents.shape, generator=generator) * torch.logspace(-9, 5, latents.shape[1])
    ties = (torch.arange(latents.shape[1]).float() + 0.5)[None] * 2.0**-24
    for velocity in (bits.view(torch.float32), small, ties, -ties):
        got = flow_step(latents, velocity, row, 0, torch.zeros(1, dtype=torch.int64)).next_latents
        want = velocity.to(dtype)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got[~want.isnan()], want[~want.isnan()])
