"""Opposing outliers: what a linear map can and cannot see of them; linear nets against products of matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.zoo.outliers import linear_net, opposing_outliers, outlier_pairs


def test_targets_are_linear_in_all_but_the_outlier_and_even_in_that() -> None:
    x, y = (t.numpy() for t in opposing_outliers(400, 5, size=4.0, share=0.1, teacher=2.5, seed=3))
    outlier, targets = x[:, -1], y[:, 0]
    assert (outlier[:20] == 4).all()
    assert (outlier[20:40] == -4).all()
    assert not outlier[40:].any()
    weights, rest, *_ = np.linalg.lstsq(x, targets - np.abs(outlier), rcond=None)
    assert rest == pytest.approx(0, abs=1e-20)
    assert weights[-1] == pytest.approx(0, abs=1e-12)
    assert np.linalg.norm(weights) == pytest.approx(2.5)
    best, *_ = np.linalg.lstsq(x, targets, rcond=None)
    assert abs(best[-1]) < 0.2, "a linear map has no use for it"
    assert outlier @ outlier / 400 == pytest.approx(0.1 * 16), "its variance, beside 1 of the others"
    assert x[:, :-1].std() == pytest.approx(1, abs=0.1)


def test_seeds_decide_the_task_and_there_is_always_a_pair() -> None:
    one, again, other = (opposing_outliers(40, 3, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[1], other[1])
    assert [outlier_pairs(n, share) for n, share in ((2000, 0.1), (10, 0.001), (7, 1.0))] == [100, 1, 3]
    with pytest.raises(ValueError, match="2 examples"):
        opposing_outliers(1)


def test_the_net_is_a_product_of_gaussian_matrices() -> None:
    net = linear_net((21, 300, 2), scale=0.05, seed=4)
    first, second = (p.detach() for p in net.parameters())
    assert first.dtype == torch.float64
    assert (tuple(first.shape), tuple(second.shape)) == ((300, 21), (2, 300))
    assert float(first.std()) == pytest.approx(0.05, rel=0.05)
    x = torch.randn(6, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(x), x @ (second @ first).T)
    again, other = (next(linear_net((21, 300, 2), 0.05, seed=s).parameters()) for s in (4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
