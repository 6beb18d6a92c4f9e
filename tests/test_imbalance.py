"""Lengths from class sizes against deep linear networks that are trained to their minimum, and one that is stuck."""

from itertools import pairwise

import pytest
import torch
from pytest import approx
from torch import nn

from workbench.imbalance import coupled_decay
from workbench.numerics.orthogonal_frame import orthogonal_frame
from workbench.probes.collapse import NeuralCollapse
from workbench.subject import Subject


def trained(counts: tuple[int, ...], decay: float, matrices: int, loss: str = "half_mse", dead: tuple[int, ...] = ()):
    """A bias-free linear net whose inputs number the examples, so that its first matrix holds free features."""
    torch.manual_seed(3)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    x, y = torch.eye(len(labels), dtype=torch.float64), nn.functional.one_hot(labels, len(counts)).double()
    sizes = [len(labels), *[8] * matrices, len(counts)]
    net = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))).double()
    with torch.no_grad():
        for k in dead:
            net[0].weight[:, labels == k] = 0
            net[-1].weight[k] = 0
    optimizer = torch.optim.LBFGS(
        net.parameters(), max_iter=3000, history_size=50, line_search_fn="strong_wolfe",
        tolerance_grad=1e-13, tolerance_change=1e-16,
    )  # fmt: skip
    factor = {"half_mse": 0.5 / len(labels), "mse": 1 / y.numel()}[loss]

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        total = factor * ((net(x) - y) ** 2).sum() + decay / 2 * sum((p**2).sum() for p in net.parameters())
        total.backward()
        return total

    optimizer.step(objective)
    said = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=decay)
    return Subject(net, (x, y), loss, optimizer=said), float(objective().detach())


@pytest.mark.parametrize("loss", ["half_mse", "mse"])
@pytest.mark.parametrize(("counts", "decay", "matrices"), [((5, 3, 2), 0.02, 1), ((4, 2, 1), 0.01, 2)])
def test_a_trained_deep_linear_net_reaches_the_closed_form_of_each_class(counts, decay, matrices, loss):
    subject, objective = trained(counts, decay, matrices, loss)
    other = {"matrices": matrices, "feature_decay": decay} if matrices > 1 else {}
    reading = NeuralCollapse(**other, groups=0).run(subject)
    data, unit = reading.data, 1.0 if loss == "half_mse" else 2 / len(counts)
    wanted = orthogonal_frame(counts, decay / unit, decay / unit, matrices)
    assert data.theory_row_norm.values == approx(wanted.row_norm, rel=1e-4)  # λ_H is implied, where matrices = 1
    assert data.classifier_norm.values == approx(wanted.row_norm, rel=1e-3)
    assert data.class_mean_length.values == approx(wanted.mean_norm, rel=1e-3)
    assert float(data.theory_loss) == approx(objective / unit, abs=1e-7)
    assert float(data.loss_gap) == approx(0, abs=1e-7)
    assert float(data.nc1) < 1e-8
    assert float(data.orthogonality) < 1e-4
    assert float(data.frame_distance) < 1e-4


def test_a_class_that_is_best_given_up_is_minority_collapse():
    subject, _ = trained((8, 4, 1), 0.09, 1)
    reading = NeuralCollapse(feature_decay=0.09, groups=0).run(subject)
    assert reading.data.given_up.values.tolist() == [0, 0, 1]
    assert any("class 2 is given up" in note for note in reading.notes)
    assert float(reading.data.loss_gap) == approx(0, abs=1e-5)


def test_a_class_stuck_at_zero_is_told_from_minority_collapse_by_its_gap():
    """M = 2: zero is stationary, so a class that starts there stays, although the minimum has a length for it."""
    subject, objective = trained((4, 2, 1), 0.01, 2, dead=(2,))
    reading = NeuralCollapse(matrices=2, feature_decay=0.01, groups=0).run(subject)
    wanted = orthogonal_frame((4, 2, 1), 0.01, 0.01, 2)
    assert reading.data.given_up.values.tolist() == [0, 0, 0]
    assert any("class 2 is at zero" in note and "stuck" in note for note in reading.notes)
    assert float(reading.data.loss_gap) == approx(objective - wanted.minimum, abs=1e-6)
    assert float(reading.data.loss_gap) == approx(1 / 14 - wanted.loss[2], abs=1e-6)


def test_a_subject_of_some_examples_stands_for_all():
    subject, _ = trained((8, 4, 4), 0.02, 1)
    x, y = (torch.cat([t, t]) for t in next(iter(subject.batches())).raw)
    double = Subject(subject.module, (x, y), "half_mse", max_examples=16, optimizer=subject.optimizer)
    data = NeuralCollapse(groups=0, feature_decay=0.02).run(double).data
    wanted = orthogonal_frame(2 * data.class_count.values, 0.02, 0.02)
    assert (double.examples, double.available) == (16, 32)
    assert data.theory_row_norm.values == approx(wanted.row_norm)
    assert data.theory_mean_length.values == approx(wanted.mean_norm)


def test_decay_is_read_only_where_it_belongs_to_the_loss():
    net = nn.Linear(2, 2, bias=False).double()
    data = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)

    def decay(optimizer: torch.optim.Optimizer | None) -> float | None:
        return coupled_decay(Subject(net, data, "half_mse", optimizer=optimizer))

    assert decay(torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.03)) == 0.03
    assert decay(torch.optim.Adam(net.parameters(), weight_decay=0.03)) == 0.03
    assert decay(torch.optim.AdamW(net.parameters(), weight_decay=0.03)) is None
    assert decay(torch.optim.SGD(net.parameters(), lr=0.1)) is None
    assert decay(None) is None


def test_what_the_theory_is_not_about_is_said():
    net, labels = nn.Linear(3, 3).double(), torch.arange(12) % 3
    x = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reading = NeuralCollapse(weight_decay=0.1).run(Subject(net, (x, labels)))
    assert any("not a squared one" in note for note in reading.notes)
    assert reading.data.theory_row_norm.isnull().all()
    with pytest.raises(ValueError, match="matrices=2 needs feature_decay"):
        NeuralCollapse(matrices=2)
