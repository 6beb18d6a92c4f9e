"""What settings of a spectrum do, against matrices computed entry by entry; what is said of spikes, sums and cost."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from architectures import small
from scipy.stats import wasserstein_distance
from torch import nn

from workbench.board import JobState
from workbench.figure import Line, Rule
from workbench.operators.hessian import Hessian
from workbench.operators.table import OPERATORS, curvature
from workbench.probe import Cost, drive
from workbench.probes.spectrum import HessianSpectrum
from workbench.subject import Subject
from workbench.ui import look
from workbench.zoo import nets
from workbench.zoo.digits import digits

SURE = HessianSpectrum(top=4, tolerance=1e-6, trace=False, density=False)
NET = "dense GELU"


def subject(name: str = NET, **words: Any) -> Subject:
    net = small(name)
    return Subject(net.model, net.data, **words)


def block(name: str, chosen: str) -> np.ndarray:
    """Rows and columns of the exact Hessian that belong to parameters whose names begin so."""
    net = small(name)
    sizes = [(n, p.numel()) for n, p in net.model.named_parameters() if p.requires_grad]
    inside = np.concatenate([np.full(size, n.startswith(chosen)) for n, size in sizes])
    return net.hessian.detach().numpy()[np.ix_(inside, inside)]


# --------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_of_the_table_has_its_spectrum(operator: Any) -> None:
    one = subject()
    with curvature(one, operator) as matrix:
        truth = torch.linalg.eigvalsh(matrix.dense()).flip(0).numpy()
    reading = HessianSpectrum(operator=operator, top=4, tolerance=1e-6).run(one)
    assert reading.data.eigenvalue.values == pytest.approx(truth[:4], rel=1e-6)
    assert float(reading.data.trace) == pytest.approx(truth.sum(), rel=1e-5)
    assert np.isnan(reading.data.eigenvalue_min) == (operator != "hessian")


@pytest.mark.parametrize(("layers", "chosen"), [("4", "4."), ("2.weight", "2.weight"), (" 2.bias , 2.weight,", "2.")])
def test_layers_are_diagonal_blocks(layers: str, chosen: str) -> None:
    truth = np.linalg.eigvalsh(block(NET, chosen))[::-1]
    reading = HessianSpectrum(layers=layers, top=4, tolerance=1e-6).run(subject())
    assert reading.data.eigenvalue.values == pytest.approx(truth[:4], rel=1e-6)
    assert float(reading.data.eigenvalue_min) == pytest.approx(truth[-1], abs=1e-5 * truth[0])
    assert float(reading.data.trace) == pytest.approx(truth.sum(), rel=1e-6)
    assert int(reading.data.parameters) == len(truth)


def test_a_layer_that_is_not_there_is_refused_before_the_run() -> None:
    with pytest.raises(ValueError, match="no parameter is called or matched by 'nope'"):
        HessianSpectrum(layers="4, nope").estimate(subject())


def adam(model: nn.Module, data: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, betas=(0.8, 0.99), eps=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    return optimizer


def test_preconditioned_eigenvalues_are_those_of_the_optimizer_s_matrix() -> None:
    net = small(NET)
    model = copy.deepcopy(net.model)
    optimizer = adam(model, net.data)
    p = torch.cat([
        (1 - 0.8**3) * ((optimizer.state[w]["exp_avg_sq"] / (1 - 0.99**3)).sqrt() + 1e-3).reshape(-1)
        for w in model.parameters()
    ])  # fmt: skip
    exact = copy.deepcopy(net)
    object.__setattr__(exact, "model", model)
    exact.__dict__.pop("hessian", None)
    exact.__dict__.pop("eigenvalues", None)
    root = (0.02 / p).sqrt()
    truth = torch.linalg.eigvalsh(root[:, None] * exact.hessian.detach() * root).flip(0).numpy()
    probe = HessianSpectrum(top=4, tolerance=1e-6, preconditioned=True)
    reading = probe.run(Subject(model, net.data, optimizer=optimizer))
    assert reading.data.eigenvalue.values == pytest.approx(truth[:4], rel=1e-6)
    assert float(reading.data.eigenvalue_min) == pytest.approx(truth[-1], rel=1e-5)
    assert float(reading.data.trace) == pytest.approx(truth.sum(), rel=1e-5)
    assert float(reading.data.stability_threshold) == pytest.approx(2 * 1.8 / 0.2)
    assert reading.summary["stability_ratio"] == pytest.approx(truth[0] / 18, rel=1e-6)
    assert any("η P⁻¹H" in note for note in reading.notes)
    part = Subject(model, net.data, optimizer=optimizer, max_examples=40)
    chosen = HessianSpectrum(top=2, preconditioned=True, layers="4", operator="ggn", trace=False).run(part)
    assert chosen.summary["sharpness_low"] < chosen.summary["sharpness"] < chosen.summary["sharpness_high"]
    with pytest.raises(ValueError, match="no optimizer"):
        probe.run(subject())


@pytest.mark.parametrize(
    ("words", "constant"),
    [
        ({}, 2.0),
        ({"momentum": 0.9}, 3.8),
        ({"momentum": 0.9, "nesterov": True}, 3.8 / 2.8),
    ],
)
def test_gradient_descent_s_threshold_stands_beside_the_sharpness(words: dict[str, Any], constant: float) -> None:
    net = small(NET)
    for step, drawn in ((0.1, 0), (1.0, 1)):
        optimizer = torch.optim.SGD(net.model.parameters(), lr=step, **words)
        reading = SURE.run(subject(optimizer=optimizer))
        ratio = float(net.eigenvalues[0]) * step / constant
        assert reading.summary["stability_ratio"] == pytest.approx(ratio, rel=1e-6)
        rules = [m.at for m in reading.figure().panels[0].marks if isinstance(m, Rule) and "stable" in m.label]
        assert rules == [pytest.approx(constant / step)] * drawn  # one that is far above would flatten the rest


@pytest.mark.parametrize("kind", [torch.optim.Adam, None])
def test_the_plain_hessian_says_nothing_of_an_adaptive_optimizer(kind: Any) -> None:
    net = small(NET)
    reading = SURE.run(subject(optimizer=kind and kind(net.model.parameters(), lr=0.1)))
    assert math.isnan(reading.data.stability_ratio)
    assert "stability_ratio" not in reading.summary


@pytest.mark.parametrize(("storage", "allowed"), [("operator", 1e-4), ("host", 1e-4), ("bfloat16", 6e-3)])
def test_a_basis_elsewhere_gives_the_same_eigenvalues_and_trace(storage: Any, allowed: float) -> None:
    truth = small(NET).eigenvalues.numpy()
    reading = HessianSpectrum(top=4, storage=storage).run(subject(dtype=torch.float32))
    data = reading.data
    assert np.all(np.abs(data.eigenvalue.values - truth[:4]) <= data.residual.values + allowed * truth[0])
    assert abs(float(data.trace) - truth.sum()) <= 1.5 * float(data.trace_error) + allowed * truth[0] * 4
    assert reading.converged


def test_storage_changes_the_memory_that_is_asked_for() -> None:
    bases = [HessianSpectrum(storage=s).aim.basis_bytes(10**6, 4) for s in ("operator", "bfloat16", "host")]
    assert bases == [4 * 33 * 10**6, 2 * 33 * 10**6, 0]
    assert HessianSpectrum(top=20).aim.basis_bytes(10**6, 4) == 4 * 53 * 10**6
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20_000), nn.Linear(20_000, 10))
    large = Subject(model, small("conv + BatchNorm").data, dtype=torch.float32)
    whole, half = (HessianSpectrum(storage=s, top=40).estimate(large).bytes for s in ("operator", "bfloat16"))
    assert whole - half > large.size * 2 * 10


def test_views_change_the_picture_alone() -> None:
    one, other = (HessianSpectrum(view=view).run(subject()) for view in ("density", "both"))
    assert one.data.equals(other.data)
    assert [len(HessianSpectrum(view=v).figure(one.data).panels) for v in ("density", "cumulative", "both")] == [
        2,
        2,
        3,
    ]
    (steps,) = other.figure().panels[2].marks
    assert isinstance(steps, Line)
    assert (steps.y[0], steps.y[-1]) == (pytest.approx(steps.y[1] * 0), pytest.approx(1))
    exact = small(NET).eigenvalues.numpy()
    middle = float(np.interp(0.5, steps.y, steps.x))
    assert abs(middle - np.median(exact)) < 2 * float(one.data.density_error)


def test_more_starts_and_depth_sharpen_the_density_and_show_how_starts_differ() -> None:
    truth = small(NET).eigenvalues.numpy()
    one, more = (HessianSpectrum(top=3, trace=False, depth=d, starts=s).run(subject()) for d, s in ((30, 1), (60, 4)))
    assert np.isnan(one.data.density_spread).all()
    assert int(more.data.products) - int(one.data.products) == pytest.approx(30 + 3 * 60, abs=30)
    assert 0 < float(np.max(more.data.density_spread)) < float(np.max(more.data.density))
    apart = []
    for data in (one.data, more.data):
        node, weight = (v[np.isfinite(v)] for v in (data.node.values, data.weight.values))
        assert weight.sum() == pytest.approx(1)
        apart.append(wasserstein_distance(node, truth, weight))
        assert apart[-1] < 1.1 * float(data.density_error)
        assert abs(float(data.frobenius) - np.linalg.norm(truth)) < 1.5 * float(data.frobenius_error)
    assert apart[1] < 0.7 * apart[0]
    readings = list(drive(HessianSpectrum(top=3, depth=20, starts=3), subject()))
    assert {int(np.isfinite(r.data.node.values).sum()) for r in readings[-2:]} != {0}
    assert readings[-1].done == 1
    assert readings[-1].converged
    assert max(np.diff([r.done for r in readings[:-1]])) < 0.2


# ------------------------------------------------------------------------------------------------ spikes and sums


def test_softmax_regression_on_one_input_has_one_eigenvalue_fewer_than_classes() -> None:
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64).expand(12, 2)
    for classes in (3, 5):
        model = nn.Linear(2, classes, bias=False).double()
        nn.init.zeros_(model.weight)
        reading = HessianSpectrum().run(Subject(model, (x, torch.arange(12) % classes)))
        wanted = np.r_[np.full(classes - 1, 5 / classes), np.zeros(2 * classes - classes + 1)]
        assert reading.data.eigenvalue.values[: 2 * classes] == pytest.approx(wanted[:10], abs=1e-9)
        assert int(reading.data.outliers_gap) == classes - 1
        assert float(reading.data.gap_ratio) > 1e9
        upright = [m.at for m in reading.figure().panels[0].marks if isinstance(m, Rule) and m.axis == "x"]
        assert upright == [classes - 0.5, classes + 0.5]


def test_counting_among_too_few_eigenvalues_is_said() -> None:
    notes = " ".join(HessianSpectrum(top=5).run(subject()).notes)
    assert "among 5 eigenvalues, fewer than two for each class (20)" in notes
    assert "fewer than two for each class" not in " ".join(HessianSpectrum(top=20).run(subject()).notes)
    assert np.isnan(HessianSpectrum(top=1, density=False).run(subject()).data.outliers_gap)


def test_only_converged_eigenvalues_are_counted() -> None:
    truth = small(NET).eigenvalues.numpy()
    reading = HessianSpectrum(top=20, tolerance=1e-4).run(subject())
    edge = float(reading.data.bulk_edge)
    assert int(reading.data.outliers_edge) == (truth[:20] > edge).sum()
    assert abs(float(reading.data.outliers_tail) - (truth > edge).sum()) <= float(reading.data.outliers_tail_error)
    ratios = truth[:20] / truth[1:21]
    assert int(reading.data.outliers_gap) == int(np.argmax(ratios[:19])) + 1


def test_sums_over_the_spectrum_are_covered_by_their_errors() -> None:
    covered = []
    for name in (NET, "LSTM", "tied embedding"):
        truth = small(name).eigenvalues.numpy()
        ridge = truth[0] / 1000
        squares, soft = (truth**2).sum(), (np.maximum(truth, 0) / (np.maximum(truth, 0) + ridge)).sum()
        for seed in range(3):
            data = HessianSpectrum(top=3, tolerance=0.1).run(subject(name), seed=seed).data
            for key, wanted in (
                ("frobenius", math.sqrt(squares)),
                ("effective_dimension", soft),
                ("participation", truth.sum() ** 2 / squares),
            ):
                covered.append(abs(float(data[key]) - wanted) <= float(data[f"{key}_error"]))
                assert float(data[f"{key}_error"]) < wanted
    assert np.mean(covered) > 0.85


def test_a_trace_whose_parts_cancel_ends_early_and_says_so() -> None:
    made = Subject(nets.dense((64, 16, 10), seed=1), tuple(t[:150] for t in digits().train), dtype=torch.float64)
    with Hessian(made) as hessian:
        truth = torch.linalg.eigvalsh(hessian.dense()).numpy()
    reading = HessianSpectrum().run(made)
    value, error = float(reading.data.trace), float(reading.data.trace_error)
    assert abs(truth.sum()) < 0.3 * np.abs(truth).sum()
    assert reading.converged
    assert 0.02 * abs(value) < error < 0.012 * np.abs(truth).sum()
    assert abs(value - truth.sum()) < 1.5 * error
    assert int(reading.data.products) < made.size / 2
    assert any("cancel in the trace" in note for note in reading.notes)
    assert not any("cancel in the trace" in note for note in HessianSpectrum().run(subject()).notes)


# -------------------------------------------------------------------------------------------------------- cost


def test_what_a_run_will_take_is_said_before_it() -> None:
    one = subject()
    cost = HessianSpectrum().estimate(one)
    used = int(HessianSpectrum().run(one).data.products)
    assert cost.seconds is not None
    assert cost.seconds > 0
    assert 0.5 * used < cost.products < 3 * used
    assert cost.price.startswith(f"about {cost.products} products of ")
    cheap = HessianSpectrum(top=1, minimum=False, trace=False, density=False).estimate(one)
    assert cheap.seconds == pytest.approx(cost.seconds * cheap.products / cost.products)


@pytest.mark.parametrize(
    ("cost", "words"),
    [
        (Cost(40_000_000, 45, "", 0.54), "about 45 products of 12 ms: 0.5 s, 40 MB"),
        (Cost(2_500_000_000, 100, "", 150.0), "about 100 products of 1.5 s: 2 min 30 s, 2.5 GB"),
        (Cost(900, None, "", 0.002), "2 ms, 900 bytes"),
        (Cost(900, 3, "three passes"), "three passes"),
    ],
)
def test_prices(cost: Cost, words: str) -> None:
    assert cost.price == words
    assert words in look.progress(JobState("running", 0.1, cost=cost.price))
    assert words not in look.progress(JobState("done", 1.0, cost=cost.price))
