"""A stream of tasks: what arms share, accuracies before and after learning, signs by hand, networks that diverge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pytest import approx
from torch import nn

from workbench.experiments import task_stream
from workbench.experiments.experiment import Experiment
from workbench.experiments.loss_of_plasticity import NEEDED, LossOfPlasticity
from workbench.experiments.normalize_and_project import ROLES, NormalizeAndProject
from workbench.experiments.task_stream import Arm, TaskStream, checkpoints, signs
from workbench.zoo.interventions import ContinualBackprop, Intervention
from workbench.zoo.nets import dense


def plain(seed: int) -> nn.Module:
    return dense((5, 8, 6, 3), "relu", seed=seed)


def task(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(number)
    return torch.randn(20, 5, generator=rng), torch.randint(3, (20,), generator=rng)


def streamed(*arms: Arm, tasks: int = 5, epochs: int = 2, seed: int = 4) -> TaskStream:
    stream = TaskStream(arms, task, tasks, epochs, 8, seed, ("linear[12].weight",), "online_accuracy")
    done = list(stream.run())
    assert done == sorted(done)
    assert [k for k, d in enumerate(done) if d == 1] == [len(done) - 1]
    return stream


class Diary(Intervention):
    """Writes down what it was told."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def before_step(self) -> None:
        self.heard.append("before")

    def after_step(self) -> None:
        self.heard.append("after")

    def between_tasks(self) -> None:
        self.heard.append("between")


def test_arms_share_everything_but_what_they_differ_in() -> None:
    diary = Diary()
    arms = Arm("plain", plain, 0.01), Arm("told", plain, 0.01, lambda *_: diary), Arm("fresh", plain, 0.01, fresh=True)
    values = streamed(*arms, tasks=3).values
    for found in values.values():
        np.testing.assert_array_equal(found[0], found[1])
    assert diary.heard == (["before", "after"] * 3 * 2 + ["between"]) * 3
    plain_rms, _, fresh_rms = values["weight_rms"]
    assert plain_rms[:2] == approx(fresh_rms[:2], abs=0), "the first network is fresh"
    assert not np.isclose(plain_rms[2:], fresh_rms[2:]).any()


def test_accuracy_online_is_that_before_learning() -> None:
    """A network that hardly moves has one accuracy; the first epoch of one that memorises is worse than its end."""
    still = streamed(Arm("still", plain, 1e-12)).values
    np.testing.assert_array_equal(still["online_accuracy"], still["end_accuracy"])
    for number in range(1, 6):
        inputs, labels = task(number)
        right = (plain(4 + 1_000_003)(inputs).argmax(1) == labels).double().mean().item()
        assert still["end_accuracy"][0, number - 1] == approx(right)
    quick = streamed(Arm("quick", plain, 0.03), epochs=40).values
    assert (quick["end_accuracy"] > quick["online_accuracy"] + 0.02).all()


def test_the_tenths_are_means_with_their_errors_over_tasks() -> None:
    values = streamed(Arm("plain", plain, 0.01), tasks=31).values
    scores = values["online_accuracy"][0]
    for name, part in (("first_accuracy", scores[:3]), ("last_accuracy", scores[28:])):
        assert values[name][0] == approx(sum(part) / 3)
        error = math.sqrt(sum((s - sum(part) / 3) ** 2 for s in part) / 2 / 3)
        assert values[f"{name}_error"][0] == approx(error)


@pytest.mark.parametrize(("tasks", "wanted"), [(4, [0, 1, 2, 3, 4]), (21, [0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21])])
def test_signs_are_measured_at_the_ends_and_evenly_between(tasks: int, wanted: list[int]) -> None:
    assert checkpoints(tasks).tolist() == wanted


def test_signs_are_those_of_the_task_at_hand_by_hand() -> None:
    """Two of fourteen hidden units silenced; the rank from singular values; an intervention's hooks hear nothing."""
    net = plain(1)
    with torch.no_grad():
        net.linear1.weight[2], net.linear1.bias[2] = 0, -1
        net.linear2.weight[5], net.linear2.bias[5] = 0, -1
    optimizer = torch.optim.Adam(net.parameters())
    keep, inputs = ContinualBackprop(net, optimizer), task(1)[0]
    found = signs(net, plain(0), task(1))
    assert all(units.values is None for units in keep.layers)
    hidden = torch.relu(net.linear1(inputs))
    last = torch.relu(net.linear2(hidden)).detach().double().numpy()
    dead = [not h.any() for h in (*hidden.detach().numpy().T, *last.T)]
    assert sum(dead) >= 2
    assert found["dead_fraction"] == approx(sum(dead) / 14)
    share = np.linalg.svd(last, compute_uv=False)
    share = share[share > 1e-9] / share.sum()
    assert found["effective_rank"] == approx(math.exp(-(share * np.log(share)).sum()), rel=1e-5)
    every = torch.cat([p.detach().flatten() for p in net.parameters()])
    matrices = torch.cat([p.detach().flatten() for p in net.parameters() if p.ndim > 1])
    assert found["weight_mean"] == approx(every.abs().mean().item(), rel=1e-5)
    assert found["weight_rms"] == approx(matrices.square().mean().sqrt().item(), rel=1e-5)


def test_features_that_are_all_zero_have_rank_zero() -> None:
    net = plain(1)
    with torch.no_grad():
        net.linear2.weight[:], net.linear2.bias[:] = 0, -1
    found = signs(net, plain(0), task(1))
    assert (found["effective_rank"], found["effective_rank_error"]) == (0, 0)
    assert found["dead_fraction"] >= 6 / 14


def test_the_effective_rate_is_the_learning_rate_over_the_norm_of_the_named_weights() -> None:
    arm = Arm("plain", plain, 0.02)
    learner = arm.begin(3)
    norms = [m.weight.norm().item() for m in (learner.net.linear1, learner.net.linear2)]
    assert learner.effective_rate(("linear[12].weight",)) == approx(np.mean([0.02 / n for n in norms]), rel=1e-6)


def test_a_network_that_diverges_is_unknown_from_there_on() -> None:
    class Breaks(Intervention):
        def __init__(self, net: nn.Module) -> None:
            self.net, self.tasks = net, 0

        @torch.no_grad()
        def between_tasks(self) -> None:
            self.tasks += 1
            if self.tasks == 2:
                self.net.linear1.weight[0, 0] = math.nan

    values = streamed(Arm("breaks", plain, 0.01, lambda net, _: Breaks(net))).values
    for name in ("online_accuracy", "end_accuracy"):
        assert np.isfinite(values[name][0]).tolist() == [True, True, False, False, False]
    assert np.isfinite(values["effective_rank"][0]).tolist() == [True, True, True, False, False, False]
    assert math.isnan(values["last_accuracy"][0])


FEW = {"tasks": 4, "examples": 40, "batch": 16, "width": 12, "depth": 2}


@pytest.mark.parametrize(
    ("experiment", "builder", "diverging"),
    [
        (LossOfPlasticity(**FEW, arms=NEEDED), "dense", NEEDED),
        (NormalizeAndProject(**FEW, epochs=2), "dense", ("plain", "fresh")),
        (NormalizeAndProject(**FEW, epochs=2), "normalised_dense", ("layer norm", "project")),
    ],
    ids=["loss", "plain", "normalised"],
)
def test_arms_that_diverge_are_unknown_and_do_not_pass(
    experiment: Experiment, builder: str, diverging: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = getattr(task_stream, builder)

    def broken(*given: object, seed: int) -> nn.Module:
        net = build(*given, seed=seed)
        with torch.no_grad():
            net.linear1.weight[0, 0] = torch.nan
        return net

    monkeypatch.setattr(task_stream, builder, broken)
    data = experiment.run().data
    unknown = data["arm"].values[data.last_accuracy.isnull().values]
    assert tuple(unknown) == diverging
    assert not experiment.verdict(data).passed


def test_the_usual_arms_are_what_they_are_called() -> None:
    arms = task_stream.DigitNets(width=7, depth=2).arms(0.3)
    assert list(arms) == list(ROLES)
    for name, arm in arms.items():
        net = arm.build(0)
        assert [tuple(dict(net.named_parameters())[n].shape) for n in ("linear1.weight", "linear2.weight")] == [
            (7, 64),
            (7, 7),
        ]
        assert any(isinstance(m, nn.LayerNorm) for m in net.modules()) == (name in ("layer norm", "project"))
        assert (arm.rate, arm.fresh) == (0.3, name == "fresh")
