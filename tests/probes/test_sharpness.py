"""Sharpness as a whole: invariances, what it says of itself, and that no definition spoils another."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from architectures import SMALL, small
from hypothesis import given, settings
from hypothesis import strategies as st
from surfaces import Q2, double, quadratic
from torch import nn

from workbench.plan import Plan
from workbench.probe import Reading, drive
from workbench.probes.sharpness import DEFAULT, Sharpness
from workbench.sharpness.table import LABELS, RISES, WORDS, Definition
from workbench.subject import Subject

EVERY: tuple[Definition, ...] = Definition.__args__
ADAPTIVE = ("adaptive_average", "adaptive_sam", "adaptive_worst_linf", "adaptive_lambda_max")
INVARIANT = (*ADAPTIVE, "filter_average", "module_lambda", "module_trace", "relative_flatness", "fisher_rao")


def values(reading: Reading) -> dict[str, float]:
    return {str(n): float(reading.data.sharpness.sel(definition=n)) for n in reading.data["definition"].values}


def two_layers(bias: bool = False) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6, bias=bias), nn.ReLU(), nn.Linear(6, 3, bias=bias)).double()


DATA = (double(25, 4, seed=2), torch.arange(25) % 3)


# ------------------------------------------------------------------------------------------------- invariances


@settings(max_examples=4, deadline=None)
@given(factor=st.floats(0.05, 20))
def test_rescaling_two_layers_changes_only_what_it_should(factor: float) -> None:
    """(c W1, W2 / c) is the same function of a ReLU network: no measure in units of the weights may see c."""
    net = two_layers()
    probe = Sharpness(definitions=(*INVARIANT, "lambda_max"), draws=2, steps=4, tolerance=1e-7)
    before = values(probe.run(Subject(net, DATA)))
    with torch.no_grad():
        net[0].weight.mul_(factor)
        net[2].weight.div_(factor)
    after = values(probe.run(Subject(net, DATA)))
    for name in ("adaptive_average", "adaptive_lambda_max", "filter_average", "module_lambda", "module_trace"):
        assert after[name] == pytest.approx(before[name], rel=1e-6), name
    for name in ("adaptive_sam", "adaptive_worst_linf", "relative_flatness", "fisher_rao"):
        assert after[name] == pytest.approx(before[name], rel=1e-6), name
    if factor > 3 or factor < 1 / 3:
        assert abs(after["lambda_max"] / before["lambda_max"] - 1) > 0.2, "λ1 itself is not invariant"


def test_the_worst_case_in_units_of_the_weights_is_invariant_where_the_search_ends() -> None:
    net = two_layers()
    probe = Sharpness(definitions=("adaptive_worst_l2",), adaptive_radius=0.2, steps=60)
    before = values(probe.run(Subject(net, DATA)))
    with torch.no_grad():
        net[0].weight.mul_(2.0)
        net[2].weight.div_(2.0)
    assert values(probe.run(Subject(net, DATA))) == pytest.approx(before, rel=0.01)


def test_asams_own_code_is_not_invariant() -> None:
    net, found = two_layers(), []
    for factor in (1.0, 30.0):
        with torch.no_grad():
            net[0].weight.mul_(factor)
            net[2].weight.div_(factor)
        found.append(values(Sharpness(definitions=("adaptive_sam",), asam_compat=True).run(Subject(net, DATA))))
    assert abs(found[1]["adaptive_sam"] / found[0]["adaptive_sam"] - 1) > 0.05


def test_no_split_of_the_data_changes_anything() -> None:
    """25 examples by 25, by 7 and by 24: the last chunk is short."""
    net = two_layers(bias=True)
    probe = Sharpness(definitions=EVERY, draws=3, steps=5, noise_draws=4, block=8)
    whole = probe.run(Subject(net, DATA))
    for chunk in (7, 24):
        split = probe.run(Subject(net, DATA).with_plan(Plan(chunk=chunk)))
        np.testing.assert_allclose(split.data.sharpness, whole.data.sharpness, rtol=1e-7)


def test_the_order_of_the_examples_does_not_matter() -> None:
    """Except for m-sharpness, whose blocks are dealt by place."""
    net, order = two_layers(bias=True), torch.randperm(25, generator=torch.Generator().manual_seed(0))
    chosen = tuple(d for d in EVERY if d != "m_sharpness")
    probe = Sharpness(definitions=chosen, draws=3, steps=5, noise_draws=4)
    one, other = probe.run(Subject(net, DATA)), probe.run(Subject(net, (DATA[0][order], DATA[1][order])))
    np.testing.assert_allclose(one.data.sharpness, other.data.sharpness, rtol=1e-6)


class UnitLogits(nn.Module):
    """Logits over their root mean square, as a layer of the model."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits / (logits**2).mean(1, keepdim=True) ** 0.5


def test_normalised_logits_are_those_of_a_model_that_normalises_them() -> None:
    net = two_layers()
    probe = Sharpness(definitions=(*ADAPTIVE, "sam"), normalise_logits=True, draws=3, steps=5, tolerance=1e-6)
    found = values(probe.run(Subject(net, DATA, batch_size=7)))
    by_hand = dataclasses.replace(probe, normalise_logits=False).run(Subject(nn.Sequential(net, UnitLogits()), DATA))
    assert {n: found[n] for n in ADAPTIVE} == pytest.approx({n: values(by_hand)[n] for n in ADAPTIVE}, rel=1e-8)
    assert found["sam"] != pytest.approx(values(by_hand)["sam"], rel=0.01)
    with torch.no_grad():
        net[2].weight.mul_(5.0)
    louder = values(probe.run(Subject(net, DATA)))
    assert {n: louder[n] for n in ADAPTIVE} == pytest.approx({n: found[n] for n in ADAPTIVE}, rel=1e-6)
    refused = probe.run(quadratic(Q2, 1.0, 1.0))
    assert math.isnan(values(refused)["adaptive_sam"])
    assert values(refused)["sam"] > 0


# ------------------------------------------------------------------------------------------- what it says


def test_each_definition_states_its_protocol_and_has_an_error() -> None:
    reading = Sharpness(definitions=EVERY, draws=4, steps=6, noise_draws=4).run(Subject(two_layers(bias=True), DATA))
    for name in EVERY:
        assert any(note.startswith(f"{name}: ") for note in reading.notes)
        one = reading.data.sel(definition=name)
        assert math.isfinite(float(one.sharpness)) == math.isfinite(float(one.sharpness_error)), name
    said = " ".join(reading.notes)
    for word in ("lower bound", "standard error", "residual", "σ", "‖δ‖₂ <= 0.05", "total length", "25 of 25"):
        assert word in said, word
    assert reading.summary["train_loss"] == pytest.approx(
        float(nn.functional.cross_entropy(two_layers(bias=True)(DATA[0]), DATA[1]).detach())
    )
    assert {f"{n}_error" for n in EVERY} <= reading.summary.keys()
    bounds = {str(n) for n in EVERY if bool(reading.data.lower_bound.sel(definition=n))}
    assert bounds == {"worst_l2", "worst_linf", "m_sharpness", "adaptive_worst_l2", "adaptive_worst_linf", "keskar"}
    size = 6 * 4 + 6 + 3 * 6 + 3
    assert float(reading.data.average_radius) == pytest.approx(0.01 * size**0.5)


def test_words_and_labels_for_every_definition() -> None:
    assert set(WORDS) == set(LABELS) == set(EVERY)
    assert set(EVERY) >= RISES
    assert len(set(LABELS.values())) == len(LABELS)
    assert set(DEFAULT) == set(EVERY) - {"keskar"}


def test_an_objective_has_all_but_what_needs_outputs() -> None:
    reading = Sharpness(definitions=EVERY, radius=0.1, draws=4).run(quadratic(Q2, 1.0, 1.0))
    found = values(reading)
    absent = {name for name, value in found.items() if math.isnan(value)}
    outputs = {"relative_flatness", "neuron_flatness", "fisher_rao", "fisher_rao_empirical"}
    assert absent == {*outputs, "pac_bayes", "pac_bayes_magnitude"}
    assert all(any(n.startswith(f"{name}: nan, ") for n in reading.notes) for name in absent)
    assert found["sam"] == pytest.approx(0.23260680, abs=5e-9)
    assert found["worst_l2"] == pytest.approx(0.23264163, abs=5e-9)
    assert found["lambda_max"] == pytest.approx(2, rel=1e-10)
    assert reading.converged


@pytest.mark.parametrize("name", ["conv + BatchNorm", "LSTM", "tied embedding", "partly frozen"])
def test_any_architecture(name: str) -> None:
    net = small(name)
    before = copy.deepcopy(net.model.state_dict())
    reading = Sharpness(draws=2, steps=4, noise_draws=2).run(Subject(net.model, net.data))
    assert not [n for n, value in values(reading).items() if math.isnan(value) and not _excused(n, name)]
    assert all(torch.equal(before[k], v) for k, v in net.model.state_dict().items())
    said = any("not estimated anew for perturbed" in note for note in reading.notes)
    assert said == (name == "conv + BatchNorm")
    assert name in SMALL


def _excused(definition: str, name: str) -> bool:
    """The output layer of a tied model is a use of its embedding, and noise of σ = 1 need not spoil a weak one."""
    return definition.startswith("pac_bayes") or (name == "tied embedding" and "flatness" in definition)


def test_a_poisoned_region_spoils_only_what_enters_it() -> None:
    """A loss that is nan beyond a distance: large steps are nan, and say so; small ones and derivatives are not."""

    def fenced(w: torch.Tensor) -> torch.Tensor:
        return 0.5 * w @ Q2 @ w + torch.where((w - 1).norm() > 0.2, math.nan, 0.0)

    from surfaces import surface

    chosen: Any = ("sam", "worst_l2", "average", "adaptive_sam", "lambda_max")
    found = values(Sharpness(definitions=chosen, radius=0.1, sigma=1e-3, draws=4).run(surface(fenced, 1.0, 1.0)))
    assert math.isnan(found["adaptive_sam"])  # its step is half the weights
    assert not math.isnan(found["sam"] + found["worst_l2"] + found["average"] + found["lambda_max"])


def test_it_streams_one_definition_after_another_and_can_be_stopped() -> None:
    subject = Subject(two_layers(bias=True), DATA)
    stream = drive(Sharpness(definitions=("lambda_max", "average", "sam")), subject)
    seen = [next(stream) for _ in range(3)]
    stream.close()
    assert math.isfinite(values(seen[0])["lambda_max"])
    assert math.isnan(values(seen[-1])["sam"])
    assert not seen[-1].converged


def test_a_definition_is_the_same_alone_or_among_others() -> None:
    """Random numbers do not depend on what was asked for before: readings of different choices compare."""
    subject = Subject(two_layers(bias=True), DATA)
    together = values(Sharpness(definitions=EVERY, draws=3, steps=5, noise_draws=4).run(subject))
    for name in ("average", "worst_l2", "m_sharpness", "module_trace", "pac_bayes"):
        alone = values(Sharpness(definitions=(name,), draws=3, steps=5, noise_draws=4).run(subject))
        assert alone[name] == pytest.approx(together[name], rel=1e-12, nan_ok=True)


def test_no_definition_at_all_is_refused() -> None:
    for wrong in ((), ("sam", "sam")):
        with pytest.raises(ValueError, match="at least one, each once"):
            Sharpness(definitions=wrong)  # type: ignore[arg-type]


def test_float32_errors_cover_what_rounding_does() -> None:
    """First-order rises in float32 agree with float64 to within their stated rounding and that of the weights."""
    net = small("dense GELU")
    exact, rounded = (
        Sharpness(definitions=("sam", "worst_linf")).run(Subject(net.model, net.data, dtype=dtype)).data
        for dtype in (torch.float64, torch.float32)
    )
    gap = np.abs(exact.sharpness.values - rounded.sharpness.values)
    assert (gap <= rounded.sharpness_error.values + 1e-3 * exact.sharpness.values).all()
    assert (rounded.sharpness_error.values > 1e-8).all()
