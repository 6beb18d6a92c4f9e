"""Streaming sums of neural collapse: any split, rotation and offset gives one answer; folds equal starting again."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from workbench.numerics import collapse
from workbench.numerics.collapse import GroupedMoments, Scatter, of_moments


def stream(
    x: torch.Tensor, y: torch.Tensor, sizes: int, groups: int = 1, chosen: torch.Tensor | None = None
) -> Scatter:
    """Both passes over features that come ``sizes`` at a time."""
    places, sums = torch.arange(len(x)), GroupedMoments(4, x.shape[1], groups)
    chosen = y if chosen is None else chosen
    for part in zip(x.split(sizes), y.split(sizes), places.split(sizes), strict=True):
        sums.add(*part)
    scatter = Scatter(sums.folds())
    for part in zip(*(t.split(sizes) for t in (x, y, chosen, places)), strict=True):
        scatter.add(*part)
    return scatter


def told(scatter: Scatter, fold: int = 0) -> dict[str, float]:
    shares = {name: found[fold] for name, found in scatter.shares().items()}
    return {**of_moments(scatter.folds[fold]), "nc1": scatter.within()[fold], **shares}


def sample(seed: int, count: int = 50) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(4).repeat(3), rng.integers(0, 4, count - 12)])
    rows = rng.normal(size=(count, 6)) + 2 * rng.normal(size=(4, 6))[labels]
    return *map(torch.from_numpy, (rows, labels)), torch.from_numpy(rng.integers(0, 4, count))


@settings(max_examples=25)
@given(st.integers(0, 2**31 - 1), st.integers(1, 60), st.floats(0.01, 100), st.floats(-1e4, 1e4))
def test_batches_rotation_scale_and_offset_change_nothing(seed: int, sizes: int, scale: float, offset: float):
    x, y, chosen = sample(seed)
    turn = torch.linalg.qr(torch.from_numpy(np.random.default_rng(seed).normal(size=(6, 6))))[0]
    want = told(stream(x, y, 50, chosen=chosen))
    assert told(stream(scale * (x @ turn + offset), y, sizes, chosen=chosen)) == approx(want, rel=1e-5, abs=1e-7)


@settings(max_examples=15)
@given(st.integers(0, 2**31 - 1), st.integers(2, 6))
def test_a_fold_is_what_the_other_examples_give_alone(seed: int, groups: int):
    x, y, chosen = sample(seed)
    scatter = stream(x + 100, y, 17, groups, chosen)
    assert told(scatter) == approx(told(stream(x + 100, y, 50, chosen=chosen)), rel=1e-9)
    for left in range(groups):
        kept = torch.arange(50) % groups != left
        alone = stream(x[kept] + 100, y[kept], 50, chosen=chosen[kept])
        assert told(scatter, left + 1) == approx(told(alone), rel=1e-7, abs=1e-9)


def test_tiles_of_any_size_give_the_same_sums(monkeypatch):
    x, y, chosen = sample(1)
    want = told(stream(x, y, 50, 3, chosen))
    monkeypatch.setattr(collapse, "TILE", 7)
    assert told(stream(x, y, 50, 3, chosen)) == approx(want, rel=1e-12)


def test_no_array_of_features_by_features_is_made():
    """20 000 features: one square of them would take 3.2 GB, what is kept here a few thousandths."""
    x = torch.randn(8, 20_000, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8) % 4
    scatter = stream(x, y, 8)
    held = [scatter.axes, scatter.strengths, scatter.places, scatter.shifts, *vars(scatter.whole).values()]
    assert sum(t.numel() for t in held) < 10 * 4 * 20_000
    assert scatter.within()[0] > 0
