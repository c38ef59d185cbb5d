"""The preview against torch's own pooling in float64, and its Gram matrix against centred features."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import avg_pool2d, avg_pool3d

from benchmarks.cases import Size
from benchmarks.cases.preview import cases as preview_cases
from flowgrpo_fast import _C
from flowgrpo_fast.ops import Guidance, preview, reference
from flowgrpo_fast.ops._binding import Transition

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Lines shorter and longer than a tile (256) and a slab (1024), odd ones, and cells wider than either.
IMAGES = [
    ((1, 1, 1, 1), 1),
    ((2, 3, 8, 8), 2),
    ((2, 2, 6, 15), (3, 5)),
    ((1, 2, 4, 300), (2, 3)),
    ((1, 1, 2, 1300), (2, 325)),
    ((2, 4, 64, 64), 8),
]
VIDEOS = [((2, 3, 4, 6, 10), (2, 3, 5)), ((1, 2, 3, 4, 4), 2), ((1, 1, 6, 2, 24), (3, 1, 8))]
PACKED = [
    ((2, 24, 5), (4, 6), 2, (2, 3)),
    ((2, 24, 64), (2, 3, 4), (2, 3, 2), (1, 1, 2)),
    ((1, 60, 48), (2, 30), (1, 15), (2, 2)),
    ((1, 8, 520), (1, 8), (1, 4), (1, 2)),
]


def exact_x0(c, sigma):
    """``latents - sigma * v`` in float64, written out."""
    velocity = c.velocity.double()
    if c.guidance is not None:
        negative = c.guidance.negative_velocity.double()
        velocity = negative + c.guidance.scale * (velocity - negative)
    return c.latents.double() - sigma.double().view(-1, *[1] * (c.latents.ndim - 1)) * velocity


def pooled_by_torch(x0, pool, grid=None):
    """`avg_pool2d` or `avg_pool3d` of the latents as channels first."""
    channels_first = x0 if grid is None else x0.transpose(1, 2).unflatten(2, grid)
    if channels_first.ndim == 4:
        pooled = avg_pool2d(channels_first, pool[-2:] if isinstance(pool, tuple) else pool)
    else:
        pooled = avg_pool3d(channels_first, (1, pool, pool) if isinstance(pool, int) else pool)
    return pooled if grid is None else pooled.flatten(2).transpose(1, 2)


def check(c, pool, grid=None):
    pooled = preview(c.latents, c.velocity, c.coeffs, c.step_index, pool, c.guidance, grid)
    exact = pooled_by_torch(exact_x0(c, c.coeffs[c.step_index, 0]), pool, grid)
    assert pooled.dtype == torch.float32
    assert pooled.shape == exact.shape
    torch.testing.assert_close(pooled.double(), exact, rtol=1e-6, atol=4e-6)
    cell = (1, pool, pool) if isinstance(pool, int) else (1, *pool)[-3:]
    same = reference.preview(
        c.latents, c.velocity, c.coeffs, c.step_index, cell, c.guidance, grid, torch.float64
    )
    torch.testing.assert_close(same, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.witness
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("shape", "pool"), IMAGES + VIDEOS, ids=str)
def test_matches_torch_s_pooling(case, shape, pool, dtype, guided, device):
    check(case(shape, dtype, guided=guided, device=device), pool)


@pytest.mark.witness
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("shape", "grid", "pool", "cells"), PACKED, ids=str)
def test_packed_tokens_match_torch_s_pooling(case, shape, grid, pool, cells, dtype, guided, device):
    c = case(shape, dtype, guided=guided, device=device)
    check(c, pool, grid)
    pooled = preview(c.latents, c.velocity, c.coeffs, c.step_index, pool, c.guidance, grid)
    assert pooled.shape == (shape[0], torch.Size(cells).numel(), shape[2])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 9),
    cells=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9)),
    pool=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    guided=st.booleans(),
    packed=st.booleans(),
)
def test_matches_on_any_shape(case, batch, channels, cells, pool, dtypes, guided, packed):
    grid = tuple(count * side for count, side in zip(cells, pool, strict=True))
    length = torch.Size(grid).numel()
    shape = (batch, length, channels) if packed else (batch, channels, *grid)
    check(case(shape, *dtypes, guided=guided), pool, grid if packed else None)


@pytest.mark.witness
@pytest.mark.parametrize("group_size", [1, 2, 6])
@pytest.mark.parametrize("shape", [(6, 1, 2, 2), (6, 5, 8, 16), (6, 3, 18, 20)], ids=str)
def test_gram_is_that_of_the_centred_features(case, shape, group_size, device):
    c = case(shape, device=device)
    pooled, gram = preview(c.latents, c.velocity, c.coeffs, c.step_index, 2, group_size=group_size)
    features = pooled.double().flatten(1).view(6 // group_size, group_size, -1)
    expected = torch.stack([(f - f.mean(0)) @ (f - f.mean(0)).T for f in features])
    assert gram.dtype == torch.float32
    torch.testing.assert_close(gram.double(), expected, rtol=4e-6, atol=1e-6 * float(expected.abs().max()))
    torch.testing.assert_close(reference.centred_gram(pooled.double(), group_size), expected)
    assert torch.equal(gram, gram.transpose(1, 2))


def test_gram_of_several_rounds_is_that_of_one():
    """Of many samples the CPU takes few features at a time: sums go on from round to round."""
    generator = torch.Generator().manual_seed(2)
    pooled = torch.randn(2 * 1030, 700, generator=generator)  # 3 tiles, one of which fills a round
    whole, part = torch.empty(2, 1030, 1030), torch.empty(103, 20, 20)
    _C.gram(pooled, torch.empty_like(pooled), whole, torch.get_num_threads())
    features = pooled.double().view(2, 1030, 700)
    features = features - features.mean(1, keepdim=True)
    torch.testing.assert_close(whole.double(), features @ features.mT, rtol=1e-5, atol=1e-4)
    _C.gram(pooled, torch.empty_like(pooled), part, torch.get_num_threads())
    alone = torch.empty(1, 20, 20)
    _C.gram(pooled[-20:], torch.empty(20, 700), alone, 1)
    assert torch.equal(part[-1:], alone)


def test_gram_keeps_small_distances_under_a_large_mean(case):
    """Candidates 1e-3 apart around features of 1e3: a Gram matrix of the raw features would have lost them."""
    c = case((4, 3, 8, 8))
    c.latents = 1e3 + 1e-3 * torch.arange(4.0).view(4, 1, 1, 1).expand_as(c.latents).contiguous()
    c.velocity.zero_()
    pooled, gram = preview(c.latents, c.velocity, c.coeffs, c.step_index, 4, group_size=4)
    norm = gram[0].diagonal()
    distance = norm[:, None] + norm[None] - 2 * gram[0]
    exact = torch.cdist(pooled.double().flatten(1), pooled.double().flatten(1)).square()
    torch.testing.assert_close(distance.double(), exact, rtol=1e-4, atol=1e-10)


@pytest.mark.witness
@pytest.mark.parametrize("shape", [(4, 3, 6, 6), (4, 3, 6, 24)], ids=str)
def test_float64_is_computed_in_double(case, shape, device):
    c = case(shape, torch.float64, guided=True, device=device)
    pooled, gram = preview(c.latents, c.velocity, c.coeffs, c.step_index, 3, c.guidance, group_size=2)
    exact = pooled_by_torch(exact_x0(c, c.coeffs[c.step_index, 0]), 3)
    torch.testing.assert_close(pooled, exact, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(gram, reference.centred_gram(exact, 2), rtol=1e-13, atol=1e-13)


def test_a_cell_of_one_position_is_the_prediction_of_the_step(case):
    from flowgrpo_fast.ops import flow_step

    c = case((3, 4, 9, 31), torch.bfloat16, guided=True)
    out = flow_step(c.latents, c.velocity, c.coeffs, c.step_index, c.seed, c.guidance, return_x0_pred=True)
    assert torch.equal(preview(c.latents, c.velocity, c.coeffs, c.step_index, 1, c.guidance), out.x0_pred)


def rows_of(c, rows, **options):
    guidance = Guidance(c.guidance.negative_velocity[rows].contiguous(), c.guidance.scale)
    return preview(c.latents[rows], c.velocity[rows], c.coeffs, c.step_index[rows], 3, guidance, **options)


@pytest.mark.witness
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_sample_does_not_see_its_batch(case, dtype, device):
    c = case((6, 16, 33, 33), dtype, guided=True, device=device)
    whole, gram = rows_of(c, torch.arange(6), group_size=3)
    order = torch.tensor([3, 4, 5, 0, 1, 2])
    moved, moved_gram = rows_of(c, order, group_size=3)
    assert torch.equal(moved, whole[order])
    assert torch.equal(moved_gram, gram[[1, 0]])
    for row in range(6):
        assert torch.equal(rows_of(c, torch.tensor([row])), whole[row : row + 1])


def test_thread_count_changes_nothing(case):
    c = case((6, 16, 33, 33), guided=True)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 3, 7):
            torch.set_num_threads(num_threads)
            results.append(rows_of(c, torch.arange(6), group_size=6))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(case, dtype):
    op = torch.ops.flowgrpo_fast.preview
    for shape, pool, grid, group_size in (
        ((4, 3, 4, 6), [1, 2, 3], [], 2),
        ((2, 3, 2, 4, 6), [2, 2, 3], [], 0),
        ((2, 24, 3), [1, 2, 3], [4, 6], 2),
    ):
        c = case(shape, dtype, guided=True)
        transition = Transition(c.latents, c.velocity, c.coeffs, 2, c.step_index, *c.guidance, None)
        torch.library.opcheck(op, (*transition, pool, grid, group_size))


def test_fake_tensors_give_shapes(case):
    c = case((4, 24, 3), torch.bfloat16)
    with FakeTensorMode() as mode:
        arguments = [mode.from_tensor(t) for t in (c.latents, c.velocity, c.coeffs)]
        out = preview(*arguments, 1, 2, grid=(4, 6), group_size=2)
    assert (out.pooled.shape, out.pooled.dtype) == ((4, 6, 3), torch.float32)
    assert out.gram.shape == (2, 2, 2)


@pytest.mark.slow
def test_compiles(case):
    c = case((4, 3, 8, 8), guided=True)
    arguments = (c.latents, c.velocity, c.coeffs, c.step_index, 2, c.guidance, None, 2)
    compiled = torch.compile(preview, fullgraph=True)(*arguments)
    for left, right in zip(compiled, preview(*arguments), strict=True):
        assert torch.equal(left, right)


def test_no_gradient_flows(case):
    c = case((2, 3, 4, 4))
    assert not preview(c.latents, c.velocity.requires_grad_(), c.coeffs, 1, 2).requires_grad


IMAGE = (2, 3, 8, 6)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (IMAGE, {"latents": [1.0]}, "latents is a list, must be a torch.Tensor"),
        (
            IMAGE,
            {"velocity": torch.zeros(2, 3, 8, 5)},
            "velocity has shape [2, 3, 8, 5], must have [2, 3, 8, 6]",
        ),
        (IMAGE, {"velocity": torch.zeros(2, 3, 8, 6).int()}, "velocity has dtype torch.int32, must have"),
        (IMAGE, {"step_index": 9}, "step_index is 9, must be in [0, 5)"),
        (IMAGE, {"coeffs": None}, "coeffs is a NoneType, must be a torch.Tensor"),
        (IMAGE, {"coeffs": torch.zeros(5, 7)}, "coeffs has shape [5, 7], must have [5, 8]"),
        (
            IMAGE,
            {"coeffs": torch.zeros(5, 8).half()},
            "coeffs has dtype torch.float16, must have torch.float32",
        ),
        (
            IMAGE,
            {"guidance": Guidance(1.0, 2.0)},
            "guidance.negative_velocity is a float, must be a torch.Tensor",
        ),
        (
            IMAGE,
            {"guidance": Guidance(torch.zeros(2, 3, 8, 5), 2.0)},
            "guidance.negative_velocity has shape [2, 3, 8, 5], must have [2, 3, 8, 6] as latents has",
        ),
        (
            IMAGE,
            {"guidance": Guidance(torch.zeros(IMAGE).half(), 2.0)},
            "guidance.negative_velocity has dtype torch.float16, must have torch.float32",
        ),
        (IMAGE, {"guidance": 2.0}, "guidance is a float, must be Guidance(negative_velocity, scale)"),
        (IMAGE, {"pool": 4}, "pool is [1, 4, 4], must divide the grid [1, 8, 6]"),
        (IMAGE, {"pool": (2, 2, 2)}, "pool is [2, 2, 2], must divide the grid [1, 8, 6]"),
        (IMAGE, {"pool": 0}, "pool is 0, must be a positive int"),
        (IMAGE, {"pool": (1, 2, 2, 2)}, "pool is (1, 2, 2, 2), must be a positive int"),
        (IMAGE, {"group_size": 4}, "group_size is 4, must divide the batch of 2"),
        (IMAGE, {"group_size": 0}, "group_size is 0, must divide the batch of 2"),
        (IMAGE, {"grid": (8, 6)}, "grid is [8, 6], must be (H, W) or (T, H, W) of latents [B, L, C]"),
        (
            (2, 24, 3),
            {},
            "latents has shape [2, 24, 3], must have [B, C, H, W] or [B, C, T, H, W], or a grid",
        ),
        ((2, 24, 3), {"grid": (4, 5)}, "grid is [4, 5], must be (H, W) or (T, H, W)"),
        ((2, 24, 3), {"grid": (24,)}, "grid is [24], must be (H, W) or (T, H, W)"),
    ],
    ids=str,
)
def test_names_the_bad_argument(case, shape, options, message):
    c = case(shape)
    arguments = {
        "latents": c.latents,
        "velocity": c.velocity,
        "coeffs": c.coeffs,
        "step_index": 1,
        "pool": 2,
        **options,
    }
    with pytest.raises(ValueError, match=rf"\Apreview: [^\n]*{re.escape(message)}[^\n]*\Z"):
        preview(**arguments)


@pytest.mark.slow
def test_the_contenders_of_the_benchmark_agree(benchmark_sample):
    (case,) = preview_cases(Size("toy", 4, benchmark_sample), torch.float32, torch.device("cpu"))
    ours = case.contenders["ours"]()
    for name in ("eager", "compiled"):
        for left, right in zip(case.contenders[name](), ours, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
