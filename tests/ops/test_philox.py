from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flowgrpo_fast import _C
from flowgrpo_fast.ops import flow_step, philox_normal, philox_uint32, reference

ONES = 0xFFFFFFFF

# Random123, kat_vectors: philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    assert tuple(_C.philox4x32(counter, key)) == answer
    assert reference.philox4x32_10(counter, key) == answer


@pytest.mark.witness
@pytest.mark.parametrize("count", [1, 3, 255, 256, 4100])
def test_words_follow_the_counter_layout(count, device):
    seeds, steps, stream = [5, -7, (1 << 40) + 3], [0, 9, ONES], 1
    words = philox_uint32(
        torch.tensor(seeds, device=device), (count,), torch.tensor(steps, device=device), stream
    )
    for row, seed, step in zip(words.tolist(), seeds, steps, strict=True):
        key = (seed & ONES, (seed >> 32) & ONES)
        blocks = [reference.philox4x32_10((block, 0, step, stream), key) for block in range(-(-count // 4))]
        assert row == [word for block in blocks for word in block][:count]


SEEDS = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3)
WORD = st.integers(0, ONES)


@settings(max_examples=60, deadline=None)
@given(
    seeds=SEEDS,
    shape=st.lists(st.integers(1, 9), max_size=3),
    step=WORD,
    stream=WORD,
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    per_sample=st.booleans(),
)
def test_any_shape_seed_step_and_stream(seeds, shape, step, stream, dtype, per_sample):
    """Words against Philox in Python integers, normals against Box-Muller in float64 of these words."""
    count = torch.Size(shape).numel()
    steps = [(step + row) % 2**32 for row in range(len(seeds))] if per_sample else [step] * len(seeds)
    seed, given_step = torch.tensor(seeds), torch.tensor(steps) if per_sample else step
    words = []
    for one, at in zip(seeds, steps, strict=True):
        key = (one & ONES, (one >> 32) & ONES)
        blocks = [reference.philox4x32_10((block, 0, at, stream), key) for block in range(-(-count // 4))]
        words.append([word for block in blocks for word in block])
    words = torch.tensor(words)
    ours = philox_uint32(seed, shape, given_step, stream)
    assert ours.shape == (len(seeds), *shape)
    assert torch.equal(ours.view(len(seeds), -1), words[:, :count])
    exact = reference.normal_of_words(words)
    radius = exact.unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(-1, -1, 2).flatten(1)[:, :count]
    normal = philox_normal(seed, shape, given_step, stream).view(len(seeds), -1)
    assert ((normal - exact[:, :count]).abs() <= 4 * radius * 2.0**-24).all()
    assert torch.equal(
        philox_normal(seed, shape, given_step, stream, dtype).view(normal.shape), normal.to(dtype)
    )


def test_normals_match_box_muller_in_float64():
    """Within a few float32 units in the last place of the exact transform of the same words."""
    seed = torch.arange(8)
    normal = philox_normal(seed, (1 << 16,), 3, 1).double()
    exact = reference.normal_of_words(philox_uint32(seed, (1 << 16,), 3, 1))
    radius = exact.unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(-1, -1, 2).flatten(1)
    error = (normal - exact).abs()
    assert (error / (radius * 2.0**-24 + 1e-30)).max() < 4  # worst measured: 2.9 times 2^-24 of the radius
    relative = (error / exact.abs().clamp_min(1e-30))[exact.abs() > 0.05]
    assert relative.max() < 8 * 2.0**-24  # worst measured: 4.8, the median 0.6


def test_extreme_words_give_finite_normals():
    words = [0, 1, 2, 3, 0x1FFFFFFF, 0x20000000, 0x20000001, 0x3FFFFFFF, 0x40000000, 0x7FFFFFFF, 0x80000000]
    words += [0xA0000000, 0xC0000000, 0xE0000000, 0xFFFFFF00, ONES - 1, ONES]
    for radius_word in words:
        for angle_word in words:
            exact = reference.normal_of_words(torch.tensor([radius_word, angle_word]))
            pair = torch.tensor(_C.normal_pair(radius_word, angle_word), dtype=torch.float64)
            assert pair.isfinite().all()
            assert pair.abs().max() <= 6.67
            torch.testing.assert_close(pair, exact, rtol=1e-6, atol=1e-6 * exact.norm().item() + 1e-12)


def test_distribution():
    normal = philox_normal(torch.arange(32) * 7919, (1 << 15,), 2).flatten().double().numpy()
    count = normal.size
    assert abs(normal.mean()) < 4 / np.sqrt(count)
    assert abs(normal.var() - 1) < 4 * np.sqrt(2 / count)
    assert abs((normal**3).mean()) < 4 * np.sqrt(15 / count)
    assert abs((normal**4).mean() - 3) < 4 * np.sqrt(96 / count)
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    # Neighbours share a block and a pair shares a radius: they must still be independent.
    for lag in (1, 2, 3, 4, 256):
        assert abs(np.mean(normal[lag:] * normal[:-lag])) < 4.5 / np.sqrt(count)
    squares = normal.reshape(-1, 2) ** 2 - 1
    assert abs(np.mean(squares[:, 0] * squares[:, 1])) < 4.5 * 2 / np.sqrt(len(squares))


def test_streams_steps_and_seeds_are_unrelated():
    draws = [
        philox_normal(torch.tensor([seed]), (1 << 14,), step, stream)[0]
        for seed, step, stream in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1 << 32, 0, 0)]
    ]
    correlation = np.corrcoef(torch.stack(draws).numpy()) - np.eye(len(draws))
    assert np.abs(correlation).max() < 4.5 / np.sqrt(1 << 14)


@pytest.mark.witness
def test_noise_of_a_step_is_stream_zero(device):
    seed = torch.tensor([11, 12], device=device)
    coeffs = torch.tensor([[0.5, 0, 0, 1, 0, 1, 0, 0]], device=device).repeat(4, 1)  # next = noise
    zeros = torch.zeros(2, 1000, device=device)
    out = flow_step(zeros, zeros, coeffs, 3, seed)
    assert torch.equal(out.next_latents, philox_normal(seed, (1000,), 3, 0))


@pytest.mark.witness
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_are_the_rounded_float32_values(dtype, device):
    seed = torch.tensor([3, 4], device=device)
    assert torch.equal(philox_normal(seed, (777,), dtype=dtype), philox_normal(seed, (777,)).to(dtype))


@pytest.mark.witness
def test_shape_only_matters_in_total(device):
    seed = torch.tensor([3], device=device)
    assert torch.equal(philox_normal(seed, (4, 5, 6)).flatten(), philox_normal(seed, (120,)).flatten())
    assert torch.equal(philox_normal(seed, (120,))[:, :50], philox_normal(seed, (50,)))
