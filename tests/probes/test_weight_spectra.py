"""Weight spectra of models whose weights are known: a planted tail, planted spikes, too few values, unknown ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx
from torch import nn

from workbench.probe import Reading
from workbench.probes.weight_spectra import WeightSpectra
from workbench.subject import Subject

FAST = WeightSpectra(resamples=20)


def rotated(squares: np.ndarray, columns: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, len(squares))))[0] for n in (len(squares), columns))
    return torch.from_numpy((left * np.sqrt(squares)) @ right.T)


def planted() -> nn.Sequential:
    """Random entries; two spikes on them; a power law; 49 and 50 values; a layer of rank 3."""
    rng = np.random.default_rng(0)
    tail = rng.uniform(size=80) ** (-1 / 1.7)
    spikes = torch.from_numpy(rng.normal(0, 0.1, (100, 80)))
    spikes[:, 0], spikes[:, 1] = spikes[:, 0] + 1.0, spikes[:, 1] + 0.5 * (-1) ** torch.arange(100)
    weights = [
        torch.from_numpy(rng.normal(0, 0.1, (80, 60))),
        spikes,
        torch.from_numpy(rng.normal(0, 0.1, (80, 100))),
        rotated(tail, 80, 1),
        torch.from_numpy(rng.normal(size=(49, 80))),
        torch.from_numpy(rng.normal(size=(50, 49)) @ np.ones((49, 1)) @ np.ones((1, 49))),
        torch.from_numpy(rng.normal(size=(60, 50))),
    ]
    layers = [nn.Linear(w.shape[1], w.shape[0], bias=i == 0, dtype=torch.float64) for i, w in enumerate(weights)]
    with torch.no_grad():
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(weight)
    return nn.Sequential(*layers)


def subject(model: nn.Sequential) -> Subject:
    x = torch.randn(4, model[0].in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Subject(model, (x, torch.arange(4)))


@pytest.fixture(scope="module")
def reading() -> Reading:
    return FAST.run(subject(planted()))


def test_the_values_are_those_of_the_weights(reading: Reading) -> None:
    data = reading.data
    for i, layer in enumerate(planted()):
        squares = np.linalg.svd(layer.weight.detach().numpy(), compute_uv=False) ** 2
        assert data.eigenvalue.values[i, : len(squares)] == approx(squares, rel=1e-9, abs=1e-9)
        assert np.isnan(data.eigenvalue.values[i, len(squares) :]).all()
        assert float(data.log_norm[i]) == approx(np.log10(float((layer.weight**2).sum())))
    assert reading.converged


def test_what_was_planted_is_found(reading: Reading) -> None:
    data = reading.data
    assert data.spikes.values[:3] == approx([0, 2, 0])
    assert data.noise_std.values[:3] == approx(0.1, rel=0.05)
    assert (data.bulk_mass.values[[0, 2]] > 0.95).all()
    assert float(data.alpha_low[3]) < 2.7 < float(data.alpha_high[3])
    assert bool(data.power_law[3])
    assert not data.power_law.values[[0, 2, 4, 5]].any()
    assert float(data.zeros[5]) == 48
    assert reading.summary["power_laws"] == int(data.power_law.sum())
    assert reading.summary["spikes"] >= 2


def test_fewer_than_fifty_values_have_no_exponent_and_that_is_said(reading: Reading) -> None:
    fitted = np.isfinite(reading.data.alpha.values)
    assert list(fitted) == [True, True, True, True, False, False, True]
    said = [note for note in reading.notes if "fewer than the 50" in note]
    assert [note.split(":")[0] for note in said] == ["4", "5"]
    assert np.isfinite(reading.data.alpha_error.values).tolist() == list(fitted), "an exponent without an interval"


def test_two_runs_agree_and_the_model_stays(reading: Reading) -> None:
    model = planted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert FAST.run(subject(model)).data.equals(reading.data)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_weight_that_is_not_finite_takes_no_other_with_it(reading: Reading) -> None:
    here = subject(planted())
    spoilt = here.params["1.weight"].clone()
    spoilt[0, 0] = np.nan
    found = FAST.run(here.at({"1.weight": spoilt}))
    assert not found.converged
    assert np.isnan(found.data.log_norm.values).tolist() == [False, True] + 5 * [False]
    assert any("not finite" in note for note in found.notes)
    assert found.data.alpha.values[3] == reading.data.alpha.values[3]


def test_the_figure_draws_layers_that_have_enough_values(reading: Reading, tmp_path: Path) -> None:
    titles = [panel.title for panel in reading.figure().panels[3:]]
    assert not [title for title in titles if title.startswith("4")], "four dozen values have no density"
    asked = WeightSpectra(resamples=0, shown="4, 0").run(subject(planted()))
    assert [panel.title.split(",")[0] for panel in asked.figure().panels[3:]] == ["0", "4"]
    assert not asked.data.power_law.values.any()
    assert any("no goodness" in note for note in asked.notes)
    reading.export(tmp_path / "weights.png")
    assert (tmp_path / "weights.png").stat().st_size > 10_000
