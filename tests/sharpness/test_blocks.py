"""m-sharpness on examples that each bend their own weight."""

from __future__ import annotations

import itertools

import pytest
import torch
from surfaces import last, point
from torch import Tensor, nn

from workbench.sharpness.balls import Euclidean
from workbench.sharpness.blocks import block_sharpness
from workbench.subject import Subject


class OwnWeights(nn.Module):
    """Example i of one-hot inputs sees the weight w_i alone."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, count, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def subject(count: int) -> Subject:
    """ℓ_i = ½ w_i² at w = 0."""
    x = torch.eye(count, dtype=torch.float64)
    return Subject(OwnWeights(count), (x, torch.zeros(count, 1, dtype=torch.float64)), loss="half_mse", batch_size=2)


@pytest.mark.parametrize(("m", "wanted"), [(1, 0.005), (2, 0.0025), (100, 0.0025)])
def test_merging_blocks_lowers_it(m: int, wanted: float) -> None:
    found = last(block_sharpness(point(subject(2)), Euclidean(0.1), 20, m))
    assert found.value == pytest.approx(wanted, rel=1e-6)
    assert found.lower_bound


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_a_short_last_block_counts_by_its_examples(m: int) -> None:
    """A block of k examples has the maximum ½ ρ²/k, so that each block adds the same, ½ ρ²/N, whatever its size."""
    found = last(block_sharpness(point(subject(5)), Euclidean(0.1), 20, m))
    assert found.value == pytest.approx(-(-5 // m) * 0.005 / 5, rel=1e-6)


def test_blocks_are_random_whatever_the_order_of_the_data() -> None:
    """Data sorted by class must not give blocks of one class."""
    here = point(subject(12))
    dealt = [list(b) for b in _dealt(here, 4)]
    assert sorted(itertools.chain(*dealt)) == list(range(12))
    assert dealt != [list(range(k, k + 4)) for k in (0, 4, 8)]
    assert dealt == [list(b) for b in _dealt(point(subject(12)), 4)]


def _dealt(here: object, m: int) -> list[list[int]]:
    from workbench.sharpness import blocks

    return [list(b) for b in blocks._blocks(here, m)]  # type: ignore[arg-type]
