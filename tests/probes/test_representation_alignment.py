"""Representation alignment: whole Gram matrices, rotations, shuffled loaders, and the value of unrelated networks."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workbench.numerics.kernels import linear_cka
from workbench.probe import Reading
from workbench.probes import representation_alignment as module
from workbench.probes.representation_alignment import RepresentationAlignment
from workbench.several import Pair
from workbench.subject import Subject

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).double()
Y = torch.arange(60) % 3


def build(seed: int = 0, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)).double()


def aligned(one: nn.Module, two: nn.Module, order: Tensor | None = None, **settings: int | str) -> Reading:
    rows = slice(None) if order is None else order
    return RepresentationAlignment(**settings).run(  # type: ignore[arg-type]
        Pair(Subject(one, (X, Y)), Subject(two, (X[rows], Y[rows])))
    )


def test_values_are_those_of_whole_gram_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", 7)
    one, two = build(0), build(1)
    found = aligned(one, two, layers="1").data
    a, b = (m[:2](X).detach().numpy() for m in (one, two))
    k, h = a @ a.T, b @ b.T
    cosine = (k * h).sum() / math.sqrt((k * k).sum() * (h * h).sum())
    assert float(found.alignment[0]) == pytest.approx(cosine, rel=1e-12)
    cka = linear_cka(torch.from_numpy(a), torch.from_numpy(b), debiased=False)
    assert float(found.centred_alignment[0]) == pytest.approx(cka, rel=1e-12)
    assert float(found.sign_agreement[0]) == pytest.approx(np.mean(np.sign(a) == np.sign(b)))
    left = [_without(k, h, i) for i in range(60)]
    error = math.sqrt(59 / 60 * ((np.array(left) - np.mean(left)) ** 2).sum())
    assert float(found.alignment_error[0]) == pytest.approx(error, rel=1e-9)


def _without(k: np.ndarray, h: np.ndarray, i: int) -> float:
    k, h = (np.delete(np.delete(m, i, 0), i, 1) for m in (k, h))
    return float((k * h).sum() / math.sqrt((k * k).sum() * (h * h).sum()))


def test_a_network_is_one_with_itself_under_shuffling_rotation_and_scale() -> None:
    one = build()
    two = copy.deepcopy(one)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double())[0]
    with torch.no_grad():
        two[2].weight.copy_(2.5 * turn @ two[2].weight)
        two[2].bias.copy_(2.5 * turn @ two[2].bias)
    found = aligned(one, two, torch.randperm(60, generator=torch.Generator().manual_seed(2))).data
    assert found.alignment.values == pytest.approx(1)
    assert found.centred_alignment.values == pytest.approx(1)
    assert found.alignment_error.values == pytest.approx(0, abs=1e-9)


def test_the_baseline_is_what_unrelated_networks_show() -> None:
    """Uncentred alignment of positive features is high for any two networks; their baseline says so."""
    others = [aligned(build(0, 64), build(seed, 64), layers="1", shuffles=0).data for seed in range(1, 9)]
    found = aligned(build(0, 64), build(1, 64), layers="1", shuffles=8).data
    for name, baseline in (("alignment", "baseline"), ("centred_alignment", "centred_baseline")):
        seen = [float(o[name][0]) for o in others]
        assert float(found[baseline][0]) == pytest.approx(np.mean(seen), abs=4 * np.std(seen) / math.sqrt(8) + 0.03)
    assert float(found.baseline[0]) > 0.6
    assert math.isnan(float(others[0].baseline[0]))


def test_constant_features_are_not_known() -> None:
    dead = build()
    with torch.no_grad():
        dead[0].bias.fill_(-100.0)
    reading = aligned(build(), dead, layers="1")
    assert math.isnan(float(reading.data.alignment[0]))
    assert not reading.converged
