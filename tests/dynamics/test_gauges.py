"""Gauges: each against plain loops or closed forms, and all of them against a training that must not notice."""

from __future__ import annotations

import copy
import math
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import workbench as wb
from workbench.dynamics import gauges
from workbench.dynamics.gauges.sharpness import _Lanczos
from workbench.dynamics.schedules import on_spike

DATA = (torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(12, 2), torch.arange(12) % 3)


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 3)).double()


def everything(**scaler: object) -> list[gauges.Gauge]:
    """Every gauge that a classifier has, at every second step."""
    kinds = [
        gauges.GradientNorm, gauges.WeightNorm, gauges.Distance, gauges.Updates, gauges.EffectiveRate,
        gauges.Sharpness, gauges.Evaluation, gauges.LogZ, gauges.DormantUnits,
    ]  # fmt: skip
    return [*(kind(every=2) for kind in kinds), gauges.NoiseScale(every=2, examples=4, **scaler)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, recorder: wb.Recorder | None = None) -> None:
    """Three micro-batches a step, clipped, with dropout and every global random state."""
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(3):
            rows = torch.randint(12, (4,))
            noise = float(np.random.default_rng(int(torch.randint(9, ()))).normal()) * random.random()
            loss = functional.cross_entropy(model(DATA[0][rows] + noise), DATA[1][rows])
            (loss / 3).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if recorder:
            recorder.step(train_loss=loss)


def hooks(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    own = [len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    modules = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    return [*own, *modules, len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)]


MAKERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.2, momentum=0.9, weight_decay=0.01),
    "adam": lambda ps: torch.optim.AdamW(ps, lr=0.02, amsgrad=True),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_training_is_bitwise_as_without_gauges(tmp_path: Path, maker: str) -> None:
    ends = []
    for recorded in (False, True):
        model = net()
        optimizer = MAKERS[maker](model.parameters())
        torch.manual_seed(1), random.seed(1)
        if recorded:
            adams = [gauges.CoordinateSpikes(2)] if maker == "adam" else []
            given = {"data": DATA, "loss": "cross_entropy", "gauges": [*everything(), *adams]}
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)  # a gauge that failed would say so
                with wb.Recorder(tmp_path, model, optimizer, every=3, **given) as rec:
                    train(model, optimizer, 9, rec)
        else:
            train(model, optimizer, 9)
        rest = torch.get_rng_state().numpy().tobytes(), str(random.getstate()), hooks(model, optimizer)
        ends.append((copy.deepcopy(model.state_dict()), str(optimizer.state_dict()), rest, model.training))
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())
    assert ends[0][1:] == ends[1][1:]
    table = wb.Trajectory.open(tmp_path).scalars
    assert len(table.columns) > 25
    seen = table.drop(columns=["train_loss", "wall_time", "recorder_seconds"])
    assert seen.iloc[2::2].notna().to_numpy()[1:].all()
    assert not seen.iloc[1::2].notna().to_numpy().any()


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def test_norms_and_updates_are_those_of_plain_loops(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5, weight_decay=0.1)
    kinds = (gauges.GradientNorm, gauges.WeightNorm, gauges.Distance)
    each = [kind(every=1, tensors=("0.*",)) for kind in kinds] + [
        gauges.Updates(1, ("3.weight",)),
        gauges.EffectiveRate(1),
    ]
    first, wanted, tensors = flat(model.parameters()), [], []
    with wb.Recorder(tmp_path, model, optimizer, every=100, gauges=each) as rec:
        for _ in range(5):
            optimizer.zero_grad()
            functional.cross_entropy(model(DATA[0]), DATA[1]).backward()
            old = {n: p.detach().clone() for n, p in model.named_parameters()}
            tensors.append([float(p.grad.norm()) for p in model.parameters()])
            gradient = flat([p.grad for p in model.parameters()])
            optimizer.step()
            new = {n: p.detach() for n, p in model.named_parameters()}
            rec.step()
            moved, theta = flat(new.values()) - flat(old.values()), flat(old.values())
            row = {"gradient_norm": gradient.norm(), "weight_norm": flat(new.values()).norm()}
            row |= {"distance": (flat(new.values()) - first).norm(), "update_norm": moved.norm()}
            row |= {"update_ratio": moved.norm() / theta.norm(), "learning_rate": 0.3}
            row["distance/0.bias"] = (new["0.bias"] - first[10:15]).norm()
            weights = [(old[n].reshape(-1), new[n].reshape(-1)) for n in ("0.weight", "3.weight")]
            turned = [torch.acos((a @ b) / (a.norm() * b.norm())) for a, b in weights]
            row["angular_update"], row["angular_update/3.weight"] = sum(turned) / 2, turned[1]
            row["radial_update"] = sum((b - a) @ a / (a @ a) for a, b in weights) / 2
            across = [(b - a) - a * ((b - a) @ a) / (a @ a) for a, b in weights]
            row["tangential_update"] = sum(x.norm() / a.norm() for x, (a, _) in zip(across, weights, strict=True)) / 2
            row["effective_rate"] = sum(0.3 / (b @ b) for _, b in weights) / 2
            wanted.append({name: float(value) for name, value in row.items()})
    table = wb.Trajectory.open(tmp_path).scalars
    for step, row in enumerate(wanted, 1):
        for name, value in row.items():
            assert table[name].loc[step] == pytest.approx(value, rel=1e-9), name
    assert math.isnan(table["gradient_spike"].loc[1])
    weights = np.array([0.99 ** (3 - s) for s in range(4)])
    means = (weights[:, None] * np.array(tensors[:4])).sum(0) / weights.sum()
    assert table["gradient_spike"].loc[5] == pytest.approx(max(np.array(tensors[4]) / means))


@pytest.mark.parametrize(("decay", "steps"), [(5e-4, 20), (0.5, 300)])
def test_scale_invariant_weights_turn_by_the_angle_of_their_equilibrium(
    tmp_path: Path, decay: float, steps: int
) -> None:
    """A loss of the direction alone: ‖g‖ = 1/‖w‖ across w, so that ‖w‖⁴ → η/(λ(2 - ηλ)); from there or from afar."""
    rate, model = 0.1, nn.Linear(2, 1, bias=False).double()
    settled = (rate / (decay * (2 - rate * decay))) ** 0.25
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0 if steps > 100 else settled, 0.0]], dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=decay)
    with wb.Recorder(tmp_path, model, optimizer, gauges=[gauges.Updates(1), gauges.WeightNorm(1)]) as rec:
        for _ in range(steps):
            optimizer.zero_grad()
            torch.atan2(model.weight[0, 1], model.weight[0, 0]).backward()
            optimizer.step()
            rec.step()
    last = wb.Trajectory.open(tmp_path).scalars.iloc[-1]
    angle = math.atan(math.sqrt(rate * decay * (2 - rate * decay)) / (1 - rate * decay))
    assert decay != 5e-4 or (angle, settled**4) == pytest.approx((0.01000004167, 100.0025001), rel=1e-9)
    assert last["angular_update"] == pytest.approx(angle, rel=1e-9)
    assert last["weight_norm"] == pytest.approx(settled, rel=1e-9)


@pytest.mark.parametrize("divided", [True, False])
@pytest.mark.parametrize("scaled", [1.0, 1024.0])
def test_the_noise_scale_of_four_known_gradients(tmp_path: Path, divided: bool, scaled: float) -> None:
    model, parts = nn.Linear(2, 1, bias=False).double(), [(2.0, 0.0), (2.0, 2.0), (0.0, 0.0), (4.0, 2.0)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Scaler:
        def get_scale(self) -> float:
            return scaled

    noise = gauges.NoiseScale(every=1, examples=1, scaler=Scaler())
    with wb.Recorder(tmp_path, model, optimizer, gauges=[noise]) as rec:
        for _ in range(3):
            optimizer.zero_grad()
            for g in parts:
                loss = (model.weight * torch.tensor(g, dtype=torch.float64)).sum()
                (scaled * loss / (4 if divided else 1)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            rec.step()
        optimizer.zero_grad()
        model(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
        optimizer.step()
        rec.step()
    table = wb.Trajectory.open(tmp_path).scalars
    unit = 1 if divided else 16
    assert table["gradient_square"].iloc[1:4].tolist() == pytest.approx([4 * unit] * 3)
    assert table["gradient_variance"].iloc[1:4].tolist() == pytest.approx([4 * unit] * 3)
    assert table["noise_scale"].iloc[1:4].tolist() == pytest.approx([1] * 3)
    assert math.isnan(table["noise_scale"].loc[4]), "one micro-batch says nothing"


def dense(model: nn.Module) -> Tensor:
    """The exact Hessian, by plain autograd over one flat vector."""
    named = dict(model.named_parameters())

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in named.values()])
        params = {n: v.view_as(p) for (n, p), v in zip(named.items(), parts, strict=True)}
        return functional.cross_entropy(torch.func.functional_call(model, params, DATA[0]), DATA[1])

    return torch.autograd.functional.hessian(loss, flat(named.values()))


def preconditioner(optimizer: torch.optim.Optimizer, model: nn.Module, step: int) -> Tensor:
    if isinstance(optimizer, torch.optim.SGD):
        return torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    square = flat([optimizer.state[p]["exp_avg_sq"] for p in model.parameters()])
    return (1 - 0.9**step) * ((square / (1 - 0.999**step)).sqrt() + 1e-8)


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (lambda ps: torch.optim.SGD(ps, lr=0.5), 2 / 0.5),
        (lambda ps: torch.optim.SGD(ps, lr=0.5, momentum=0.9), 2 * 1.9 / 0.5),
        (lambda ps: torch.optim.Adam(ps, lr=0.01), 38 / 0.01),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_sharpness_and_its_threshold_under_each_optimizer(tmp_path: Path, make, limit: float) -> None:
    model = net().eval()
    optimizer = make(model.parameters())
    sharp = gauges.Sharpness(every=3, tolerance=1e-4, limit=60)
    exact: dict[int, float] = {}
    given = {"data": DATA, "loss": "cross_entropy", "gauges": [sharp]}
    with wb.Recorder(tmp_path, model, optimizer, **given) as rec:
        for step in range(1, 10):
            optimizer.zero_grad()
            functional.cross_entropy(model(DATA[0]), DATA[1]).backward()
            optimizer.step()
            rec.step()
            root = preconditioner(optimizer, model, step).rsqrt()
            exact[step] = float(torch.linalg.eigvalsh(root[:, None] * dense(model) * root)[-1])
    table = wb.Trajectory.open(tmp_path).scalars
    for step in (3, 6, 9):
        row = table.loc[step]
        assert row["sharpness"] == pytest.approx(exact[step], rel=1e-4)
        assert abs(row["sharpness"] - exact[step]) <= row["sharpness_error"] + 1e-9 * exact[step]
        assert row["stability_threshold"] == pytest.approx(limit)
        assert row["stability"] == pytest.approx(exact[step] / limit, rel=1e-4)


@given(st.integers(1, 12), st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_each_ritz_value_lies_within_its_residual_of_an_eigenvalue(size: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = scale * (matrix + matrix.T)
    exact, run = torch.linalg.eigvalsh(matrix), _Lanczos(torch.randn(size, generator=generator, dtype=torch.float64))
    before = -math.inf
    while not run.ended:
        run.advance(matrix @ run.rows[-1])
        value, error = run.top()
        assert float((exact - value).abs().min()) <= error + 1e-9 * float(exact.abs().max())
        assert before - 1e-9 * scale <= value <= float(exact[-1]) + 1e-9 * float(exact.abs().max())
        before = value
    assert value == pytest.approx(float(exact[-1]), rel=1e-6, abs=1e-6 * scale)


class Attentive(nn.Module):
    """Attention whose scores are known, computed in one of three ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.scale = way, nn.Parameter(torch.tensor(2.0))
        self.mixed = nn.MultiheadAttention(4, 1, batch_first=True)
        with torch.no_grad():
            self.mixed.in_proj_weight.copy_(torch.eye(4).repeat(3, 1))
            self.mixed.in_proj_bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        q = self.scale * functional.one_hot(x, 4).to(self.scale.dtype)
        if self.way == "module":
            return self.mixed(q, q, q, need_weights=False)[0].mean(1)
        if self.way == "causal":  # the last key, which no other query may see, would score 50 times as much
            k = torch.cat([q[:, :-1], -50 * q[:, -1:]], 1)
            return functional.scaled_dot_product_attention(q[:, None], k[:, None], q[:, None], is_causal=True)[:, 0, 0]
        return (torch.softmax(q @ q.transpose(1, 2) / 2, -1) @ q).mean(1)


@pytest.mark.parametrize("way", ["module", "causal", "plain"])
def test_the_largest_attention_logit_however_it_is_computed(tmp_path: Path, way: str) -> None:
    model = Attentive(way).train(way == "causal")
    data = (torch.tensor([[0, 1, 1], [2, 3, 3]]), torch.tensor([0, 1]))
    given = {"data": data, "loss": "cross_entropy", "gauges": [gauges.AttentionLogits(every=1)]}
    with wb.Recorder(tmp_path, model, **given) as rec:
        rec.step()
        model.scale.data.fill_(-6.0)
        rec.step()
    found = wb.Trajectory.open(tmp_path).scalars["attention_logit_max"]
    assert found.iloc[1:].tolist() == pytest.approx([2.0, 18.0])
    with pytest.raises(ValueError, match="finds no attention"):
        wb.Recorder(tmp_path / "n", net(), **(given | {"data": DATA})).__enter__()


def test_log_z_and_dormant_units_of_nets_with_known_outputs(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 10)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model[0].bias.copy_(torch.tensor([-1.0, 1.0, 3.0]))
    data = (torch.randn(7, 2, dtype=torch.float64), torch.arange(7))
    each = [gauges.LogZ(1), gauges.DormantUnits(1), gauges.Evaluation(1, name="train")]
    with wb.Recorder(tmp_path, model, data=data, loss="cross_entropy", gauges=each) as rec:
        rec.step()
        model[2].bias.data.fill_(-7.0)
        model[0].bias.data[0] = 0.05
        rec.step()
    one, two = (wb.Trajectory.open(tmp_path).scalars.loc[k] for k in (1, 2))
    assert one["log_z"] == pytest.approx(math.log(10))
    assert 1e-4 * one["log_z_square"] == pytest.approx(5.301898e-4, rel=1e-6)
    assert (one["dormant_units"], one["dead_units"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert two["log_z_max"] == pytest.approx(7 - math.log(10))
    assert two["logit_mean"] == -7
    assert (two["dormant_units"], two["dead_units"]) == (0, 0), "0.05 over a mean of 1.35 is more than 0.025"
    assert one["train_loss"] == pytest.approx(math.log(10))
    assert two["train_accuracy"] == pytest.approx(1 / 7)


@pytest.mark.parametrize("flat", [True, False])
def test_log_z_of_one_logit_is_that_of_two_classes(tmp_path: Path, flat: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 1), *([nn.Flatten(0)] if flat else [])).double()
    y = (torch.arange(12) % 2).double()
    data = (DATA[0], y if flat else y[:, None])
    given = {"data": data, "loss": "binary_cross_entropy_with_logits", "gauges": [gauges.LogZ(1)]}
    with wb.Recorder(tmp_path, model, **given) as rec:
        rec.step()
    row = wb.Trajectory.open(tmp_path).scalars.loc[1]
    logits = model(DATA[0]).detach().reshape(-1).numpy()
    assert row["log_z"] == pytest.approx(np.log1p(np.exp(logits)).mean())
    assert row["log_z_max"] == pytest.approx(np.log1p(np.exp(logits)).max())
    assert row["logit_mean"] == pytest.approx(logits.mean() / 2)


def test_nan_is_recorded_and_training_and_gauges_go_on(tmp_path: Path) -> None:
    model = net().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = {"data": DATA, "loss": "cross_entropy", "gauges": everything()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with wb.Recorder(tmp_path, model, optimizer, every=100, **given) as rec:
            train(model, optimizer, 2, rec)
            kept = copy.deepcopy(model.state_dict())
            model[0].weight.data[0, 0] = math.nan
            train(model, optimizer, 2, rec)
            model.load_state_dict(kept)
            train(model, optimizer, 2, rec)
    table = wb.Trajectory.open(tmp_path).scalars
    for name in ("gradient_norm", "weight_norm", "sharpness", "log_z", "test_loss", "gradient_square", "distance"):
        assert table[name].iloc[[2, 4, 6]].notna().tolist() == [True, False, True], name
    assert table["gradient_spike"].loc[6] > 0
    assert table["noise_scale"].notna().loc[2] == table["noise_scale"].notna().loc[6]


class Idle(nn.Module):
    """Half of it takes no part: its weights and its gradients are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(2, 3).double(), nn.Linear(2, 3, bias=False).double()
        nn.init.zeros_(self.idle.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + 0 * self.idle(x)


def test_tensors_that_are_zero_blind_no_gauge(tmp_path: Path) -> None:
    model = Idle()
    both = []
    for part in (model, model.used):
        optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
        each = [gauges.GradientNorm(1), gauges.Updates(1), gauges.EffectiveRate(1)]
        torch.manual_seed(0), nn.init.normal_(model.used.weight), nn.init.zeros_(model.used.bias)
        with wb.Recorder(tmp_path / type(part).__name__, part, optimizer, gauges=each) as rec:
            for _ in range(3):
                optimizer.zero_grad()
                functional.cross_entropy(part(DATA[0]), DATA[1]).backward()
                optimizer.step()
                rec.step()
        both.append(wb.Trajectory.open(tmp_path / type(part).__name__).scalars)
    for name in ("gradient_spike", "angular_update", "radial_update", "tangential_update", "effective_rate"):
        assert both[0][name].iloc[2:].tolist() == pytest.approx(both[1][name].iloc[2:].tolist()), name
        assert np.isfinite(both[0][name].iloc[2:]).all(), name


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW], ids=["adam", "adamw"])
def test_coordinates_that_stand_above_their_second_moment(tmp_path: Path, make) -> None:
    """Gradients of ±1 in each coordinate but one spike of 100 at step 8, and a coordinate that never moves."""
    model = nn.Linear(3, 2, bias=False).double()
    optimizer = make(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    wanted, mean = {}, np.zeros(6)
    with wb.Recorder(tmp_path, model, optimizer, gauges=[gauges.CoordinateSpikes(1, ratio=1000)]) as rec:
        for step in range(1, 11):
            g = np.array([1.0, -1.0, 1.0, 0.0, 1.0 + step % 2, 100.0 if step == 8 else 1.0])
            if step > 1:
                ratios = [x * x / m * (1 - 0.99 ** (step - 1)) for x, m in zip(g, mean, strict=True) if m > 0]
                wanted[step] = np.mean(np.array(ratios) > 1000), max(ratios)
            mean = 0.99 * mean + 0.01 * g * g
            model.weight.grad = torch.from_numpy(g).reshape(2, 3)
            optimizer.step()
            rec.step()
    table = wb.Trajectory.open(tmp_path).scalars[["coordinate_spikes", "coordinate_spike_max"]]
    assert table.loc[1].isna().all()
    for step, row in wanted.items():
        assert table.loc[step].tolist() == pytest.approx(row, rel=1e-9), step
    assert table["coordinate_spikes"].loc[8] == pytest.approx(1 / 5), "that which never moved is left out"
    assert table["coordinate_spike_max"].loc[8] == pytest.approx(10_000)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="SGD keeps none"):
        wb.Recorder(tmp_path / "n", model, sgd, gauges=[gauges.CoordinateSpikes()]).__enter__()


def test_units_that_are_not_finite_are_not_counted_as_alive(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    given = {"data": DATA, "loss": "cross_entropy", "gauges": [gauges.DormantUnits(1)]}
    with wb.Recorder(tmp_path, model, **given) as rec:
        for value in (1.0, math.nan, math.inf):
            model[0].weight.data[0, 0] = value
            rec.step()
    table = wb.Trajectory.open(tmp_path).scalars
    for name in ("dormant_units", "dead_units"):
        assert table[name].notna().tolist() == [False, True, False, False], name


class Broken(gauges.Gauge):
    """A gauge that fails at its second reading, with a hook still on a parameter."""

    def start(self, training):
        class Meter(gauges.Meter):
            ahead, count, handle = True, 0, None

            def arm(self):
                self.handle = next(iter(training.parameters().values())).register_hook(lambda g: None)

            def read(self):
                self.count += 1
                return {"count": 1 / (2 - self.count)}

            def disarm(self):
                if self.handle:
                    self.handle.remove()

        return Meter()


def test_a_gauge_that_fails_is_left_out_and_training_goes_on(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.warns(RuntimeWarning, match=r"Broken failed and is left out from here on: ZeroDivisionError"),
        wb.Recorder(tmp_path, model, optimizer, gauges=[Broken(1), gauges.WeightNorm(1)]) as rec,
    ):
        train(model, optimizer, 4, rec)
    table = wb.Trajectory.open(tmp_path).scalars
    assert table["count"].notna().tolist() == [False, True, False, False, False]
    assert table["weight_norm"].notna().tolist() == [False, True, True, True, True]
    assert sum(hooks(model, optimizer)) == 0


@pytest.mark.parametrize(
    ("gauge", "words"),
    [
        (gauges.GradientNorm(), "GradientNorm needs the optimizer"),
        (gauges.Sharpness(), "Sharpness evaluates the model on examples: give them"),
        (gauges.WeightNorm(every="often"), "whole number of steps"),  # type: ignore[arg-type]
    ],
)
def test_what_a_gauge_lacks_is_said_before_training(tmp_path: Path, gauge: gauges.Gauge, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        wb.Recorder(tmp_path, net(), gauges=[gauge]).__enter__()
    with wb.Recorder(tmp_path, net()):
        pass


def test_mixed_precision_with_a_step_that_is_skipped(tmp_path: Path) -> None:
    ends = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = net().float()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        rec = wb.Recorder(
            tmp_path / "r", model, optimizer, data=(DATA[0].float(), DATA[1]), loss="cross_entropy",
            gauges=[*everything(scaler=scaler), gauges.GradientNorm(1)] if recorded else [],
        ) if recorded else None  # fmt: skip
        grads = []
        if rec:
            rec.__enter__()
        for step in range(1, 7):
            optimizer.zero_grad()
            for _ in range(2):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = functional.cross_entropy(model(DATA[0].float()), DATA[1])
                scaler.scale(loss / 2 * (math.inf if step == 4 else 1)).backward()
            scaler.unscale_(optimizer)
            grads.append(float(flat([p.grad for p in model.parameters()]).norm()))
            scaler.step(optimizer)
            scaler.update()
            if rec:
                rec.step(loss=loss)
        if rec:
            rec.__exit__(None, None, None)
            table = wb.Trajectory.open(tmp_path / "r").scalars
            assert table["gradient_norm"].notna().tolist() == [False, True, True, True, False, True, True]
            assert table["gradient_norm"].dropna().tolist() == pytest.approx([g for i, g in enumerate(grads) if i != 3])
            assert table["gradient_square"].notna().tolist() == [False, False, True, False, False, False, True]
            both = table["gradient_square"] + table["gradient_variance"] / 8  # = ‖g‖² of both micro-batches together
            assert both.loc[6] == pytest.approx(grads[5] ** 2, rel=1e-4)
        ends.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_compiled_model_and_a_library_wrapped_optimizer_are_looked_through(tmp_path: Path) -> None:
    model = net()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Wrapper:
        def __init__(self) -> None:
            self.optimizer = optimizer

    given = {"data": DATA, "loss": "cross_entropy", "gauges": everything()}
    with wb.Recorder(tmp_path, compiled, Wrapper(), **given) as rec:
        train(compiled, optimizer, 4, rec)
    table = wb.Trajectory.open(tmp_path).scalars
    for name in ("gradient_norm", "sharpness", "noise_scale", "dormant_units"):
        assert name in table, name
    assert table["update_norm"].notna().tolist() == [False, False, True, False, True]


def test_gauges_follow_events_and_continue_a_record_from_its_first_weights(tmp_path: Path) -> None:
    model = nn.Linear(2, 1).double()
    gauge = gauges.Distance(every=on_spike("loss"))
    start = flat(model.parameters()).clone()
    for _ in range(2):
        with wb.Recorder(tmp_path, model, gauges=[gauge]) as rec:
            for step in range(1, 31):
                with torch.no_grad():
                    model.weight += 1
                rec.step(loss=9.0 if step == 25 else 1.0 + step % 2)
    found = wb.Trajectory.open(tmp_path).scalars["distance"].dropna()
    assert found.index.tolist() == [25, 55]
    assert found.tolist() == pytest.approx([25 * math.sqrt(2), 55 * math.sqrt(2)])
    assert float((flat(model.parameters()) - start).norm()) == pytest.approx(60 * math.sqrt(2))


def test_what_is_trained_may_change_between_steps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer, sizes = torch.optim.SGD(model.parameters(), lr=0.1), []
    with wb.Recorder(tmp_path, model, optimizer, gauges=gauges.defaults(1)) as recorder:
        for step in range(4):
            if step == 2:
                model[0].requires_grad_(False)
            optimizer.zero_grad()
            model(torch.ones(5, 3)).square().mean().backward()
            optimizer.step()
            recorder.step()
            kept = [p for p in model.parameters() if p.requires_grad]
            sizes.append(float(torch.cat([p.detach().flatten() for p in kept]).norm()))
    assert wb.Trajectory.open(tmp_path).scalars["weight_norm"].dropna().tolist() == pytest.approx(sizes)
