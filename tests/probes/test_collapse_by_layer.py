"""Collapse of every layer against loops over examples with dense matrices, and nets whose tunnel is known."""

import numpy as np
import pytest
import torch
from pytest import approx
from torch import nn

from workbench.probes.collapse import NeuralCollapse
from workbench.probes.collapse_by_layer import CollapseByLayer
from workbench.subject import Subject

NAMES = ("nc1", "nc1_ratio", "inside", "outside", "cdnv", "nc2_equinorm", "nc2_equiangle", "nc4", "nearest_accuracy")


def blobs(seed: int = 0, count: int = 61) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    return torch.from_numpy(rng.normal(size=(count, 5)) + 1.5 * np.eye(3, 5)[labels]), torch.from_numpy(labels)


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def by_loops(h: np.ndarray, y: np.ndarray, chosen: np.ndarray, centres: np.ndarray | None = None) -> dict[str, float]:
    """Every measure by loops over examples and classes, with d x d matrices; three classes."""
    means = [np.mean([h[i] for i in range(len(h)) if y[i] == c], axis=0) for c in range(3)]
    middle = sum(means) / 3
    between = sum(np.outer(m - middle, m - middle) for m in means) / 3
    within, spread = np.zeros_like(between), np.zeros(3)
    near, differ = 0, 0
    for x, label, choice in zip(h, y, chosen, strict=True):
        within += np.outer(x - means[label], x - means[label]) / len(h)
        spread[label] += ((x - means[label]) ** 2).sum() / (y == label).sum()
        closest = int(np.argmin([((x - m) ** 2).sum() for m in (means if centres is None else centres)]))
        near, differ = near + (closest == label), differ + (closest != choice)
    values, vectors = np.linalg.eigh(between)
    axes = vectors[:, -2:]
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    lengths = [np.linalg.norm(m - middle) for m in means]
    cosine = [(means[a] - middle) @ (means[b] - middle) / lengths[a] / lengths[b] for a, b in pairs]
    inside = np.trace(axes.T @ within @ axes) / np.trace(between)
    return {
        "nc1": np.trace(axes.T @ within @ axes @ np.diag(1 / values[-2:])) / 3,
        "nc1_ratio": np.trace(within) / np.trace(between),
        "inside": inside,
        "outside": np.trace(within) / np.trace(between) - inside,
        "cdnv": np.mean([(spread[a] + spread[b]) / 2 / ((means[a] - means[b]) ** 2).sum() for a, b in pairs]),
        "nc2_equinorm": np.std(lengths) / np.mean(lengths),
        "nc2_equiangle": np.mean([abs(c + 1 / 2) for c in cosine]),
        "nc4": differ / len(h),
        "nearest_accuracy": near / len(h),
    }


def features(net: nn.Sequential, x: torch.Tensor) -> list[np.ndarray]:
    found = []
    for layer in net:
        x = layer(x)
        found.append(x.detach().numpy())
    return found


@pytest.mark.parametrize("batch_size", [61, 8])
def test_each_layer_equals_loops_over_examples_and_errors_leave_groups_out(batch_size: int):
    net, (x, y) = network(), blobs()
    data = CollapseByLayer(groups=4).run(Subject(net, (x, y), batch_size=batch_size)).data
    chosen, numbers = net(x).argmax(1).numpy(), y.numpy()
    assert data["layer"].values.tolist() == ["0", "1", "2", "3", "4"]
    assert data["rank"].values.tolist() == [2] * 5
    ratios = []
    for k, h in enumerate(features(net, x)):
        want = by_loops(h, numbers, chosen)
        assert {n: float(data[n][k]) for n in NAMES} == approx(want, rel=1e-9)
        left = [np.arange(61) % 4 != g for g in range(4)]
        again = [by_loops(h[i], numbers[i], chosen[i]) for i in left]
        for name in NAMES:
            spread = np.array([a[name] for a in again])
            error = np.sqrt(3 / 4 * ((spread - spread.mean()) ** 2).sum())
            assert float(data[f"{name}_error"][k]) == approx(error, rel=1e-7, abs=1e-12)
        ratios.append(want["nc1_ratio"])
    assert data.reduction.values[1:] == approx(np.divide(ratios[1:], ratios[:-1]))


def test_held_out_examples_have_their_own_means_but_are_compared_with_those_of_training():
    net, (x, y), (u, v) = network(), blobs(), blobs(1, 40)
    data = CollapseByLayer().run(Subject(net, (x, y), held_out=(u, v))).data
    chosen = net(u).argmax(1).numpy()
    for k, (h, g) in enumerate(zip(features(net, x), features(net, u), strict=True)):
        centres = np.stack([h[y.numpy() == c].mean(0) for c in range(3)])
        want = by_loops(g, v.numpy(), chosen, centres)
        for name in ("nc1", "nc1_ratio", "nearest_accuracy"):
            assert float(data[f"held_out_{name}"][k]) == approx(want[name], rel=1e-9)
    last = NeuralCollapse(layer="3").run(Subject(net, (x, y), held_out=(u, v))).data
    assert float(last.held_out_nc1) == approx(float(data.held_out_nc1[3]))


class Snap(nn.Module):
    """To the class's corner, by the largest of three entries."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(x[:, :3].argmax(1), 3).to(x)


class Scale(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_the_tunnel_starts_where_classes_are_apart_for_good():
    """Two random layers, then one that collapses the classes exactly, and two that only scale."""
    labels = torch.arange(60) % 3
    first = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        first.weight.copy_(torch.eye(3))
    rng = torch.Generator().manual_seed(0)
    x = nn.functional.one_hot(labels, 3) + 0.9 * torch.rand(60, 3, generator=rng, dtype=torch.float64)
    right = x.argmax(1) == labels
    x, labels = x[right] * torch.linspace(0.05, 30, int(right.sum()), dtype=torch.float64)[:, None], labels[right]
    reading = CollapseByLayer(groups=0).run(Subject(nn.Sequential(first, Snap(), Scale(), Scale()), (x, labels)))
    assert float(reading.data.nearest_accuracy[0]) < 0.95
    assert int(reading.data.tunnel_start) == 2
    assert int(reading.data.tunnel_length) == 2
    assert reading.summary["tunnel_start"] == "1"
    assert reading.data.distance.values[1:] == approx([0, 0, 0], abs=1e-7)
    assert reading.data.nc1_ratio.values[1:] == approx([0, 0, 0], abs=1e-12)


def test_layers_by_glob_and_classes_that_merge_are_named_with_the_layer():
    net, (x, y) = network(), blobs()
    with torch.no_grad():
        net[2].weight.zero_()
    reading = CollapseByLayer(layers="0, 2").run(Subject(net, (x, y)))
    assert reading.data["layer"].values.tolist() == ["0", "2"]
    assert any("classes 0 and 1" in note and "at 2" in note for note in reading.notes)
    assert reading.data["rank"].values.tolist() == [2, 0]
    assert np.isnan(float(reading.data.nc1[1])), "rounding was inverted"
    with pytest.raises(ValueError, match="no layer 'nope'"):
        CollapseByLayer(layers="nope").run(Subject(net, (x, y)))
