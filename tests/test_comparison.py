"""Comparing readings: the arithmetic of differences and errors, what is refused, what is warned of."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import examples, net, record_training

import workbench as wb
from workbench.comparison import Comparison, UnlikeModels
from workbench.draw.sheet import sheet
from workbench.probe import Reading
from workbench.probes.collapse import NeuralCollapse
from workbench.probes.spectrum import HessianSpectrum
from workbench.store import Store
from workbench.subject import Subject
from workbench.trajectory import Trajectory

PROBE = HessianSpectrum(top=2, minimum=False, trace=False, density=False)


def reading(probe: Any = PROBE, weights: int = 0, **words: Any) -> Reading:
    return probe.run(Subject(net(weights), words.pop("data", examples()), **words))


def changed(found: Reading, **values: float) -> Reading:
    """The same reading with other numbers in it."""
    data = found.data.copy(deep=True)
    for name, value in values.items():
        data[name] = data[name].copy(data=np.full(data[name].shape, value))
    return dataclasses.replace(found, data=data)


@pytest.fixture(scope="module")
def one() -> Reading:
    return reading()


def quiet(*arguments: Any) -> Comparison:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return wb.compare(*arguments)


def test_differences_are_in_units_of_both_errors(one: Reading) -> None:
    first = changed(one, eigenvalue=10.0, residual=0.3)
    found = quiet({"a": first, "b": changed(one, eigenvalue=12.0, residual=0.4), "c": first})
    frame = found.to_frame()
    b = frame.loc[("sharpness", "b")]
    assert (b.value, b.value_error) == (12.0, 0.4)
    assert (b.difference, b.difference_error, b.in_errors) == pytest.approx((2.0, 0.5, 4.0))
    assert frame.loc[("sharpness", "c")].in_errors == 0
    assert frame.loc[("sharpness", "a")].value_error == pytest.approx(0.3)
    assert frame.loc[("train_loss", "b")].value == one.summary["train_loss"]
    assert "products" not in frame.index.get_level_values("number"), "what a run took is not compared"
    assert "+4" in str(found)
    assert "± 0.4" in str(found)


def test_numbers_that_one_lacks_and_errors_nobody_knows_stay_open(one: Reading) -> None:
    unknown = changed(one, eigenvalue=99.0, residual=math.nan)
    frame = quiet(one, unknown).to_frame()
    assert math.isnan(frame.loc[("sharpness", "reading 2")].in_errors)
    assert frame.loc[("sharpness", "reading 2")].difference == 99 - one.summary["sharpness"]
    exact = changed(one, residual=0.0)
    frame = quiet(exact, changed(exact, eigenvalue=99.0)).to_frame()
    assert frame.loc[("sharpness", "reading 2")].in_errors == math.inf


def test_the_figure_shows_every_reading_with_its_error(one: Reading) -> None:
    cut = dataclasses.replace(one, data=one.data.assign_attrs(converged=0))
    figure = quiet({"a": one, "b": cut}).figure()
    panel = figure.panels[0]
    assert [m.label for m in panel.marks] == ["a", "b"]
    assert [m.role for m in panel.marks] == ["main", "unconverged"]
    assert [float(m.y[0]) for m in panel.marks] == [one.summary["sharpness"]] * 2
    assert [float(m.error[0]) for m in panel.marks] == [one.summary["sharpness_error"]] * 2


def test_it_is_exported_stored_and_shown_as_a_reading(one: Reading, tmp_path: Path) -> None:
    found = quiet({"a<b>": one, "b": one})
    written = found.export(tmp_path / "c.pdf", venue="icml2024", provenance="anonymous")
    again = wb.load(written)
    assert again.data.identical(found.joined.data)
    assert again.summary == found.joined.summary
    store = Store(tmp_path / "store")
    assert store.load(store.save(found.joined)).data.identical(found.joined.data)
    page = found._repr_mimebundle_()
    assert "<b>" not in page["text/html"]
    assert "a&lt;b&gt;" in page["text/html"]
    assert "data:image/png;base64," in page["text/html"]
    with pytest.raises(TypeError, match="made of readings"):
        found.joined.probe.run(wb.Runs({"a": Subject(net(), examples())}))


# What is refused ------------------------------------------------------------------------------------------------------


def others() -> dict[str, tuple[Any, str]]:
    x, y = examples()
    return {
        "probe": (lambda: reading(NeuralCollapse()), "'b' one of NeuralCollapse; compare readings of one probe"),
        "setting": (lambda: reading(dataclasses.replace(PROBE, top=1)), "setting top is 2 in 'a' and 1 in 'b'"),
        "examples": (lambda: reading(max_examples=20), "number of examples is 30 in 'a' and 20 in 'b'.*max_examples"),
        "choice": (lambda: reading(data=(x + 1e-9, y)), "choice of examples is .*same data, max_examples and seed"),
        "policy": (lambda: reading(norm="batch", batch_size=10), "BatchNorm policy is 'eval' in 'a' and 'batch'"),
        "loss": (lambda: reading(loss=_other_loss), "loss is 'cross_entropy' in 'a' and "),
    }


def _other_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1)


@pytest.mark.parametrize("what", others())
def test_what_differs_by_more_than_the_model_is_refused(one: Reading, what: str) -> None:
    make, words = others()[what]
    with pytest.raises(ValueError, match=words):
        wb.compare({"a": one, "b": make()})


def test_one_reading_is_no_comparison(one: Reading) -> None:
    with pytest.raises(ValueError, match="two readings; got 1"):
        wb.compare(one)


def test_settings_of_the_picture_and_precisions_do_not_matter(one: Reading) -> None:
    other = dataclasses.replace(one, probe=dataclasses.replace(PROBE, view="both"))
    assert quiet(one, other).notes == ()
    single = reading(dtype=torch.float32)
    assert "precisions differ: reading 1 float64, reading 2 float32" in quiet(one, single).notes


# What is warned of ----------------------------------------------------------------------------------------------------


def test_models_at_different_losses_are_warned_of(one: Reading) -> None:
    error = float(one.summary["train_loss_error"])
    near = changed(one, train_loss=float(one.summary["train_loss"]) + 1.3 * error)
    far = changed(one, train_loss=float(one.summary["train_loss"]) + 1.6 * error)
    assert quiet(one, near).notes == (), "within √2 standard errors"
    with pytest.warns(UnlikeModels, match="different train losses.*at equal loss") as caught:
        found = wb.compare(one, far)
    assert caught[0].filename == __file__, "the warning points at the line that compares"
    assert any("different train losses" in note for note in found.notes)
    assert "different train losses" in str(found)
    with pytest.warns(UnlikeModels):
        wb.compare(one, near, changed(near, train_loss=float(near.summary["train_loss"]) + 1.3 * error))


def test_what_is_unfinished_or_larger_is_noted(one: Reading) -> None:
    partial = dataclasses.replace(one, done=0.5, data=one.data.assign_attrs(converged=0))
    notes = quiet({"a": one, "b": partial}).notes
    assert "'b' is 50% done" in notes


# The same examples along a path ---------------------------------------------------------------------------------------


def test_checkpoints_of_a_run_are_measured_on_the_same_examples(tmp_path: Path) -> None:
    record_training(tmp_path / "run", 0, examples())
    path = Trajectory.open(tmp_path / "run").using(model=net(), data=examples(), loss="cross_entropy")
    early, late = (path.subject(step) for step in (path.steps[0], path.steps[-1]))
    assert early.data_digest == late.data_digest
    assert early.fingerprint() != late.fingerprint()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnlikeModels)
        found = wb.compare({"early": PROBE.run(early), "late": PROBE.run(late)})
    assert found.to_frame().loc[("sharpness", "late")].value == PROBE.run(late).summary["sharpness"]


def test_digests_of_examples_are_equal_exactly_when_the_examples_are() -> None:
    x, y = examples()
    whole = Subject(net(), (x, y))
    assert whole.data_digest == Subject(net(1), (x.clone(), y.clone())).data_digest
    assert whole.data_digest == whole.snapshot().data_digest
    assert whole.data_digest != whole.selected(range(29)).data_digest
    assert whole.data_digest != Subject(net(), (x.flip(0), y.flip(0))).data_digest


def test_pictures_of_planes_share_one_colour_scale() -> None:
    readings = {
        label: wb.landscape.Plane(points=5, normalization="filter").run(Subject(net(k), examples()))
        for k, label in enumerate(("a", "b"))
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnlikeModels)
        compared = wb.compare(readings)
    figure = compared.pictures()
    assert [p.title for p in figure.panels] == ["a", "a", "b", "b"]
    assert figure.columns == 2
    losses = np.concatenate([r.data.loss.values.ravel() for r in readings.values()])
    for panel in figure.panels:
        assert panel.z is not None
        assert panel.z.limits == (losses.min(), losses.max())
    levels = [sheet(panel).levels for panel in figure.panels[::2]]
    assert np.array_equal(*levels)
    alone = [sheet(r.figure().panels[0]).levels for r in readings.values()]
    assert not np.array_equal(*alone), "else the test would see nothing"
