"""The orthogonal frame of imbalanced classes against worked values, a scan of the scalar objective, and training."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from workbench.numerics.orthogonal_frame import orthogonal_frame


@pytest.mark.parametrize(
    ("counts", "decay", "matrices", "product", "means", "logits", "loss"),
    [
        ((4, 1, 1), 0.1, 1, (1.4, 0.4, 0.4), (0.35, 0.4, 0.4), (0.7, 0.4, 0.4), 0.31),
        ((4, 1, 1), 0.2, 1, (0.8, 0, 0), (0.2, 0, 0), (0.4, 0, 0), 0.44666667),
        (
            (4, 2, 1), 0.01, 2, (2.42606278, 1.49334601, 0.90548414), (0.38939559, 0.61101269, 0.95156930),
            (0.97195583, 0.95522424, 0.92824076), 0.05684659,
        ),
    ],
)  # fmt: skip
def test_worked_values(counts, decay, matrices, product, means, logits, loss):
    found = orthogonal_frame(counts, decay, decay, matrices)
    assert found.product_norm**2 == approx(product, abs=1e-8)
    assert found.feature_norm**2 == approx(means, abs=1e-8)
    assert found.logit == approx(logits, abs=1e-8)
    assert found.minimum == approx(loss, abs=1e-8)


@given(
    st.lists(st.integers(1, 50), min_size=2, max_size=5),
    st.floats(1e-4, 0.3),
    st.floats(1e-4, 0.3),
    st.integers(1, 4),
)
def test_no_point_of_a_scan_lies_below_the_minimum(counts, weight_decay, feature_decay, matrices):
    """The objective of one class as a function of its row's length w, minimised over its features by hand."""
    found = orthogonal_frame(counts, weight_decay, feature_decay, matrices)
    n = sum(counts)
    w = np.geomspace(1e-4, 1e3, 20001)
    for k, size in enumerate(counts):
        gain = w**matrices
        h = gain / (gain**2 + n * feature_decay)
        fit = size / (2 * n) * (gain * h - 1) ** 2 + size * feature_decay / 2 * h**2
        scan = np.append(fit + matrices * weight_decay / 2 * w**2, size / (2 * n))
        assert found.loss[k] <= scan.min() + 1e-12
        assert found.loss[k] == approx(scan.min(), rel=1e-4)


def test_a_minimum_that_is_only_local_is_not_taken_for_the_global_one():
    """M = 2, b = 0.55: a positive root exists, but giving the class up costs less."""
    decay = (0.55 / 2) ** (2 / 3) / 1.0  # one class: b = 2 (λ_W² λ_H)^{1/2} = 2 λ^{3/2}
    found = orthogonal_frame([1], decay, decay, 2)
    assert found.collapsed[0]
    assert found.stationary[0]
    assert found.minimum == approx(0.5)


def test_absent_classes_and_no_decay_are_refused():
    with pytest.raises(ValueError, match="Leave absent classes out"):
        orthogonal_frame([3, 0], 0.1, 0.1)
    with pytest.raises(ValueError, match="positive decays"):
        orthogonal_frame([3, 2], 0.0, 0.1)
