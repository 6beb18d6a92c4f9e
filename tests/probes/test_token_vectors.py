"""FourierConcentration and RepresentationQuality on nets whose embeddings are written down."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from workbench.probes.fourier_concentration import FourierConcentration
from workbench.probes.representation_quality import RepresentationQuality
from workbench.subject import Subject
from workbench.zoo.modular import pairs, waves
from workbench.zoo.nets import dense


def test_a_net_of_one_wave_is_one_frequency_and_beside_it_stands_its_loss() -> None:
    subject = Subject(waves(13, 4, 2.0), pairs(13))
    data = FourierConcentration().run(subject).data
    assert int(data.power.values.argmax()) + 1 == 4
    assert data.gini == pytest.approx(1 - 1 / 6)
    assert data.frequencies_needed == 1
    assert data.top_share == pytest.approx(1)
    assert data.train_loss == pytest.approx(subject.loss())


def test_columns_of_a_linear_map_of_one_hot_tokens_are_vectors_too() -> None:
    net = dense((13, 4, 13), seed=1).double()
    turn = 2 * torch.pi * 3 * torch.arange(13) / 13
    with torch.no_grad():
        net.linear1.weight.copy_(torch.stack([turn.cos(), turn.sin(), turn.cos(), turn.sin()]))
    subject = Subject(net, (torch.eye(13, dtype=torch.float64), torch.arange(13)))
    assert FourierConcentration().run(subject).data.gini == pytest.approx(1 - 1 / 6)
    named = FourierConcentration(embedding="linear1", tokens=12).run(subject).data
    assert named.sizes["frequency"] == 6
    assert named.gini < 1 - 1 / 6
    with pytest.raises(ValueError, match="has 13 tokens; tokens=20"):
        FourierConcentration(tokens=20).run(subject)
    with pytest.raises(ValueError, match="activation1 holds no embedding"):
        FourierConcentration(embedding="activation1").run(subject)


def line(values: list[float]) -> Subject:
    """Tokens on a line through three dims, and a dim that does not vary."""
    net = nn.Sequential(nn.Embedding(len(values), 4), nn.Linear(4, 2)).double()
    with torch.no_grad():
        at = torch.tensor(values, dtype=torch.float64)[:, None]
        net[0].weight.copy_(torch.cat([at @ torch.tensor([[1.0, -2, 0.5]], dtype=torch.float64), 0 * at + 7], 1))
    return Subject(net, (torch.arange(len(values)), torch.arange(len(values)) % 2))


@pytest.mark.parametrize(("power", "held"), [(1, 70), (2, 8)])
def test_tokens_on_a_line_close_their_parallelograms(power: int, held: int) -> None:
    reading = RepresentationQuality().run(line([float(i) ** power for i in range(10)]))
    assert reading.data.parallelograms == 70
    assert reading.summary["representation_quality"] == pytest.approx(held / 70)


def test_the_grokking_rate_is_that_of_the_training_pairs() -> None:
    """Pairs 0 + 2 and 1 + 1 of three tokens on 0, 1, 2: 12 over the sum of squares."""
    net = nn.Sequential(nn.Embedding(3, 1), nn.Flatten(), nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.0], [1], [2]]))
    both = Subject(net, (torch.tensor([[0, 2], [1, 1], [2, 1]]), torch.tensor([0, 1, 0])))
    reading = RepresentationQuality().run(both)
    assert reading.summary["grokking_rate"] == pytest.approx(12 / 5)
    assert np.isnan(RepresentationQuality(modular=True).run(both).data.grokking_rate)
    assert np.isnan(RepresentationQuality().run(line([0.0, 1, 2])).data.grokking_rate), "single tokens are no pairs"


def test_the_plane_keeps_distances_that_lie_in_it() -> None:
    plane = RepresentationQuality().run(line([0.0, 1, 4, 5, 9])).data.plane.values
    gaps = np.diff(plane[:, 0]) / np.diff([0.0, 1, 4, 5, 9])
    assert gaps == pytest.approx(gaps[0])
    assert plane[:, 1] == pytest.approx(0, abs=1e-9)


def test_vectors_that_are_all_alike_are_unknown_and_said() -> None:
    reading = RepresentationQuality().run(line([2.0] * 5))
    assert np.isnan(reading.data.representation_quality)
    assert any("all alike" in note for note in reading.notes)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="has 2 tokens; 3 to 400"):
        RepresentationQuality().run(line([0.0, 1.0]))
