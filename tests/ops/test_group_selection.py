"""Selections, Pareto fronts and compaction: against references, brute force and each other's definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrpo_fast.ops import best_variance_subset, compact, pareto_fronts, reference, top_bottom

NAN, INF = float("nan"), float("inf")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def some_rewards(prompts, candidates, dtype=torch.float32, levels=None):
    generator = torch.Generator().manual_seed(prompts + candidates)
    if levels:  # with many ties, and sums without rounding
        return torch.randint(0, levels, (prompts, candidates), generator=generator).to(dtype)
    return torch.randn(prompts, candidates, generator=generator, dtype=torch.float64).to(dtype)


def best_by_brute_force(rewards, k):
    """The largest variance of all subsets of k."""
    return max(np.var(subset) for subset in itertools.combinations(rewards, k))


def sorted_top_bottom(rewards, num_top, num_bottom):
    """By Python's stable sort of one prompt, NaN lowest."""

    def low(i):
        return -INF if np.isnan(rewards[i]) else rewards[i], not np.isnan(rewards[i])

    top = sorted(range(len(rewards)), key=lambda i: (*(-x for x in low(i)), i))[:num_top]
    others = [i for i in range(len(rewards)) if i not in top]
    return top + sorted(others, key=lambda i: (*low(i), i))[:num_bottom]


@pytest.mark.witness
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("candidates", "k"), [(1, 1), (8, 3), (24, 12), (96, 24), (300, 299)])
@pytest.mark.parametrize("levels", [None, 2, 5])
def test_selections_match_reference(device, candidates, k, levels, dtype):
    rewards = some_rewards(3, candidates, dtype, levels)
    subset = best_variance_subset(rewards.to(device), k).cpu()
    assert subset.dtype == torch.int64
    assert torch.equal(subset, reference.best_variance_subset(rewards, k))
    num_top = k // 2
    both = top_bottom(rewards.to(device), num_top, k - num_top).cpu()
    assert torch.equal(both, reference.top_bottom(rewards, num_top, k - num_top))


@settings(max_examples=150, deadline=None)
@given(
    rewards=st.lists(st.integers(-6, 6).map(float) | st.floats(-3, 3, width=32), min_size=1, max_size=9),
    data=st.data(),
)
def test_best_variance_is_the_maximum(rewards, data):
    k = data.draw(st.integers(1, len(rewards)))
    subset = best_variance_subset(torch.tensor([rewards], dtype=torch.float64), k)[0].tolist()
    assert subset == sorted(set(subset))
    variance, best = np.var([rewards[i] for i in subset]), best_by_brute_force(rewards, k)
    assert variance == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_best_variance_of_many():
    rewards = some_rewards(2, 1024, torch.float64)
    assert torch.equal(best_variance_subset(rewards, 100), reference.best_variance_subset(rewards, 100))
    far = rewards + 1e6  # a large common offset costs no digits
    assert torch.equal(best_variance_subset(far, 100), reference.best_variance_subset(far, 100))


@pytest.mark.witness
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_of_equal_variances_the_one_with_more_high_rewards(device, dtype):
    """Whatever rounding says: single samples have variance 0, and two values vary as much m : n as n : m."""
    rewards = some_rewards(100, 24, dtype)
    best = best_variance_subset(rewards.to(device), 1)[:, 0].cpu()
    assert torch.equal(best, rewards.argmax(1))
    number = torch.arange(24)
    for low, high in ((0.1, 0.7), (0.2, 0.3), (-1.1, 2.3)):
        rewards = torch.where(number[8:17, None] > number, high, low).to(dtype)  # from 8 to 16 high ones
        for k in (3, 5, 7, 15):
            chosen = rewards.gather(1, best_variance_subset(rewards.to(device), k).cpu())
            assert ((chosen == rewards.max()).sum(1) == (k + 1) // 2).all()
            assert torch.equal(chosen, rewards.gather(1, reference.best_variance_subset(rewards, k)))


@pytest.mark.witness
def test_ties_go_to_the_lower_index(device):
    rewards = torch.tensor(
        [[1.0, 0, 1, 0, 1, 0], [2, 2, 2, 2, 2, 2], [-0.0, 0, 1, 0, -0.0, 1]], device=device
    )
    assert best_variance_subset(rewards, 3).tolist() == [[0, 1, 2], [0, 1, 2], [0, 2, 5]]
    assert top_bottom(rewards, 1, 2).tolist() == [[0, 1, 3], [0, 1, 2], [2, 0, 1]]
    assert top_bottom(rewards, 4, 2).tolist() == [[0, 2, 4, 1, 3, 5], [0, 1, 2, 3, 4, 5], [2, 5, 0, 1, 3, 4]]


@pytest.mark.witness
@pytest.mark.parametrize("num_top", range(7))
def test_nan_counts_as_lowest(device, num_top):
    rewards = torch.tensor([[1.0, NAN, 3, -INF, NAN, INF], [NAN] * 6, [0, INF, 0, INF, 2, 1]], device=device)
    num_bottom = min(2, 6 - num_top)
    if num_top + num_bottom:
        expected = [sorted_top_bottom(row, num_top, num_bottom) for row in rewards.cpu().numpy()]
        assert top_bottom(rewards, num_top, num_bottom).tolist() == expected
    if num_top:
        expected = [sorted(sorted_top_bottom(row, num_top, 0)) for row in rewards.cpu().numpy()]
        assert best_variance_subset(rewards, num_top).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(
    rewards=st.lists(st.sampled_from([0.0, 1.0, 2.0, NAN, INF, -INF, 0.5]), min_size=1, max_size=12),
    data=st.data(),
)
def test_top_bottom_is_a_stable_sort(rewards, data):
    num_top = data.draw(st.integers(0, len(rewards)))
    num_bottom = data.draw(st.integers(num_top == 0, len(rewards) - num_top))
    ours = top_bottom(torch.tensor([rewards]), num_top, num_bottom)[0].tolist()
    assert ours == sorted_top_bottom(np.array(rewards), num_top, num_bottom)


def fronts_by_peeling(points):
    """Front by front with Python tuples of one prompt, NaN as the lowest value."""
    points = [tuple(-INF if x != x else x for x in point) for point in points]
    fronts, left = [0] * len(points), set(range(len(points)))

    def dominates(a, b):
        return a != b and all(x >= y for x, y in zip(a, b, strict=True))

    for front in itertools.count():
        if not left:
            return fronts
        peeled = {i for i in left if not any(dominates(points[j], points[i]) for j in left)}
        for i in peeled:
            fronts[i] = front
        left -= peeled


@pytest.mark.witness
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("candidates", "num_objectives"), [(1, 1), (24, 2), (24, 3), (33, 8), (64, 2), (64, 1)]
)
@pytest.mark.parametrize("levels", [None, 4])
def test_fronts_match_reference_and_peeling(device, candidates, num_objectives, levels, dtype):
    objectives = some_rewards(3, candidates * num_objectives, dtype, levels).view(
        3, candidates, num_objectives
    )
    fronts = pareto_fronts(objectives.to(device)).cpu()
    assert fronts.dtype == torch.int64
    assert torch.equal(fronts, reference.pareto_fronts(objectives))
    assert fronts.tolist() == [fronts_by_peeling(points) for points in objectives.tolist()]


@settings(max_examples=100, deadline=None)
@given(
    num_objectives=st.integers(1, 8),
    values=st.lists(st.sampled_from([-1.0, 0.0, -0.0, 1.0, 2.0, NAN, INF]), min_size=8, max_size=64 * 3),
)
def test_fronts_of_anything(num_objectives, values):
    candidates = min(len(values) // num_objectives, 64)
    objectives = torch.tensor(values[: candidates * num_objectives]).view(1, candidates, num_objectives)
    assert pareto_fronts(objectives)[0].tolist() == fronts_by_peeling(objectives[0].tolist())


@pytest.mark.witness
def test_a_chain_has_a_front_a_sample(device):
    chain = torch.arange(64.0, device=device).view(1, 64, 1).expand(1, 64, 8).contiguous()
    assert pareto_fronts(chain)[0].tolist() == list(range(63, -1, -1))


def buffers_of_all_kinds(rows=11):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (rows, 3, 5, 16), generator=generator, dtype=torch.uint8)
    kinds = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
    plain = [bits.view(kind) if kind is not torch.bool else bits > 9 for kind in kinds]
    return [
        *plain,
        bits[:, 0, 0, 0].contiguous(),
        bits[:, 0, :2, :3].contiguous(),
        bits.view(rows, -1).view(torch.int16),
    ]


@pytest.mark.witness
def test_compact_matches_indexing(device):
    indices = torch.tensor([7, 0, 10, 7, 3])
    buffers = buffers_of_all_kinds()
    ours = compact(indices.to(device), *(b.to(device) for b in buffers))
    for row, buffer in zip(ours, buffers, strict=True):
        expected = buffer.view(torch.uint8)[indices] if buffer.dtype.itemsize == 1 else buffer[indices]
        assert row.dtype == buffer.dtype
        assert torch.equal(row.cpu().view(torch.uint8), expected.view(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.integers(1, 700), min_size=1, max_size=16),
    rows=st.integers(1, 9),
    indices=st.lists(st.integers(0, 8), min_size=1, max_size=12),
)
def test_compact_on_any_row_size(widths, rows, indices):
    chosen = torch.tensor(indices) % rows
    buffers = [torch.randint(0, 256, (rows, width), dtype=torch.uint8) for width in widths]
    for ours, exact in zip(compact(chosen, *buffers), reference.compact(chosen, *buffers), strict=True):
        assert torch.equal(ours, exact)


def test_compact_of_rows_longer_than_a_piece_on_any_number_of_threads():
    buffers = [
        torch.arange(3 * 1_048_577).view(3, -1).int(),
        torch.randn(6, 2, 33),
        torch.randn(5, 70_000).bfloat16(),
    ]
    indices = torch.tensor([2, 0, 0, 1])
    before = torch.get_num_threads()
    for num_threads in (1, 3, 4):
        torch.set_num_threads(num_threads)
        for ours, buffer in zip(compact(indices, *buffers), buffers, strict=True):
            assert torch.equal(ours, buffer[indices])
    torch.set_num_threads(before)


@pytest.mark.witness
def test_compact_into_given_buffers(device):
    indices = torch.tensor([2, 0], device=device)
    buffers = [b.to(device) for b in buffers_of_all_kinds(4)]
    out = [torch.empty_like(b[:2]) for b in buffers]
    pointers = [o.data_ptr() for o in out]
    returned = compact(indices, *buffers, out=out)
    assert [r.data_ptr() for r in returned] == pointers
    for ours, fresh in zip(out, compact(indices, *buffers), strict=True):
        assert torch.equal(ours.view(torch.uint8), fresh.view(torch.uint8))


def test_a_buffer_needed_by_a_backward_is_not_overwritten_unseen():
    values, out = torch.ones(2, requires_grad=True), torch.ones(2)
    loss = (values * out).sum()
    compact(torch.tensor([1, 0]), torch.arange(3.0), out=(out,))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        compact(torch.tensor([1]), torch.arange(3.0), out=(torch.empty(1),))


def test_compact_of_a_view_that_is_not_what_its_bytes_say():
    rows = torch.randn(3, 2, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    plain, conjugate = compact(torch.tensor([1]), rows, rows.conj())
    assert torch.equal(plain, rows[[1]])
    assert torch.equal(conjugate, torch.complex(rows.real, -rows.imag)[[1]])


@pytest.mark.witness
def test_compact_of_unaligned_rows(device):
    """Rows and pointers that fit no wide word take narrower ones."""
    flat = torch.arange(1200, dtype=torch.int16, device=device)
    for start, width in ((1, 8), (2, 8), (4, 12), (0, 7), (8, 64)):
        buffer = flat[start : start + 9 * width].view(9, width)
        (ours,) = compact(torch.tensor([8, 1], device=device), buffer)
        assert torch.equal(ours, buffer[[8, 1]])


@pytest.mark.witness
def test_an_index_that_is_no_row(device):
    buffers = [torch.arange(12.0, device=device).view(4, 3), torch.arange(3, device=device)]
    indices = torch.tensor([0, 3, -1, 2**62, -(2**62)], device=device)
    if device == "cpu":
        with pytest.raises(
            ValueError, match=r"indices is -1 at 2, must be in \[0, 4\) for the rows of buffers\[0\]"
        ):
            compact(indices, *buffers)
        with pytest.raises(
            ValueError, match=r"indices is 3 at 1, must be in \[0, 3\) for the rows of buffers\[1\]"
        ):
            compact(indices[:2], *buffers)
        return
    ours = compact(indices, *buffers)
    for row, buffer in zip(ours, buffers, strict=True):
        assert torch.equal(row, buffer[indices.clamp(0, len(buffer) - 1)])


@pytest.mark.gpu
def test_a_selection_in_a_cuda_graph():
    """Select, gather and peel without the host: the indices never leave the device."""
    rewards, latents = torch.randn(4, 24).cuda(), torch.randn(4 * 24, 16, 8, 8).cuda()
    offsets = 24 * torch.arange(4).cuda()[:, None]
    out = [torch.empty(4 * 12, 16, 8, 8).cuda(), torch.empty(4 * 12).cuda()]

    def prune():
        chosen = (best_variance_subset(rewards, 12) + offsets).flatten()
        compact(chosen, latents, rewards.view(-1), out=out)
        return pareto_fronts(torch.stack([rewards, -rewards], 2)), top_bottom(rewards, 2, 2)

    prune()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = prune()
    rewards.copy_(rewards.flip(1))
    graph.replay()
    replayed = [t.clone() for t in (*captured, *out)]
    for ours, eager in zip(replayed, (*prune(), *out), strict=True):
        assert torch.equal(ours, eager)
