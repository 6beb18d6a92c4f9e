"""Layers' spectra against diagonal blocks of Hessians computed entry by entry; what a reading says of itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from architectures import perceptron, small
from torch import Tensor, nn

from workbench.figure import Bars
from workbench.operators.blocks import groups
from workbench.probe import Reading, drive
from workbench.probes.layers import LayerSpectra
from workbench.probes.spectrum import HessianSpectrum
from workbench.spectra.layer_panels import short
from workbench.subject import Subject

NETS = ("transformer encoder", "conv + BatchNorm", "tied embedding", "LSTM")


def subject(name: str, **words: Any) -> Subject:
    net = small(name)
    return Subject(net.model, net.data, **words)


def blocks(name: str, level: Any = "layer") -> dict[str, Tensor]:
    """The exact diagonal blocks, by the name of their layer."""
    here, whole = subject(name), small(name).hessian
    index = {g.name: g.index(here.params) for g in groups(here, level)}
    return {layer: whole[i][:, i] for layer, i in index.items()}


def objective(formula: Callable[[Any], Tensor], **weights: Any) -> Subject:
    """A formula of named weights, each a parameter beside a module: a layer of its own."""
    model = nn.Module()
    for name, start in weights.items():
        model.register_parameter(name, nn.Parameter(torch.tensor(start, dtype=torch.float64)))
    model.other = nn.Identity()
    return Subject(model, [torch.zeros(1)], objective=lambda net, batch: formula(net), reduction="mean")


def within(found: xr.DataArray, error: xr.DataArray, truth: Any, factor: float = 1.5, slack: float = 1e-9) -> None:
    gap = np.abs(found.values - np.asarray(truth))
    assert np.all(gap <= factor * error.values + slack * (1 + np.abs(truth))), (gap, error.values)


# ------------------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize("name", NETS)
def test_exact_blocks_at_a_tight_tolerance(name: str) -> None:
    exact, whole = blocks(name), small(name).hessian
    together = name == "conv + BatchNorm"  # the whole matrix exactly, where that is cheap
    reading = LayerSpectra(tolerance=1e-4, top=2, whole=together).run(subject(name))
    data = reading.data
    assert reading.converged
    assert list(data["layer"].values) == list(exact)
    values = [np.linalg.eigvalsh(b)[::-1] for b in exact.values()]
    assert data.eigenvalue.values == pytest.approx(np.array([v[:2] for v in values]), rel=1e-4, abs=1e-10)
    scale = max(v[0] for v in values)
    assert data.eigenvalue_min.values == pytest.approx(np.array([v[-1] for v in values]), rel=1e-3, abs=1e-4 * scale)
    traces, norms = ([float(f(b)) for b in exact.values()] for f in (torch.trace, torch.linalg.matrix_norm))
    assert data.trace.values == pytest.approx(np.array(traces), rel=1e-5)
    assert data.frobenius_norm.values == pytest.approx(np.array(norms), rel=1e-5)
    assert data.trace_share.values == pytest.approx(np.array(traces) / sum(traces), rel=1e-4)
    assert float(data.trace.sum()) == pytest.approx(float(whole.trace()), rel=1e-5)
    if together:
        mass = 1 - sum(n**2 for n in norms) / float(whole.square().sum())
        assert float(data.whole_trace) == pytest.approx(float(whole.trace()), rel=1e-5)
        assert float(data.off_diagonal_mass) == pytest.approx(mass, abs=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_stated_errors_hold_as_it_comes(name: str) -> None:
    exact, whole = blocks(name), small(name).hessian
    reading = LayerSpectra().run(subject(name))
    data = reading.data
    assert reading.converged
    for layer, block in exact.items():
        here, values = data.sel(layer=layer), np.linalg.eigvalsh(block)
        slack = 1e-12 * np.abs(values).max()
        assert np.abs(float(here.eigenvalue[0]) - values).min() <= float(here.residual[0]) + slack
        assert np.abs(float(here.eigenvalue_min) - values).min() <= float(here.eigenvalue_min_residual) + slack
        assert float(here.eigenvalue[0]) <= values[-1] + slack
    traces = np.array([float(b.trace()) for b in exact.values()])
    norms = np.array([float(b.norm()) for b in exact.values()])
    within(data.trace, data.trace_error, traces)
    within(data.frobenius_norm, data.frobenius_norm_error, norms)
    within(data.trace_share, data.trace_share_error, traces / traces.sum())
    mass = 1 - float((norms**2).sum()) / float(whole.square().sum())
    within(data.off_diagonal_mass, data.off_diagonal_mass_error, mass)
    assert any("they agree" in note for note in reading.notes)


def test_blocks_level_and_the_whole_beside_another_probe() -> None:
    reading = LayerSpectra(level="block", tolerance=2e-3).run(subject("transformer encoder"))
    assert list(reading.data["layer"].values) == ["embed", "body", "head"]
    exact = blocks("transformer encoder", "block")
    wanted = [float(torch.linalg.eigvalsh(b)[-1]) for b in exact.values()]
    assert reading.data.eigenvalue.values[:, 0] == pytest.approx(np.array(wanted), rel=2e-3)
    whole = HessianSpectrum(top=1, tolerance=1e-4, density=False, trace=False).run(subject("transformer encoder"))
    assert float(reading.data.whole_eigenvalue) == pytest.approx(float(whole.data.eigenvalue[0]), rel=1e-4)
    assert max(wanted) <= float(reading.data.whole_eigenvalue) * (1 + 1e-9)


# --------------------------------------------------------------------------------------------- known by formula


def test_a_product_of_two_numbers() -> None:
    """½ (w2 w1 - 3)² at (1, 2): blocks 4 and 1, off the diagonal 2 w1 w2 - 3 = 1: mass 2/19."""
    reading = LayerSpectra().run(objective(lambda net: 0.5 * (net.b * net.a - 3).square().sum(), a=[1.0], b=[2.0]))
    data = reading.data
    assert reading.converged
    assert data.eigenvalue.values[:, 0].tolist() == pytest.approx([4, 1])
    assert data.scaled.values.tolist() == pytest.approx([4, 4])
    assert float(data.whole_eigenvalue) == pytest.approx(4.30277564)
    assert float(data.off_diagonal_mass) == pytest.approx(2 / 19)
    assert float(data.off_diagonal_mass_error) == 0


def test_all_of_it_between_layers_and_none_of_it() -> None:
    between = LayerSpectra().run(objective(lambda net: (net.a * net.b).sum(), a=[1.0, 2.0], b=[3.0, 4.0])).data
    assert float(between.off_diagonal_mass) == pytest.approx(1)
    assert between.eigenvalue.values.tolist() == [[0], [0]]
    assert float(between.whole_eigenvalue) == pytest.approx(1)
    inside = LayerSpectra().run(objective(lambda net: (net.a**2).sum() + (net.b**4).sum(), a=[1.0, 2.0], b=[3.0])).data
    assert float(inside.off_diagonal_mass) == pytest.approx(0, abs=1e-12)
    assert inside.trace.values.tolist() == pytest.approx([4, 108])


def test_relu_blocks_without_biases_are_those_of_gauss_newton() -> None:
    rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    here = Subject(model, (torch.randn(20, 5, generator=rng, dtype=torch.float64), torch.arange(20) % 3))
    one, two = (LayerSpectra(operator=name, tolerance=1e-6).run(here).data for name in ("hessian", "ggn"))
    for name in ("eigenvalue", "trace", "frobenius_norm", "trace_share", "scaled"):
        assert one[name].values == pytest.approx(two[name].values, rel=1e-6)
    assert float(one.off_diagonal_mass) != pytest.approx(float(two.off_diagonal_mass), rel=1e-3)
    assert np.isnan(two.eigenvalue_min).all()


def test_scale_free_sharpness_ignores_a_scale_that_normalisation_takes_out() -> None:
    data = torch.randn(40, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64), torch.arange(40) % 3
    found = []
    for factor in (1.0, 3.0, 10.0):
        torch.manual_seed(1)
        layers = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, eps=1e-10), nn.ReLU(), nn.Linear(8, 3)
        model = nn.Sequential(*layers).double()
        with torch.no_grad():
            model[0].weight.mul_(factor)
        here = Subject(model, data, norm="batch", batch_size=40)
        found.append(LayerSpectra(layers="0", tolerance=1e-6).run(here).data)
    raw = [float(d.eigenvalue[0, 0]) for d in found]
    assert raw[0] / raw[2] == pytest.approx(100, rel=1e-4)
    assert [float(d.scaled[0]) for d in found] == pytest.approx([float(found[0].scaled[0])] * 3, rel=1e-4)


# ------------------------------------------------------------------------------------------- what is covered


def test_every_parameter_is_accounted_for() -> None:
    model = perceptron(6, nn.GELU).double()
    model[2].bias.requires_grad_(False)
    model.register_parameter("whole", nn.Parameter(torch.arange(3), requires_grad=False))
    model.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    here = Subject(model, small("dense GELU").data, parameters=["2.weight", "4.weight", "spare"])
    reading = LayerSpectra(layers="2, spare").run(here)
    data = reading.data
    names = ("analysed", "frozen", "filtered", "left_out", "not_floating", "unused")
    said = {n: {str(data["parameter"][i].item()) for i in np.flatnonzero(data[n].values)} for n in names}
    assert said == {
        "analysed": {"2.weight", "spare"}, "frozen": {"2.bias"}, "filtered": {"4.bias"}, "left_out": {"4.weight"},
        "not_floating": {"whole"}, "unused": {"spare"},
    }  # fmt: skip
    idle = data.sel(layer="spare")
    assert [float(idle[n]) for n in ("trace", "trace_error", "frobenius_norm", "trace_share")] == [0, 0, 0, 0]
    assert bool(idle.complete)
    assert any("not analysed, frozen: 2.bias" in note for note in reading.notes)
    assert any("does not depend on spare" in note for note in reading.notes)
    assert any(note.startswith("98 of ") for note in reading.notes)


def test_layers_by_name_and_by_glob() -> None:
    here = subject("transformer encoder")
    assert list(LayerSpectra(layers="body.self_attn").run(here).data["layer"].values) == [
        f"body.self_attn.{n}" for n in ("q", "k", "v", "out_proj")
    ]
    assert list(LayerSpectra(layers="*norm?, head").run(here).data["layer"].values) == [
        "body.norm1", "body.norm2", "head",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"layers='tail' names none of the 10 groups.*embed, body\.self_attn\.q"):
        LayerSpectra(layers="tail").run(here)


# --------------------------------------------------------------------------------------------- what it says


def test_a_glance_at_every_layer_comes_first() -> None:
    readings: list[Reading] = []
    LayerSpectra().run(subject("transformer encoder"), on_reading=readings.append)
    count = readings[0].data.sizes["layer"]
    known = [int(np.isfinite(r.data.eigenvalue.values[:, 0]).sum()) for r in readings[:count]]
    assert known == list(range(1, count + 1))
    glance = readings[count - 1]
    assert int(glance.data.products) == 3 * count
    assert np.isnan(glance.data.trace_error).all()
    assert np.isfinite(glance.data.trace_share).all()
    assert not glance.data.converged.any()
    grey = [m for m in glance.figure().panels[0].marks if isinstance(m, Bars) and m.role == "unconverged"]
    assert np.isfinite(grey[0].y).all()
    full = [m for m in readings[-1].figure().panels[0].marks if isinstance(m, Bars) and m.role == "main"]
    assert np.isfinite(full[0].y).all()
    assert full[0].names == short([str(n) for n in readings[0].data["layer"].values])
    exact = np.array([float(torch.linalg.eigvalsh(b)[-1]) for b in blocks("transformer encoder").values()])
    for reading in readings:
        found = reading.data.eigenvalue.values[:, 0]
        assert np.all(found[np.isfinite(found)] <= exact[np.isfinite(found)] * (1 + 1e-9)), "never above the truth"


def test_names_under_bars_are_short_and_tell_layers_apart() -> None:
    deep = [f"transformer.h.{i}.attn.c_attn.{part}" for i in range(2) for part in "qkv"]
    assert short(deep)[0] == "0.attn.c_attn.q"
    assert len(set(short(deep))) == 6
    assert short(["a.b.c"]) == ("a.b.c",)
    assert short(["net.0", "net.2"]) == ("0", "2")
    assert short(["x" * 30])[0] == "…" + "x" * 18


def test_without_the_whole() -> None:
    with_it, without = (LayerSpectra(whole=whole).run(subject("dense GELU")).data for whole in (True, False))
    assert np.isnan(without.off_diagonal_mass)
    assert np.isnan(without.whole_eigenvalue)
    assert int(without.products) < int(with_it.products)
    xr.testing.assert_identical(without.trace, with_it.trace)
    alone = LayerSpectra(layers="2").run(subject("dense GELU")).data
    assert float(alone.off_diagonal_mass) == 0
    assert float(alone.whole_trace) == float(alone.trace[0])


def test_loss_stands_beside() -> None:
    net, data = small("dense GELU"), LayerSpectra(top=1).run(subject("dense GELU", max_examples=50)).data
    assert float(data.train_loss) > 0
    whole = LayerSpectra(whole=False, layers="4").run(subject("dense GELU"))
    assert float(whole.data.train_loss) == pytest.approx(net.loss(net.model).item(), rel=1e-10)
    assert float(whole.data.train_loss_error) > 0
    partial = LayerSpectra(layers="4").run(subject("dense GELU", max_examples=50))
    assert any("on 50 of 70 examples" in note for note in partial.notes)


class Shifted(nn.Module):
    """Logits with the same number added to all of them, which softmax does not see: a layer of pure rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.shift = nn.Linear(6, 3), nn.Linear(6, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.shift(x) * torch.ones(3, dtype=x.dtype)


def test_a_block_of_rounding_spoils_only_itself() -> None:
    torch.manual_seed(0)
    data = 100 * torch.randn(64, 6), torch.arange(64) % 3
    model = Shifted()
    with torch.no_grad():
        model.head.weight.mul_(0.01)
    reading = LayerSpectra(operator="ggn").run(Subject(model, data))
    head, shift = (reading.data.sel(layer=n) for n in ("head", "shift"))
    assert bool(head.complete)
    assert not bool(shift.complete)
    assert abs(float(shift.eigenvalue[0])) < 1e-4 * float(head.eigenvalue[0])
    assert not reading.converged
    assert any(note.startswith("shift: products are rounding only") for note in reading.notes)


def test_stopping_early_frees_and_says_so() -> None:
    stream = drive(LayerSpectra(), subject("dense GELU"))
    reading = next(stream)
    stream.close()
    assert reading.done < 1
    assert not reading.converged
    assert math.isfinite(float(reading.data.train_loss))
