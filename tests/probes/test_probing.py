"""Linear probes against scikit-learn's ridge, each example left out in a loop or held out, on features cut by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytest import approx
from sklearn.linear_model import Ridge
from torch import nn

from workbench.probes.probing import Probing
from workbench.subject import Subject

Data = tuple[torch.Tensor, torch.Tensor]


def net(outputs: int = 3) -> nn.Sequential:
    rng = torch.Generator().manual_seed(1)
    made = nn.Sequential(nn.Linear(5, 80), nn.Tanh(), nn.Linear(80, 4), nn.ReLU(), nn.Linear(4, outputs)).double()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64))
    return made


def blobs(count: int, seed: int = 0, apart: float = 1.5) -> Data:
    rng = np.random.default_rng([count, seed])
    labels = rng.integers(0, 3, count)
    return torch.from_numpy(rng.normal(size=(count, 5)) + apart * np.eye(3, 5)[labels]), torch.from_numpy(labels)


def values(count: int, seed: int = 0) -> Data:
    x, _ = blobs(count, seed)
    return x, torch.stack([x[:, 0] ** 2, x[:, 1]], 1) + 0.1 * torch.randn(count, 2, dtype=torch.float64).clamp(-3, 3)


def features(model: nn.Sequential, x: torch.Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        return [model[: i + 1](x).numpy() for i in range(len(model))]


def scored(predictions: np.ndarray, targets: np.ndarray, mean: np.ndarray, classes: bool) -> float:
    if classes:
        return float((predictions.argmax(1) == targets.argmax(1)).mean())
    return float(1 - ((predictions - targets) ** 2).sum() / ((targets - mean) ** 2).sum())


def rows(targets: torch.Tensor, classes: bool) -> np.ndarray:
    return np.eye(3)[targets.numpy()] if classes else targets.numpy()


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("batch", [7])
def test_left_out_scores_are_those_of_a_loop(classes: bool, batch: int) -> None:
    x, y = blobs(40) if classes else values(40)
    model, wanted = net(3 if classes else 2), rows(y, classes)
    subject = Subject(model, (x, y), "cross_entropy" if classes else nn.MSELoss(), batch_size=batch)
    data = Probing().run(subject).data
    for i, h in enumerate(features(model, x)):
        found = np.empty_like(wanted)
        for out in range(40):
            rest = np.delete(np.arange(40), out)
            peer = Ridge(alpha=float(data.strength[i])).fit(h[rest], wanted[rest])
            found[out] = peer.predict(h[out : out + 1])
        assert float(data.score[i]) == approx(scored(found, wanted, wanted.mean(0), classes), abs=1e-6), i
    own = features(model, x)[-1]
    assert float(data.network) == approx(scored(own, wanted, wanted.mean(0), classes))
    assert bool(data.classes) == classes
    assert not bool(data.held_out)


@pytest.mark.parametrize("classes", [True, False])
def test_held_out_examples_are_those_that_are_tested(classes: bool) -> None:
    make = blobs if classes else values
    (x, y), (new, truth) = make(60), make(50, 1)
    model, fitted, wanted = net(3 if classes else 2), rows(y, classes), rows(truth, classes)
    loss = "cross_entropy" if classes else nn.MSELoss()
    data = Probing().run(Subject(model, (x, y), loss, held_out=(new, truth))).data
    for i, (h, held) in enumerate(zip(features(model, x), features(model, new), strict=True)):
        found = Ridge(alpha=float(data.strength[i])).fit(h, fitted).predict(held)
        assert float(data.score[i]) == approx(scored(found, wanted, fitted.mean(0), classes), abs=1e-6)
    assert float(data.network) == approx(scored(features(model, new)[-1], wanted, fitted.mean(0), classes))
    assert bool(data.held_out)
    assert int(data.tested) == 50
    if classes:
        assert float(data.chance) == approx((truth == y.mode().values).double().mean())


def test_noise_is_not_read_and_shuffled_labels_never() -> None:
    """80 features tell 60 random labels apart when tested on what was fitted; left out, no better than chance."""
    x, _ = blobs(60, apart=0)
    labels = torch.arange(60) % 3
    noise = Probing().run(Subject(net(), (x, labels))).data
    assert (noise.score < 1 / 3 + 3 * 0.0609).all()
    told = Probing().run(Subject(net(), blobs(300, apart=4))).data
    assert float(told.score[0]) > 0.9
    assert (told.control < 0.5).all()
    assert told.selectivity.values == approx(told.score.values - told.control.values)
    assert ((told.score_low <= told.score) & (told.score <= told.score_high)).all()


def test_one_hot_rows_are_classes_and_halves_are_values() -> None:
    x, y = blobs(40)
    hot = torch.nn.functional.one_hot(y, 3).double()
    one, two = (
        Probing().run(Subject(net(), (x, t), loss)).data for t, loss in ((y, "cross_entropy"), (hot, nn.MSELoss()))
    )
    assert two.score.values == approx(one.score.values)
    assert not bool(Probing().run(Subject(net(), (x, hot / 2), nn.MSELoss())).data.classes)


def test_a_layer_that_is_not_finite_is_unknown_alone() -> None:
    x, y = blobs(40)
    here = Subject(net(), (x, y))
    spoilt = here.params["2.bias"].clone()
    spoilt[1] = torch.nan
    found = Probing().run(here.at({"2.bias": spoilt}))
    assert np.isnan(found.data.score.values).tolist() == [False, False, True, True, True]
    assert not found.converged
    assert any("not finite: 2, 3, 4" in note for note in found.notes)


def test_targets_that_a_probe_cannot_read_are_told() -> None:
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    tokens = Subject(nn.Linear(5, 3).double(), (x, torch.randn(6, 4, 3, dtype=torch.float64)), nn.MSELoss())
    with pytest.raises(ValueError, match="one class or one row of values for each example"):
        Probing().run(tokens)
