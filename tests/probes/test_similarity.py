"""Similarity of layers: by hand-written hooks and formulas, of a model with itself under shuffling, beside peers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import torch
import toys
from pytest import approx
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from workbench.probes import similarity
from workbench.probes.similarity import Similarity
from workbench.several import Pair
from workbench.subject import Subject
from workbench.trajectory import Trajectory

Data = tuple[torch.Tensor, torch.Tensor]


def net(seed: int = 0, width: int = 9) -> nn.Sequential:
    rng = torch.Generator().manual_seed(seed)
    made = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Dropout(), nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        for p in made.double().parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64))
    return made.eval()


def blobs(n: int = 60) -> Data:
    rng = torch.Generator().manual_seed(7)
    return torch.randn(n, 6, generator=rng, dtype=torch.float64), torch.arange(n) % 3


def pair(data: Data, *more: Data) -> Pair:
    return Pair(Subject(net(0), data), Subject(net(1, 12), *(more or (data,))))


def features(model: nn.Sequential, x: torch.Tensor, places: tuple[int, ...] = (0, 1, 3, 4, 5)) -> list[np.ndarray]:
    """Outputs of the layers, dropout left out, since it does nothing here."""
    with torch.no_grad():
        return [model[: i + 1](x).numpy() for i in places]


def debiased(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA by HSIC_1 in four lines of matrices."""
    n, ones = len(x), np.ones(len(x))
    k, m = (rows @ rows.T * (1 - np.eye(n)) for rows in (x, y))

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return np.trace(a @ b) + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * ones @ a @ b @ ones / (n - 2)

    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def table(one: list[np.ndarray], two: list[np.ndarray], of: Callable[..., float] = debiased) -> np.ndarray:
    return np.array([[of(x, y) for y in two] for x in one])


# ------------------------------------------------------------------------- values


@pytest.mark.parametrize("batch_size", [60, 7])
def test_every_layer_with_every_layer_equals_the_formula(batch_size: int) -> None:
    x, y = blobs()
    two = Pair(*(Subject(m, (x, y), batch_size=batch_size) for m in (net(0), net(1, 12))))
    reading = Similarity().run(two)
    data, want = reading.data, table(features(net(0), x), features(net(1, 12), x))
    assert list(data["layer"].values) == list(data["other"].values) == ["0", "1", "3", "4", "5"]
    np.testing.assert_allclose(data.similarity.values, want, rtol=1e-9)
    np.testing.assert_allclose(data.distance.values, 1 - want, atol=1e-9)
    assert float(data["mean"]) == approx(want.mean())
    assert float(data.diagonal_mean) == approx(np.diag(want).mean())
    assert list(data.width.values) == [9, 9, 5, 5, 3]
    assert list(data.other_width.values) == [12, 12, 5, 5, 3]
    assert reading.converged
    assert reading.summary["measure"] == "debiased linear CKA"
    best = [i for i in range(5) if want[i].argmax() == i]
    assert reading.summary["matched"] == f"{len(best)} of 5 layers"


def test_procrustes_is_a_squared_distance_from_zero_to_two() -> None:
    data = Similarity("procrustes").run(pair(blobs())).data
    np.testing.assert_allclose(data.distance.values, 2 - 2 * data.similarity.values, atol=1e-12)
    np.testing.assert_allclose(data.distance_error.values, 2 * data.similarity_error.values, rtol=1e-12)


def test_layers_by_name_and_by_glob_and_models_of_other_shapes() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = net(2), nn.Linear(3, 3).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    x, y = blobs()
    two = Pair(Subject(net(0), (x, y)), Subject(Deep(), (x, y)))
    reading = Similarity(layers="3, 1", other_layers="body.?, head").run(two)
    assert list(reading.data["layer"].values) == ["1", "3"]
    assert list(reading.data["other"].values) == [*(f"body.{i}" for i in range(6)), "head"]
    want = table(features(net(0), x, (1, 3)), features(net(2), x, (0, 1, 2, 3, 4, 5)))
    np.testing.assert_allclose(reading.data.similarity.values[:, :6], want, rtol=1e-9)
    assert np.isnan(reading.summary["diagonal_mean"])
    assert any("share no layer name" in note for note in reading.notes)
    assert reading.figure().panels
    with pytest.raises(ValueError, match="no layer fits 'conv\\*'"):
        Similarity(layers="conv*").run(two)


# --------------------------------------------------------- one model is 1 with itself


MEASURES: tuple[dict[str, Any], ...] = (
    {},
    {"kernel": "rbf"},
    {"estimator": "biased"},
    {"estimator": "minibatch", "minibatch": 15},
    {"measure": "svcca"},
    {"measure": "pwcca"},
    {"measure": "procrustes"},
)


@pytest.mark.parametrize("settings", MEASURES)
def test_shuffling_loaders_of_one_set_are_read_in_one_order(settings: dict[str, Any]) -> None:
    def shuffled(seed: int) -> DataLoader:
        rng = torch.Generator().manual_seed(seed)
        return DataLoader(TensorDataset(*blobs()), 16, shuffle=True, generator=rng)

    two = Pair(Subject(net(), shuffled(1)), Subject(net(), shuffled(2)))
    data = Similarity(**settings).run(two).data
    np.testing.assert_allclose(np.diag(data.similarity.values), 1, atol=1e-9)
    assert float(data.diagonal_mean_error) < 1e-7


@pytest.mark.parametrize("measure", ["cka", "svcca", "pwcca", "procrustes"])
def test_examples_stored_in_another_order_are_put_into_one(measure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (torch.cat([t, t[:3]]) for t in blobs())  # three examples twice
    order = torch.randperm(63, generator=torch.Generator().manual_seed(0))
    two = Pair(Subject(net(), (x, y)), Subject(net(), (x[order], y[order])))
    reading = Similarity(measure).run(two)
    np.testing.assert_allclose(np.diag(reading.data.similarity.values), 1, atol=1e-9)
    assert any("first's order" in note for note in reading.notes)
    monkeypatch.setattr(similarity, "common_order", lambda _: None)
    assert Similarity(measure).run(two).data.diagonal_mean < 0.75, "without it, one model is not like itself"


def test_other_examples_and_mini_batches_in_two_orders_are_refused() -> None:
    x, y = blobs()
    other = (torch.cat([x[:50], x[:10] + 1]), y)
    with pytest.raises(ValueError, match="10 of the first subject's 60 examples are not among"):
        Similarity().run(Pair(Subject(net(), (x, y)), Subject(net(), other)))
    twice = (torch.cat([x[:50], x[:10]]), y)  # all known, but not as often
    with pytest.raises(ValueError, match="same examples"):
        Similarity().run(Pair(Subject(net(), twice), Subject(net(), (torch.cat([x[:50], x[10:20]]), y))))
    with pytest.raises(ValueError, match="in one order, and they are in two"):
        Similarity(estimator="minibatch").run(Pair(Subject(net(), (x, y)), Subject(net(), (x.flip(0), y.flip(0)))))


def test_a_model_in_single_precision_is_like_itself_in_double() -> None:
    x, y = blobs()
    two = Pair(Subject(net(), (x, y)), Subject(net(), (x, y), dtype=torch.float32))
    np.testing.assert_allclose(np.diag(Similarity().run(two).data.similarity.values), 1, atol=1e-6)


@pytest.mark.parametrize("name", list(architectures.SMALL))
def test_every_architecture_is_like_itself_and_like_what_it_was(name: str) -> None:
    trained = architectures.small(name)
    subject = Subject(trained.model, trained.data)
    data = Similarity().run(Pair(subject, subject)).data
    np.testing.assert_allclose(np.diag(data.similarity.values), 1, atol=1e-9)
    np.testing.assert_allclose(data.similarity.values, data.similarity.values.T, atol=1e-9)
    rng = torch.Generator().manual_seed(0)
    moved = {n: p + 0.02 * torch.randn(p.shape, generator=rng, dtype=p.dtype) for n, p in subject.params.items()}
    near = Similarity().run(Pair(subject, subject.at(moved))).data
    assert 0.9 < float(near.diagonal_mean) < 1 - 1e-6


def test_steps_of_a_trajectory_move_away_from_the_first(tmp_path: Path) -> None:
    toys.record_training(tmp_path / "run", 0, toys.examples())
    path = Trajectory.open(tmp_path / "run").using(toys.net(), toys.examples(), "cross_entropy")
    found = [Similarity().run(path.pair(path.steps[0], step)).summary["diagonal_mean"] for step in path.steps]
    assert len(found) == 4
    assert found[0] == approx(1, abs=1e-12)
    assert all(b < a for a, b in pairwise(found))


# -------------------------------------------------------------------- many examples


def test_mini_batches_equal_the_ratio_of_weighted_sums_whatever_the_chunks() -> None:
    x, y = blobs()
    reading = Similarity(estimator="minibatch", minibatch=16).run(pair((x, y)))
    one, two = features(net(0), x), features(net(1, 12), x)

    def over(a: np.ndarray, b: np.ndarray) -> float:
        def hsic(k: np.ndarray, m: np.ndarray) -> float:
            n = len(k)
            k, m = (rows @ rows.T * (1 - np.eye(n)) for rows in (k, m))
            inner = k.sum(0) @ m.sum(0)
            return ((k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * inner / (n - 2)) / (n - 3)  # times n

        cuts = [slice(at, at + 16) for at in range(0, 60, 16)]
        return sum(hsic(a[c], b[c]) for c in cuts)

    want = table(one, two, lambda a, b: over(a, b) / np.sqrt(over(a, a) * over(b, b)))
    np.testing.assert_allclose(reading.data.similarity.values, want, rtol=1e-9)
    assert int(reading.data.at_once) == 16
    chunked = Pair(*(Subject(m, (x, y), batch_size=size) for m, size in ((net(0), 7), (net(1, 12), 11))))
    again = Similarity(estimator="minibatch", minibatch=16).run(chunked)
    np.testing.assert_allclose(again.data.similarity.values, reading.data.similarity.values, rtol=1e-9)


@pytest.mark.parametrize(("limit", "value"), [("GRAM_EXAMPLES", 59), ("KEPT_BYTES", 1000)])
def test_too_many_examples_go_to_mini_batches_or_are_refused_before_anything_ran(
    limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = pair(blobs())
    plain = Similarity(estimator="minibatch", minibatch=20).run(two).data
    monkeypatch.setattr(similarity, limit, value)
    reading = Similarity(minibatch=20).run(two)
    np.testing.assert_array_equal(reading.data.similarity.values, plain.similarity.values)
    assert any("too many to compare at once" in note for note in reading.notes)
    assert reading.summary["measure"] == "minibatch linear CKA"
    refused = [Similarity(estimator="biased")] + [Similarity("svcca")] * (limit == "KEPT_BYTES")
    for probe in refused:
        with pytest.raises(ValueError, match="needs all features at once"):
            probe.estimate(two)


def test_a_glance_at_some_examples_comes_before_all_of_them() -> None:
    readings = list(Similarity().stream(pair(blobs(700)), None))  # type: ignore[arg-type]
    values = [float(r.data["mean"]) for r in readings]
    known = [v for v in values if np.isfinite(v)]
    assert len(set(known)) == 2
    assert known[-1] == approx(known[0], abs=0.1)
    assert not any(r.converged for r in readings[:-1])


# ------------------------------------------------------------------- what is not known


def test_dead_layers_are_unknown_named_and_left_out_of_means() -> None:
    x, y = blobs()
    dead = net()
    with torch.no_grad():
        dead[3].bias.fill_(-1e3)  # its ReLU gives zeros, and the last layer its bias
    reading = Similarity().run(Pair(Subject(net(), (x, y)), Subject(dead, (x, y))))
    values = reading.data.similarity.values
    assert np.isnan(values[:, 3:]).all()
    assert np.isfinite(values[:, :3]).all()
    assert float(reading.data["mean"]) == approx(values[:, :3].mean())
    assert "constant features in the second: 4, 5" in reading.notes
    assert reading.converged
    assert reading.summary["matched"].endswith("of 3 layers")


def test_too_few_examples_a_direction_are_not_called_an_answer() -> None:
    enough, few = blobs(60), blobs(40)
    assert Similarity("svcca", layers="3, 5").run(Pair(*(Subject(net(s), enough) for s in (0, 1)))).converged
    reading = Similarity("svcca", layers="3, 5").run(Pair(*(Subject(net(s), few) for s in (0, 1))))
    assert not reading.converged
    assert any("high by chance" in note for note in reading.notes)


# ----------------------------------------------------------------------------- peers


def test_another_package_gives_the_same_of_whole_models() -> None:
    package = pytest.importorskip("cka")
    x, y = blobs()
    layers = ["0", "1", "3", "4", "5"]
    loader = DataLoader(TensorDataset(x.float(), y), 20)
    (theirs,) = package.compute_cka(
        net(0).float(), net(1, 12).float(), loader, layers=layers, device="cpu", progress=False
    )
    two = Pair(*(Subject(m.float(), (x.float(), y)) for m in (net(0), net(1, 12))))
    data = Similarity(estimator="minibatch", minibatch=20).run(two).data
    np.testing.assert_allclose(np.clip(data.similarity.values, 0, 1), theirs.numpy(), atol=2e-5)  # it clips
    whole = package.cka_from_features(*([torch.tensor(f) for f in features(m, x)] for m in (net(0), net(1, 12))))
    plain = Similarity().run(pair((x, y))).data.similarity.values
    np.testing.assert_allclose(np.clip(plain, 0, 1), whole.numpy(), atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_a_third_package_gives_the_same_of_whole_models() -> None:
    package = pytest.importorskip("torch_cka")
    x, y = blobs()
    layers = ["0", "1", "3", "4", "5"]
    peer = package.CKA(net(0).float(), net(1, 12).float(), "a", "b", layers, layers)
    with torch.no_grad():
        peer.compare(DataLoader(TensorDataset(x.float(), y), 20))
    two = Pair(*(Subject(m.float(), (x.float(), y)) for m in (net(0), net(1, 12))))
    data = Similarity(estimator="minibatch", minibatch=20).run(two).data
    np.testing.assert_allclose(data.similarity.values, peer.export()["CKA"].numpy(), atol=2e-5)
