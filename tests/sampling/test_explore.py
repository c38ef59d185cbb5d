from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from flowgrpo_fast.experience.scouts import ranks, spearman, top_overlap


def test_spearman_is_scipys_ties_included() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20, 12, generator=generator)
    b = a + torch.randn(20, 12, generator=generator)
    a[::2] = a[::2].round()  # ties
    b[::3] = b[::3].round()
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(spearman(a, b).numpy(), expected, atol=1e-12)
    np.testing.assert_array_equal(ranks(a).numpy(), stats.rankdata(a.numpy(), axis=1))


def test_a_constant_row_has_no_ranking() -> None:
    a = torch.tensor([[1.0, 1, 1], [1, 2, 3]])
    assert spearman(a, torch.tensor([[1.0, 2, 3], [3, 2, 1]])).tolist() == [0.0, -1.0]


def test_overlap_counts_the_shared_best() -> None:
    a = torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1], [1, 2, 3, 4]])
    b = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 4, 2, 3]])
    assert top_overlap(a, b, 2).tolist() == [1.0, 0.0, 0.5]
