"""Brackets of a subset's sharpness against matrices computed by hand; what the probe says of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from workbench.numerics.sampling import Draw
from workbench.probes.spectrum import HessianSpectrum
from workbench.spectra.halves import Bracket, Halves, halved
from workbench.spectra.opening import opener
from workbench.subject import Subject

ONE = HessianSpectrum(top=1, minimum=False, trace=False, density=False)
INPUTS = torch.from_numpy(np.random.default_rng(0).standard_t(3, size=(400, 6)))


def regression(**words: Any) -> Subject:
    """Least squares with ½ of the mean square, whose Hessian is XᵀX/n, whatever the weights and targets."""
    model = nn.Linear(6, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    targets = INPUTS @ torch.arange(6.0, dtype=torch.float64)[:, None]
    return Subject(model, (INPUTS, targets), loss="half_mse", **words)


def largest(inputs: np.ndarray) -> tuple[float, np.ndarray]:
    values, vectors = np.linalg.eigh(inputs.T @ inputs / len(inputs))
    return float(values[-1]), vectors[:, -1]


def inputs_of(subject: Subject) -> np.ndarray:
    return np.concatenate([batch.inputs.numpy() for batch in subject.batches()])


def test_halves_share_the_examples_and_their_losses() -> None:
    subject = regression(max_examples=101)
    losses = subject.losses().numpy()
    seen = set()
    for seed in range(4):
        first, second = halved(subject, Draw(seed, "halves", subject.size))
        assert sorted([*first, *second]) == list(range(101))
        assert (len(first), len(second)) == (50, 51)
        ranks = np.argsort(np.argsort(losses))
        pairs = [set(ranks[half][ranks[half] < 100] // 2) for half in (first, second)]
        assert pairs[0] == pairs[1] == set(range(50))  # neighbours in loss part
        seen.add(tuple(first))
    assert len(seen) == 4
    assert halved(subject, Draw(0, "halves", 6)) == halved(subject, Draw(0, "halves", 6))


def test_eigenvalues_and_quotients_are_those_of_the_halves() -> None:
    subject, draw = regression(max_examples=80), Draw(3, "halves", 6)
    halves = Halves(subject, draw, 1e-8, opener("hessian"))
    pauses = sum(1 for _ in halves.run())
    first, second = (inputs_of(subject.selected(part)) for part in halved(subject, draw))
    (top_a, vector_a), (top_b, vector_b) = largest(first), largest(second)
    across = [np.mean((second @ vector_a) ** 2), np.mean((first @ vector_b) ** 2)]
    assert halves.values == pytest.approx([top_a, top_b], rel=1e-10)
    assert halves.quotients == pytest.approx(across, rel=1e-8)
    assert pauses == halves.products <= 16
    found = halves.bracket(5.0)
    spread = max(abs(across[0] - across[1]), abs(top_a - top_b)) / 2
    assert (found.low, found.high) == (pytest.approx(np.mean(across) - spread), pytest.approx(5.0 + spread))


def test_the_bracket_holds_in_the_mean_and_is_not_an_interval() -> None:
    truth, _ = largest(INPUTS.numpy())
    readings = [ONE.run(regression(max_examples=60, seed=seed), seed=seed).data for seed in range(60)]
    low, high, spread, plug_in = (
        np.array([r[name].values.item() for r in readings])
        for name in ("sharpness_low", "sharpness_high", "halves_spread", "eigenvalue")
    )
    assert np.mean(low + spread) < truth < np.mean(plug_in)
    assert np.mean((low <= truth) & (truth <= high)) > 0.75
    assert np.all(low <= plug_in)
    assert np.all(plug_in <= high)


def test_a_reading_on_a_subset_carries_its_bracket() -> None:
    reading = ONE.run(regression(max_examples=40))
    found = reading.summary
    assert found["sharpness_low"] < found["sharpness"] < found["sharpness_high"]
    assert float(reading.data.half_examples) == 20
    assert any("use more (max_examples=)" in note for note in reading.notes)
    assert not any("interval" in note for note in reading.notes)
    marks = [type(mark).__name__ for mark in reading.figure().panels[0].marks]
    assert marks.count("Band") == 1


@pytest.mark.parametrize("words", [{}, {"max_examples": 40}, {"max_examples": 6}])
def test_without_other_data_or_with_too_few_or_unwanted_there_is_none(words: dict[str, int]) -> None:
    probe = HessianSpectrum(top=1, minimum=False, trace=False, density=False, bracket=words.get("max_examples") != 40)
    reading = probe.run(regression(**words))
    assert np.isnan(reading.data.sharpness_low)
    assert np.isnan(reading.data.half_products)
    assert "sharpness_low" not in reading.summary
    assert all(type(mark).__name__ != "Band" for mark in reading.figure().panels[0].marks)


@pytest.mark.parametrize(
    ("low", "high", "wide"), [(1.0, 1.24, False), (1.0, 1.25, True), (-0.1, 1.0, True), (0.0, 0.0, True)]
)
def test_a_wide_bracket_is_known(low: float, high: float, wide: bool) -> None:
    assert Bracket(low, high, 0.0, 20).wide is wide
