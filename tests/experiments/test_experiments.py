"""Experiments: verdicts on data written down, training that diverges, one seed of each, and the command line."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr

from workbench import catalog, cli
from workbench.experiments import lazy_to_rich, modular_addition
from workbench.experiments.arms import evaluation_steps
from workbench.experiments.experiment import Experiment, Verdict, judge
from workbench.experiments.lazy_to_rich import GrokkingLazyToRich
from workbench.experiments.modular_addition import GrokkingModularAddition
from workbench.zoo.transformer import Block, Transformer

QUICK = {
    GrokkingLazyToRich: GrokkingLazyToRich(arms=2, dimension=4, width=20, examples=12, steps=30),
    GrokkingModularAddition: GrokkingModularAddition(modulus=5, width=8, steps=20),
}
EXPERIMENTS = catalog.probes("nothing")


def test_every_probe_that_looks_at_nothing_is_an_experiment_and_the_other_way_round() -> None:
    assert set(QUICK) <= set(EXPERIMENTS.values())
    for cls in catalog.probes().values():
        assert issubclass(cls, Experiment) == (cls.looks_at == "nothing")


@pytest.mark.parametrize("cls", QUICK)
def test_a_tiny_run_gives_a_verdict_of_plain_values_at_every_moment(cls) -> None:
    seen: list[Verdict] = []
    reading = QUICK[cls].run(seed=1, on_reading=lambda r: seen.append(r.probe.verdict(r.data)))
    assert reading.done == 1
    for verdict in seen:
        assert type(verdict.passed) is bool
        assert verdict.words
        assert verdict.passed <= (verdict.statistic >= verdict.threshold)
        assert str(verdict).startswith(("passed: ", "failed: "))
    assert not seen[0].passed, "nothing is known yet"


NETS: tuple[modular_addition.Kind, ...] = ("quadratic", "relu", "transformer")


@pytest.mark.parametrize("net", NETS)
def test_each_net_learns_by_heart_and_tells_its_frequencies(net: modular_addition.Kind) -> None:
    made = GrokkingModularAddition(modulus=7, net=net, width=16, learning_rate=0.02, steps=60)
    reading = made.run(seed=3)
    assert reading.data.train_score.max() == 1, "half of 49 pairs"
    assert made.estimate(None).bytes > 4 * sum(p.numel() for p in made.build(0).parameters())
    torch.testing.assert_close(made.build(5).state_dict(), made.build(5).state_dict(), rtol=0, atol=0)
    assert reading.data.top_share.values == pytest.approx(1), "three frequencies, of which five are all"
    assert float(reading.data.gini[0]) == reading.summary["gini"]


@pytest.mark.parametrize("net", NETS)
def test_a_net_comes_with_its_recipe_unless_settings_say_otherwise(net: modular_addition.Kind) -> None:
    usual, other = GrokkingModularAddition(net=net), GrokkingModularAddition(net=net, width=20, learning_rate=0.1)
    assert (other.recipe.width, other.recipe.rate) == (20, 0.1)
    assert usual.recipe == modular_addition.RECIPES[net]
    first = next(m for m in usual.build(0).modules() if isinstance(m, torch.nn.Embedding))
    assert tuple(first.weight.shape) == (47, usual.recipe.width)


def test_the_transformer_is_the_one_that_is_described() -> None:
    block = GrokkingModularAddition(net="transformer", initial_scale=0.5).build(0)
    assert isinstance(block, Transformer)
    assert (len(block.blocks), block.places.shape[0], block.read) == (1, 2, "last")
    layer = block.blocks[0]
    assert isinstance(layer, Block)
    assert (layer.query.in_features // layer.head, layer.up.out_features, layer.down.in_features) == (4, 128, 128)
    assert block.embedding.weight.std().item() == pytest.approx(0.5, rel=0.05)
    with pytest.raises(ValueError, match="width=10 must be a multiple of 4"):
        GrokkingModularAddition(net="transformer", width=10)


@pytest.mark.parametrize("cls", QUICK)
def test_seeds_differ_and_calibration_is_not_judged(cls) -> None:
    first, second = (found.reading.data for found in judge(QUICK[cls], (0, 1)))
    assert not np.allclose(first.train_loss, second.train_loss, equal_nan=True)
    assert not set(cls.calibrated_on) & set(range(50)), "these are what people judge"


def delays(ratios: list[float], least: list[float], aligned: float = 0.2) -> xr.Dataset:
    errors = [0.1 if r == r else math.nan for r in ratios]
    held = {"delay_ratio": ratios, "delay_ratio_least": least, "delay_ratio_error": errors}
    held |= {"alignment_start": [0.1, 0.1, 0.1], "alignment_end": [0.4, 0.3, aligned]}
    return xr.Dataset({n: ("arm", v) for n, v in held.items()}, {"arm": [0.5, 1.0, 2.0]})


@pytest.mark.parametrize(
    ("ratios", "least", "passed", "statistic"),
    [
        ([1.5, 2, 6], [1.5, 2, 6], True, 4),
        ([1.5, 2, 1.6], [1.5, 2, 1.6], False, 1.6 / 1.5),
        ([1.5, 9, 6], [1.5, 9, 6], False, 4),
        ([1.5, 1.45, 6], [1.5, 1.45, 6], True, 4),
        ([1.5, 1.2, 6], [1.5, 1.2, 6], False, 4),
        ([3.0, 3, 4.5], [3.0, 3, 4.5], True, 1.5),
        ([3.1, 4, 62], [3.1, 4, 62], False, 20),
        ([1.0, 2, 2.9], [1.0, 2, 2.9], False, 2.9),
        ([1.5, 2, math.nan], [1.5, 2, 40], True, 40 / 1.5),
        ([1.5, 2, math.nan], [1.5, 2, 2.7], False, 1.8),
        ([math.nan, 2, 6], [40, 2, 6], False, math.nan),
        ([1.5, math.nan, math.nan], [1.5, math.nan, math.nan], False, math.nan),
    ],
)
def test_the_delay_must_grow_with_the_scale(ratios, least, passed, statistic) -> None:
    verdict = GrokkingLazyToRich(arms=3).verdict(delays(ratios, least))
    assert verdict.passed is passed
    assert verdict.statistic == pytest.approx(statistic, nan_ok=True)


@pytest.mark.parametrize(("aligned", "passed"), [(0.18, True), (0.17, False), (math.nan, False)])
def test_the_kernel_must_turn_towards_the_targets_at_each_scale(aligned: float, passed: bool) -> None:
    assert GrokkingLazyToRich(arms=3).verdict(delays([1.5, 2, 6], [1.5, 2, 6], aligned)).passed is passed


@pytest.mark.parametrize(
    ("net", "ratio", "control", "share", "passed"),
    [
        ("quadratic", 4, 0.1, 0.1, True),
        ("quadratic", 2, 0.1, 0.9, False),
        ("quadratic", 4, 0.9, 0.9, False),
        ("quadratic", math.nan, 0.1, 0.9, False),
        ("relu", 4, 0.1, 0.9, False),
        ("relu", 5, 0.1, 0.1, True),
        ("transformer", 4, 0.1, 0.61, True),
        ("transformer", 4, 0.1, 0.59, False),
        ("transformer", 4, 0.1, math.nan, False),
        ("transformer", 2, 0.1, 0.9, False),
        ("transformer", 4, 0.3, 0.9, False),
    ],
)
def test_only_weight_decay_may_generalise(net, ratio: float, control: float, share: float, passed: bool) -> None:
    scores = np.array([[0.1, 1.0], [control, math.nan]])
    data = xr.Dataset({"delay_ratio": ("arm", [ratio, math.nan]), "test_score": (("arm", "step"), scores)})
    data["top_share"] = ("arm", [share, 0.9])
    verdict = GrokkingModularAddition(net=net).verdict(data)
    assert verdict.passed is passed
    assert verdict.threshold == (5 if net == "relu" else 3)


def test_training_that_diverges_says_so_and_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    build = modular_addition.added_embeddings

    def broken(*given):
        net = build(*given)
        with torch.no_grad():
            net.readout.weight[0, 0] = math.nan
        return net

    monkeypatch.setattr(modular_addition, "added_embeddings", broken)
    reading = QUICK[GrokkingModularAddition].run()
    assert reading.data.test_score.isnull().all()
    assert not reading.probe.verdict(reading.data).passed
    monkeypatch.setattr(lazy_to_rich, "_rate", lambda *_: 1e30)
    reading = QUICK[GrokkingLazyToRich].run()
    assert not np.isfinite(reading.data.train_loss[-1, -1])
    assert not reading.probe.verdict(reading.data).passed


@pytest.mark.parametrize(("last", "per_decade"), [(1, 40), (2, 40), (1000, 20), (3000, 40)])
def test_evaluations_are_dense_enough(last: int, per_decade: int) -> None:
    steps = np.array(evaluation_steps(last, per_decade))
    assert (steps[0], steps[-1]) == (0, last)
    assert (np.diff(steps) > 0).all()
    assert (steps[2:] <= steps[1:-1] * 10 ** (1 / per_decade) + 1).all(), "to rounding"


def test_the_lazy_baseline_is_regression_with_the_kernel_written_down() -> None:
    data = GrokkingLazyToRich(arms=2, dimension=4, width=60, examples=40, steps=2).run(seed=2).data
    (x, y), (held_x, held_y) = lazy_to_rich.polynomial(4, 40, lazy_to_rich.TEST, 2)
    net = lazy_to_rich.scaled_sum(4, 60, 3.0, 0.5, 2 + 1_000_003)

    def features(inputs: torch.Tensor) -> torch.Tensor:
        inputs = inputs.double() / 2
        slopes = 1 + 0.5 * inputs @ net.hidden.weight.detach().double().T
        return (slopes[:, :, None] * inputs[:, None, :]).flatten(1)

    own, mixed = features(x) @ features(x).T, features(held_x) @ features(x).T
    losses = [
        (mixed @ torch.linalg.solve(own + ridge * own.trace() / 40 * torch.eye(40).double(), y.double()) - held_y)
        .square()
        .mean()
        .item()
        / 2
        for ridge in np.geomspace(1e-10, 100, 25)
    ]
    assert min(abs(data.kernel_test_loss.item() - loss) for loss in losses) < 1e-6, "one of the ridges"
    assert data.kernel_test_loss.item() < 0.8 * data.test_loss.values[0, 0]


def test_the_learning_rate_is_half_of_one_over_the_sharpness() -> None:
    data = GrokkingLazyToRich(arms=2, dimension=4, width=6, examples=12, steps=3).run(seed=2).data
    train, _ = lazy_to_rich.polynomial(4, 12, lazy_to_rich.TEST, 2)
    for rate, alpha in zip(data.learning_rate.values, data["arm"].values, strict=True):
        net = lazy_to_rich.scaled_sum(4, 6, float(alpha), 0.5, 2 + 1_000_003)
        rows = [torch.autograd.grad(o, net.hidden.weight, retain_graph=True)[0].flatten() for o in net(train[0])[:, 0]]
        largest = torch.linalg.eigvalsh(torch.stack(rows).double() @ torch.stack(rows).double().T)[-1].item() / 12
        assert rate == pytest.approx(0.5 / largest, rel=0.05)


@pytest.mark.parametrize("cls", [GrokkingLazyToRich, GrokkingModularAddition])
def test_the_effect_shows_on_one_seed(cls) -> None:
    (found,) = judge(cls(), [0])
    assert found.verdict.passed, str(found.verdict)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_effect_shows_on_five_seeds(name: str) -> None:
    failed = [f"seed {f.seed}: {f.verdict}" for f in judge(EXPERIMENTS[name](), range(5)) if not f.verdict.passed]
    assert not failed


def test_the_command_prints_a_line_for_each_seed(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--set", "modulus=5", "--set", "width=8", "--set", "steps=20"]
    assert cli.main(["experiment", "GrokkingModularAddition", "--seeds", "2", "--first", "7", *tiny]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:2]] == ["7", "8"]
    assert all("failed: " in line and "wanted at least 3" in line and " s " in line for line in lines[:2])
    assert lines[2].startswith("GrokkingModularAddition: 0 of 2 seeds passed; thresholds were set")
    assert cli.main(["experiment", "HessianSpectrum"]) == 2
    assert cli.main(["experiment", "GrokkingModularAddition", "--seeds", "0"]) == 2
    said = capsys.readouterr().err
    assert "is a probe and gives no verdict; the experiments are " in said
    assert "--seeds must be at least 1" in said
