"""Ranks of features and gradients: planted spectra, plain NumPy on hand-made features, errors by other examples."""

from __future__ import annotations

import architectures
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from torch import nn

from workbench.probe import Reading
from workbench.probes import feature_rank
from workbench.probes.feature_rank import RANKS, FeatureRank
from workbench.subject import Subject

Data = tuple[torch.Tensor, torch.Tensor]
Array = np.ndarray


def net(seed: int = 0) -> nn.Sequential:
    rng = torch.Generator().manual_seed(seed)
    made = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64))
    return made


def blobs(n: int = 61) -> Data:
    rng = torch.Generator().manual_seed(7)
    return torch.randn(n, 6, generator=rng, dtype=torch.float64), torch.arange(n) % 3


def planted(sigma: Array, n: int = 40, seed: int = 0) -> Array:
    """Rows with exactly these singular values."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(n, len(sigma))))[0]
    return left * sigma @ np.linalg.qr(rng.normal(size=(len(sigma), len(sigma))))[0]


def of_rows(rows: Array, **changes: object) -> Reading:
    """The ranks of given features: the data pass through the layer as they are."""
    model = nn.Sequential(nn.Identity(), nn.Linear(rows.shape[1], 2).double())
    subject = Subject(model, (torch.from_numpy(rows), torch.arange(len(rows)) % 2))
    return FeatureRank(of="features", layers="0", **changes).run(subject)  # type: ignore[arg-type]


def formulas(rows: Array, centred: bool = False, share: float = 0.99, tolerance: float = 1e-3) -> dict[str, float]:
    """All ranks from NumPy's singular values, one line each."""
    s = np.linalg.svd(rows - rows.mean(0) * centred, compute_uv=False)
    s = s[s > 1e-12 * s[0]]
    p = s / s.sum()
    return {
        "effective_rank": np.prod(p**-p),
        "stable_rank": np.linalg.norm(s) ** 2 / s.max() ** 2,
        "participation_ratio": np.linalg.norm(s) ** 4 / np.linalg.norm(s**2) ** 2,
        "threshold_rank": next(k for k in range(1, len(s) + 1) if s[:k].sum() >= share * s.sum() * (1 - 1e-12)),
        "variance_rank": next(k for k in range(1, len(s) + 1) if (s[:k] ** 2).sum() >= share * (s**2).sum() - 1e-12),
        "numerical_rank": float((s > tolerance * s[0]).sum()),
    }


def found(reading: Reading, source: str = "features", layer: int = 0) -> dict[str, float]:
    return {name: float(reading.data[name].sel(source=source)[layer]) for name, _ in RANKS}


# -------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("sigma", "want"),
    [
        ((3, 1), (1.75476535, 1.11111111, 1.21951220, 2, 2, 2)),
        ((99.5, 0.5), (1.03197977, 1.00002525, 1.00005050, 1, 1, 2)),
    ],
)
def test_the_known_table(sigma: tuple[float, ...], want: tuple[float, ...]) -> None:
    reading = of_rows(planted(np.array(sigma)))
    assert found(reading) == approx(dict(zip((n for n, _ in RANKS), want, strict=True)), abs=3e-8)
    values = reading.data.singular_value.values[0, 0]
    np.testing.assert_allclose(values * np.sqrt(40), sigma, rtol=1e-9)


def test_shares_and_tolerance_are_settings_and_two_ranks_differ_by_the_square() -> None:
    rows = planted(np.array([4, 2, 1, 0.5, 0.02]))
    for share, tolerance in ((0.99, 1e-3), (0.9, 0.01), (0.5, 0.2), (1.0, 0.4)):
        reading = of_rows(rows, share=share, tolerance=tolerance)
        assert found(reading) == approx(formulas(rows, share=share, tolerance=tolerance), rel=1e-9)
    assert found(of_rows(rows, share=0.9))["threshold_rank"] == 3
    assert found(of_rows(rows, share=0.9))["variance_rank"] == 2


@pytest.mark.parametrize("batch_size", [61, 7])
@pytest.mark.parametrize("centred", [False, True])
def test_every_layer_equals_numpy_on_features_and_gradients_made_by_hand(centred: bool, batch_size: int) -> None:
    model, (x, y) = net(), blobs()
    reading = FeatureRank(centred=centred).run(Subject(model, (x, y), batch_size=batch_size))
    assert list(reading.data["layer"].values) == [str(i) for i in range(5)]
    assert list(reading.data.possible.values) == [9, 9, 5, 5, 3]
    assert reading.converged
    for i in range(5):
        features = model[: i + 1](x).detach()
        rows = []
        for row, target in zip(features, y, strict=True):
            at = row.clone().requires_grad_()
            rows.append(torch.autograd.grad(F.cross_entropy(model[i + 1 :](at), target), at)[0].numpy())
        for source, hand in (("features", features.numpy()), ("gradients", np.array(rows))):
            assert found(reading, source, i) == approx(formulas(hand, centred), rel=1e-6), (source, i)
            again = [formulas(np.delete(hand, np.s_[g::10], 0), centred) for g in range(10)]
            for name, _ in RANKS:
                spread = np.sqrt(9 * np.var([a[name] for a in again]))
                assert float(reading.data[f"{name}_error"].sel(source=source)[i]) == approx(spread, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", list(architectures.SMALL))
def test_every_architecture_and_the_gradients_of_logits(name: str) -> None:
    """∂ℓ/∂logits = softmax - one-hot sums to 0 over the classes, so that one direction is missing."""
    trained = architectures.small(name)
    reading = FeatureRank().run(Subject(trained.model, trained.data))
    data = reading.data
    known = data.effective_rank.values
    assert np.isfinite(known).all()
    assert (known <= data.possible.values + 1e-9).all()
    assert (data.stable_rank.values <= data.participation_ratio.values + 1e-9).all(), "Σλ/λ_1 <= (Σλ)²/Σλ²"
    assert (data.stable_rank.values <= known + 1e-9).all()
    classes = int(data.width[-1])
    assert found(reading, "gradients", -1)["numerical_rank"] <= classes - 1


@pytest.mark.parametrize("pool", ["mean", "flatten"])
def test_more_features_than_examples(pool: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Flatten(), nn.Linear(96, 3)).double()
    x, y = torch.randn(20, 1, 6, 6, dtype=torch.float64), torch.arange(20) % 3
    reading = FeatureRank(layers="0", of="features", pool=pool).run(Subject(model, (x, y)))  # type: ignore[arg-type]
    maps = model[0](x).detach()
    rows = (maps.flatten(1) if pool == "flatten" else maps.mean((2, 3))).numpy()
    assert found(reading) == approx(formulas(rows), rel=1e-6)
    assert int(reading.data.possible[0]) == min(20, rows.shape[1])
    assert any("fewer than 4 examples a feature" in note for note in reading.notes)


def test_single_precision_is_close() -> None:
    plain = FeatureRank().run(Subject(net(), blobs())).data
    single = FeatureRank().run(Subject(net(), blobs(), dtype=torch.float32)).data
    for name in ("effective_rank", "stable_rank", "participation_ratio", "numerical_rank"):
        np.testing.assert_allclose(single[name].values, plain[name].values, rtol=2e-4)


# ---------------------------------------------------------------------- laws, errors


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), k=st.integers(1, 6))
def test_rotations_scales_and_the_order_of_examples_change_nothing(seed: int, scale: float, k: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(40, k)) @ rng.normal(size=(k, 6))
    turned = scale * rows[rng.permutation(40)] @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
    plain = found(of_rows(rows))
    assert found(of_rows(turned)) == approx(plain, rel=1e-6)
    assert plain["numerical_rank"] <= k
    assert all(1 - 1e-9 <= plain[name] <= k + 1e-6 for name, _ in RANKS)


def test_an_even_spread_has_its_number_of_directions_and_a_mean_hides_it_unless_centred() -> None:
    rng = np.random.default_rng(0)
    even = np.linalg.qr(rng.normal(size=(60, 4)))[0]
    for name in ("effective_rank", "stable_rank", "participation_ratio", "numerical_rank"):
        assert found(of_rows(even))[name] == approx(4)
    far = even - even.mean(0) + 100
    assert found(of_rows(far))["effective_rank"] < 1.1
    assert found(of_rows(far, centred=True)) == approx(formulas(even, centred=True), rel=1e-6)


def test_errors_are_as_large_as_the_spread_of_other_examples() -> None:
    rng = np.random.default_rng(1)
    scales = np.array([3, 2, 1.5, 1, 0.5])
    readings = [of_rows(rng.normal(size=(200, 5)) * scales).data for _ in range(40)]
    for name in ("effective_rank", "stable_rank", "participation_ratio"):
        spread = np.std([float(r[name][0, 0]) for r in readings])
        errors = np.sqrt(np.mean([float(r[f"{name}_error"][0, 0]) ** 2 for r in readings]))
        assert errors / spread == approx(1, abs=0.35), name


def test_no_groups_no_errors_and_too_few_examples_say_so() -> None:
    rows = planted(np.array([3.0, 2.0, 1.0]), 19)
    plain = of_rows(rows, groups=0)
    assert plain.converged, "none were asked for"
    assert np.isnan(plain.data.effective_rank_error.values).all()
    few = of_rows(rows)
    assert found(few) == found(plain)
    assert not few.converged
    assert any("19 examples are too few for errors from 10 groups" in note for note in few.notes)


# --------------------------------------------------------------------- what is not known


def test_nothing_has_no_rank_and_is_named() -> None:
    model, (x, y) = net(), blobs()
    with torch.no_grad():
        model[2].bias.fill_(-1e3)
    reading = FeatureRank().run(Subject(model, (x, y)))
    assert np.isnan(found(reading, "features", 3)["effective_rank"])
    assert "features that are zero: 3" in reading.notes
    assert "gradients that are zero: 0, 1, 2" in reading.notes
    assert reading.converged
    assert found(reading, "features", 4)["numerical_rank"] == 1, "the bias of the last layer, for all"
    centred = FeatureRank(centred=True).run(Subject(model, (x, y)))
    assert "features that are constant: 3, 4" in centred.notes
    assert centred.figure().panels


def test_gradients_only_where_each_example_has_its_own() -> None:
    x, y = blobs()
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    subject = Subject(model, (x, y), norm="batch", batch_size=20)
    reading = FeatureRank().run(subject)
    assert list(reading.data["source"].values) == ["features"]
    assert "no gradients: BatchNorm mixes the examples of a batch" in reading.notes
    with pytest.raises(ValueError, match="no example has a gradient of its own here: BatchNorm"):
        FeatureRank(of="gradients").run(subject)
    frozen = FeatureRank(of="gradients").run(Subject(net().requires_grad_(True), (x, y), parameters=["4.*"]))
    assert list(frozen.data["source"].values) == ["gradients"]
    assert np.isfinite(frozen.data.effective_rank.values).all(), "layers before the chosen parameters too"


def test_one_example_and_a_glance() -> None:
    x, y = blobs()
    single = FeatureRank(centred=True).run(Subject(net(), (x[:1], y[:1])))
    assert np.isnan(single.data.effective_rank.values).all()
    subject = Subject(net(), blobs(600), batch_size=100)
    readings = list(FeatureRank(of="features", layers="1").stream(subject, None))  # type: ignore[arg-type]
    values = [float(r.data.effective_rank[0, 0]) for r in readings]
    assert len(set(values)) == 3, "after the first batch, at the glance, and of all"
    assert values[-1] == approx(values[0], rel=0.1)
    assert feature_rank.GLANCE < 600


def test_summary_and_figure_name_layers() -> None:
    reading = FeatureRank(shown="1, 4").run(Subject(net(), blobs()))
    summary = reading.summary
    assert summary["last_layer"] == "4"
    assert summary["effective_rank_of_gradients_error"] > 0
    assert str(summary["narrowest_of_features"]).endswith("%)")
    figure = reading.figure()
    assert [p.title.split(" of ")[1] for p in figure.panels] == ["features", "features", "gradients", "gradients"]
    assert [m.label for m in figure.panels[1].marks] == ["1", "4"]
