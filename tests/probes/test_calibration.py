"""Calibration of models whose outputs are known, for every loss that says what probabilities are."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from torch import Tensor, nn

from workbench.numerics.calibration import MEASURES, Predictions, fit_temperature
from workbench.probes.calibration import SWEEP, Calibration
from workbench.subject import Subject

FEW = Calibration(resamples=20)


class Known(nn.Module):
    """Gives its inputs as outputs, times a scale."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def sample(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    z = 1.5 * torch.randn(*shape, generator=rng, dtype=torch.float64)
    p = z.softmax(-1).reshape(-1, shape[-1])
    return z, torch.multinomial(p, 1, generator=rng).reshape(shape[:-1])


def before(data, names=MEASURES) -> dict[str, float]:
    return {name: float(data[name].sel(stage="before")) for name in names}


@pytest.mark.parametrize("batch_size", [200, 7])
def test_a_scale_is_found_on_held_out_examples_and_undone(batch_size: int) -> None:
    (x, y), other = sample(0, 200, 4), sample(1, 500, 4)
    reading = FEW.run(Subject(Known(3.0), (x, y), held_out=other, batch_size=batch_size))
    data, plain = reading.data, Predictions(x.numpy(), y.numpy())
    best = fit_temperature(other[0].numpy(), other[1].numpy())
    assert float(data.temperature) == approx(3 * best.value)
    assert float(data.temperature_low) < 3 < float(data.temperature_high)
    assert before(data) == approx(Predictions(3 * x.numpy(), y.numpy()).measure())
    after = {name: float(data[name].sel(stage="after")) for name in MEASURES}
    assert after == approx(Predictions(x.numpy() / best.value, y.numpy()).measure())
    assert after["accuracy"] == before(data)["accuracy"]
    assert after["nll"] < before(data)["nll"] - 0.1
    assert (int(data.predictions), int(data.fitted_on)) == (200, 500)
    assert data.ece_by_bins.sel(stage="before", bin_count=15) == approx(before(data)["ece"])
    assert data.floor_by_bins.sel(stage="before").values == approx(
        [Predictions(3 * x.numpy(), y.numpy()).floor(b) for b in SWEEP]
    )
    assert plain.measure()["ece"] < before(data)["ece"]


def test_the_diagram_adds_up_and_its_intervals_hold_its_points() -> None:
    data = FEW.run(Subject(Known(2.0), sample(2, 150, 3), held_out=sample(3, 80, 3))).data.sel(stage="before")
    held = data.bin_size.values > 0
    n, gap = data.bin_size.values[held], (data.bin_accuracy - data.bin_confidence).values[held]
    assert n.sum() == 150
    assert (n * np.abs(gap)).sum() / 150 == approx(float(data.ece))
    assert (
        ((data.bin_accuracy_low <= data.bin_accuracy) & (data.bin_accuracy <= data.bin_accuracy_high))
        .values[held]
        .all()
    )
    assert np.isnan(data.bin_accuracy.values[~held]).all()


def test_without_held_out_examples_half_of_them_are_kept_apart() -> None:
    subject = Subject(Known(2.0), sample(4, 101, 3))
    reading = FEW.run(subject, seed=1)
    assert (int(reading.data.predictions), int(reading.data.fitted_on)) == (51, 50)
    assert any("random half" in note for note in reading.notes)
    assert float(FEW.run(subject, seed=2).data.temperature) != float(reading.data.temperature)
    with pytest.raises(ValueError, match="one example cannot be split"):
        FEW.run(Subject(Known(), sample(4, 1, 3)))


def test_tokens_are_flattened_and_ignored_ones_left_out() -> None:
    (z, y), other = sample(5, 30, 6, 4), sample(6, 30, 6, 4)
    y[:, 0] = -100
    want = Predictions(z[:, 1:].reshape(-1, 4).numpy(), y[:, 1:].reshape(-1).numpy()).measure()
    data = FEW.run(Subject(Known(), (z, y), held_out=other, batch_size=7)).data
    assert before(data) == approx(want)
    assert int(data.predictions) == 150
    classes_first = Subject(
        Known(), (z.movedim(-1, 1), y), F.cross_entropy, held_out=(other[0].movedim(-1, 1), other[1])
    )
    assert before(FEW.run(classes_first).data) == approx(want)


def test_tokens_of_one_example_are_drawn_together() -> None:
    z, y = sample(7, 100, 3)
    copies = z[:, None].expand(-1, 9, -1).contiguous(), y[:, None].expand(-1, 9).contiguous()
    alone = Calibration().run(Subject(Known(), (z, y), held_out=(z, y))).data
    tokens = Calibration().run(Subject(Known(), copies, held_out=copies)).data
    assert float(tokens.nll_error[0]) == approx(float(alone.nll_error[0])), "nine copies know no more than one"
    assert float(tokens.temperature_error) == approx(float(alone.temperature_error))


def test_one_logit_is_two_classes() -> None:
    (z, y), (z2, y2) = sample(8, 120, 2), sample(9, 120, 2)
    one = Subject(
        Known(),
        ((z[:, 1] - z[:, 0])[:, None], y[:, None].double()),
        "binary_cross_entropy_with_logits",
        held_out=((z2[:, 1] - z2[:, 0])[:, None], y2[:, None].double()),
    )
    two = Subject(Known(), (z, y), held_out=(z2, y2))
    found, want = FEW.run(one).data, FEW.run(two).data
    assert before(found) == approx(before(want))
    assert float(found.temperature) == approx(float(want.temperature))


def test_the_errors_are_those_of_the_subject_where_it_has_them() -> None:
    data = sample(10, 400, 3)
    subject = Subject(Known(2.0), data, held_out=data)
    found, known = Calibration(resamples=400).run(subject).data, subject.evaluate()
    assert float(found.nll[0]) == approx(known["loss"])
    assert float(found.nll_error[0]) == approx(known["loss_error"], rel=0.15)
    assert float(found.accuracy_error[0]) == approx(known["error_rate_error"], rel=0.15)


def _soft() -> Subject:
    z, _ = sample(0, 20, 3)
    return Subject(Known(), (z, z.softmax(1)))


def _refused() -> list:
    (z, y), bad = sample(0, 20, 3), sample(0, 20, 3)[0]
    bad[3, 0] = float("inf")
    return [
        (Subject(Known(), (z, z), "half_mse"), "half_mse does not say"),
        (Subject(Known(), (z, y), lambda o, t: o.sum() * 0 + t.sum()), "does not say"),
        (Subject(Known(), (z, y), objective=lambda m, b: F.cross_entropy(m(b[0]), b[1])), "objective="),
        (_soft(), "probabilities of classes"),
        (Subject(Known(), (z[:, :1], torch.full((20, 1), 0.3).double()), "binary_cross_entropy_with_logits"), "0 or 1"),
        (Subject(Known(), (z, y), "nll"), "do not sum to 1"),
    ]


@pytest.mark.parametrize("case", range(6))
def test_losses_that_give_no_probabilities_are_refused_in_words(case: int) -> None:
    subject, words = _refused()[case]
    with pytest.raises(ValueError, match=words):
        FEW.run(subject)


def test_outputs_that_are_not_finite_are_refused() -> None:
    z, y = sample(0, 40, 3)
    subject = Subject(Known(), (z, y))
    z = subject._feed.data.parts[0][0]
    z[35, 1] = float("nan")
    with pytest.raises(ValueError, match="nan or infinity"):
        FEW.run(subject)
