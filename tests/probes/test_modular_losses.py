"""Restricted and excluded loss: the closed form of one wave, plain projections, and keys fixed by a record's end."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from workbench.dynamics.recorder import Recorder
from workbench.probes.modular_losses import ModularLosses
from workbench.subject import Subject
from workbench.trajectory import Trajectory
from workbench.zoo.modular import added_embeddings, pairs, split, waves


def opened(net: torch.nn.Module, modulus: int) -> Subject:
    train, test = split(modulus, 0.4, seed=1)
    return Subject(net, train, held_out=test, max_examples=None)


@pytest.mark.parametrize(("modulus", "amplitude"), [(113, 5.0), (24, 1.0), (23, 20.0)])
def test_one_wave(modulus: int, amplitude: float) -> None:
    values = [math.exp(amplitude * math.cos(2 * math.pi * c / modulus)) for c in range(modulus)]
    restricted = math.log(sum(values)) - amplitude
    assert modulus != 113 or restricted == pytest.approx(3.03206959, abs=1e-8)
    reading = ModularLosses().run(opened(waves(modulus, 7, amplitude), modulus))
    data = reading.data
    assert data["frequency"].values[data.key.values].tolist() == [7]
    assert data.restricted_loss == pytest.approx(restricted, abs=1e-8)
    assert data.excluded_loss == pytest.approx(math.log(modulus), abs=1e-8)
    assert data.train_loss == pytest.approx(restricted, abs=1e-8)
    assert data.test_loss == pytest.approx(restricted, abs=1e-8)
    others = data.excluded_each.values[~data.key.values]
    assert others == pytest.approx(restricted, abs=1e-8)
    assert data.excluded_each.values[6] == pytest.approx(math.log(modulus), abs=1e-8)
    assert reading.notes == ("key frequencies of the vectors at these weights",)


def test_projections_of_any_net_are_those_of_an_explicit_basis() -> None:
    p, keys = 7, (2, 3)
    net = added_embeddings(p, 6, "relu", scale=2.0, seed=3).double()
    data = ModularLosses(frequencies="2, 3").run(opened(net, p)).data
    inputs, targets = pairs(p)
    z = net(inputs).detach().numpy()
    kept = np.zeros_like(z) + z.mean(0)
    removed = z.copy()
    for k in keys:
        for wave in (np.cos, np.sin):
            u = wave(2 * np.pi * k * inputs.sum(1).numpy() / p)
            u /= np.linalg.norm(u)
            kept += np.outer(u, u @ z)
            removed -= np.outer(u, u @ z)

    def loss(logits: np.ndarray, rows: list[int]) -> float:
        return float(np.mean([np.log(np.exp(logits[r]).sum()) - logits[r][int(targets[r])] for r in rows]))

    train = [int(a) * p + int(b) for a, b in split(p, 0.4, seed=1)[0][0]]
    assert data.restricted_loss == pytest.approx(loss(kept, list(range(p * p))))
    assert data.excluded_loss == pytest.approx(loss(removed, train))
    assert data.train_loss == pytest.approx(loss(z, train))


def test_keys_of_a_record_are_those_of_its_end(tmp_path: Path) -> None:
    net = waves(11, 2)
    with Recorder(tmp_path / "run", net, every=1) as recorder:
        net.load_state_dict(waves(11, 4).state_dict())
        recorder.step()
    train, test = split(11)
    trajectory = Trajectory.open(tmp_path / "run").using(net, train, "cross_entropy", held_out=test)
    for step, excluded_is_chance in ((0, False), (1, True)):
        reading = ModularLosses().run(trajectory.subject(step))
        assert reading.summary["key_frequencies"] == "4"
        assert "key frequencies of the vectors at step 1" in reading.notes
        assert (reading.data.excluded_loss == pytest.approx(math.log(11))) == excluded_is_chance
    assert ModularLosses().context(trajectory.subject(0)) != ""
    assert ModularLosses(frequencies="1").context(trajectory.subject(0)) == ""


def test_fewer_inputs_and_other_tasks_are_said() -> None:
    (x, y), _ = split(11)
    reading = ModularLosses().run(Subject(waves(11), (x, y)))
    assert f"{len(x)} of 121 inputs" in reading.notes
    assert np.isnan(reading.data.test_loss)
    with pytest.raises(ValueError, match="whole numbers from 1 to 5"):
        ModularLosses(frequencies="9").run(Subject(waves(11), (x, y)))
    with pytest.raises(ValueError, match=r"first two columns of the inputs.*got inputs \(4, 1\)"):
        ModularLosses().run(Subject(torch.nn.Linear(1, 3), (torch.ones(4, 1), torch.zeros(4).long())))
