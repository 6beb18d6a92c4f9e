"""Gradient noise: against plain loops over examples, known populations, and what must stay undefined."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional

from workbench.probes.gradient_noise import GradientNoise
from workbench.subject import Subject


class Linear(nn.Module):
    """w · x for one output."""

    def __init__(self, weight: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight)[:, None]


def summed(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient is the example itself."""
    return outputs[:, 0] + 0 * targets[:, 0]


def of_rows(rows: list[list[float]]) -> Subject:
    x = torch.tensor(rows, dtype=torch.float64)
    return Subject(Linear([0.3, 0.4]), (x, torch.zeros(len(rows), 1).double()), summed, reduction="none")


def test_four_gradients() -> None:
    data = GradientNoise().run(of_rows([[2, 0], [2, 2], [0, 0], [4, 2]])).data
    assert float(data.noise_trace) == pytest.approx(4)
    assert float(data.gradient_square) == pytest.approx(4)
    assert float(data.diversity) == pytest.approx(0.4)
    assert float(data.diversity_bound) == pytest.approx(1.6)
    assert float(data.parameter_snr) == pytest.approx((1.5 + 0.75) / 2 - 1 / 4)
    assert float(data.snr) == pytest.approx(1.0)


def test_a_parameter_without_variance_is_left_out_and_counted() -> None:
    data = GradientNoise().run(of_rows([[1, 0], [1, 2], [1, 4]])).data
    assert float(data.constant) == 1
    assert float(data.parameter_snr) == pytest.approx(2**2 / 4 - 1 / 3)


@pytest.fixture(scope="module")
def net() -> Subject:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(37, 4).double()
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight=weights)
    return Subject(model, (x, (torch.arange(37) % 7 == 0) * 2), loss, batch_size=5)


def plain(subject: Subject) -> np.ndarray:
    """Every example's gradient of the weighted loss by itself, (n, P), scaled so that the mean is that of the loss."""
    params = {k: v.clone().requires_grad_() for k, v in subject.params.items()}
    weights, rows = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), []
    batch = next(iter(subject.batches(1000)))
    for x, y in zip(batch.args[0], batch.targets, strict=True):
        hidden = torch.tanh(x @ params["0.weight"].T + params["0.bias"])
        out = hidden @ params["2.weight"].T + params["2.bias"]
        loss = weights[y] * functional.cross_entropy(out[None], y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(params.values()))]).numpy())
    return np.array(rows) * len(rows) / weights[batch.targets].sum().item()


def test_layers_and_total_are_those_of_a_loop(net: Subject) -> None:
    data, rows = GradientNoise().run(net).data, plain(net)
    for name, part in (("0", rows[:, :30]), ("2", rows[:, 30:])):
        trace = part.var(axis=0, ddof=1).sum()
        square = (part.mean(0) ** 2).sum() - trace / 37
        at = data.sel(layer=name)
        assert float(at.layer_noise_trace) == pytest.approx(trace)
        assert float(at.layer_gradient_square) == pytest.approx(square)
        ratio = (part.mean(0) ** 2 / part.var(axis=0, ddof=1)).mean() - 1 / 37
        assert float(at.layer_parameter_snr) == pytest.approx(ratio)
    assert float(data.noise_trace) == pytest.approx(rows.var(axis=0, ddof=1).sum())
    assert float(data.diversity) == pytest.approx((rows**2).sum() / (rows.sum(0) ** 2).sum())
    assert float(data.noise_scale_low) < float(data.noise_scale) < float(data.noise_scale_high)


def test_batches_give_the_same_on_average(net: Subject) -> None:
    rows = plain(net)[:36]
    part = net.selected(range(36))
    scale = 36 / float(part.total_weight) * float(net.total_weight) / 37
    trace = (rows * scale).var(axis=0, ddof=1).sum()
    found = [float(GradientNoise(batch=4).run(part, seed=s).data.noise_trace) for s in range(12)]
    assert np.mean(found) == pytest.approx(trace, abs=4 * np.std(found) / np.sqrt(12))
    assert np.std(found) > 0
    assert np.isnan(float(GradientNoise(batch=4).run(part).data.diversity))


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_a_population_whose_noise_scale_is_known(noise: float) -> None:
    """x ~ N(0, I_d), loss ½ (w·x - y)², y ~ N(0, s²): B = ((d + 1) ‖w‖² + d s²)/‖w‖²."""
    rng, weight = np.random.default_rng(3), [0.6, -0.8, 0.5, 0.0]
    x = torch.from_numpy(rng.normal(size=(20_000, 4)))
    subject = Subject(
        Linear(weight), (x, noise * torch.from_numpy(rng.normal(size=(20_000, 1)))), "half_mse", max_examples=None
    )
    data = GradientNoise(examples=20_000, batch=50).run(subject).data
    square = float(np.square(weight).sum())
    wanted = (5 * square + 4 * noise**2) / square
    assert float(data.noise_scale_low) < wanted < float(data.noise_scale_high)
    assert float(data.noise_scale_high) < 1.3 * float(data.noise_scale_low), "and it is known well"


def test_batch_statistics_need_batches() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    data = (torch.randn(24, 4).double(), torch.arange(24) % 3)
    subject = Subject(model, data, norm="batch", batch_size=4)
    with pytest.raises(ValueError, match="BatchNorm"):
        GradientNoise().run(subject)
    found = GradientNoise(batch=4).run(subject)
    assert found.converged
    assert float(found.data.gradients) == 6
    with pytest.raises(ValueError, match="Give more examples or a smaller batch"):
        GradientNoise(batch=12).run(subject)


def test_a_gradient_out_of_reach_is_undefined_with_a_bound() -> None:
    rng = np.random.default_rng(0)
    reading = GradientNoise().run(of_rows((rng.normal(size=(50, 2))).tolist()))
    assert np.isnan(float(reading.data.noise_scale))
    assert not bool(reading.data.resolved)
    assert float(reading.data.noise_scale_low) > 5
    assert any("undefined" in note for note in reading.notes)


def stepped(kind: str) -> Subject:
    """A net whose optimizer has two groups and has taken a few steps on its own batches."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(36, 4).double(), torch.arange(36) % 3
    groups = [{"params": model[0].parameters(), "lr": 0.03}, {"params": model[2].parameters(), "lr": 0.01}]
    optimizer = {
        "Adam": lambda: torch.optim.Adam(groups, betas=(0.8, 0.95)),
        "SGD": lambda: torch.optim.SGD(groups, lr=0.1),
    }[kind]()
    for rows in torch.arange(36).split(9):
        optimizer.zero_grad()
        functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return Subject(model, (x, y), "cross_entropy", optimizer=optimizer, batch_size=5)


@pytest.mark.parametrize("kind", ["Adam", "SGD"])
def test_preconditioned_noise_is_that_of_the_optimizers_steps(kind: str) -> None:
    """tr(ηP⁻¹Σ) and GᵀηP⁻¹G from a loop over examples, with P written out from the optimizer's state."""
    subject = stepped(kind)
    model, optimizer = subject.module, subject.optimizer
    params, batch = list(model.parameters()), next(iter(subject.batches(1000)))
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(functional.cross_entropy(model(x[None]), y[None]), params)])
        for x, y in zip(batch.args[0], batch.targets, strict=True)
    ]
    inverse = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            root = (state["exp_avg_sq"] / (1 - 0.95**4)).sqrt() + 1e-8 if kind == "Adam" else torch.ones_like(p)
            inverse.append((group["lr"] / (root * ((1 - 0.8**4) if kind == "Adam" else 1))).flatten())
    g, scale = torch.stack(rows).numpy(), torch.cat(inverse).numpy()
    trace = (g.var(axis=0, ddof=1) * scale).sum()
    square = (g.mean(0) ** 2 * scale).sum() - trace / 36
    data = GradientNoise(preconditioned=True).run(subject).data
    assert float(data.noise_trace) == pytest.approx(trace, rel=1e-6)
    assert float(data.gradient_square) == pytest.approx(square, rel=1e-6)
    assert float(data.snr) == pytest.approx(square / trace, rel=1e-6)
    assert float(data.layer_noise_trace[1]) == pytest.approx((g.var(axis=0, ddof=1) * scale)[30:].sum(), rel=1e-6)
    plain = GradientNoise().run(subject).data
    assert float(data.parameter_snr) == pytest.approx(float(plain.parameter_snr)), "ratios by parameter know no scale"
    assert float(data.snr) != pytest.approx(float(plain.snr), rel=0.01)
    pairs = GradientNoise(batch=2, preconditioned=True).run(subject)
    assert float(pairs.data.noise_trace) == pytest.approx(trace, rel=0.5)
    assert any("preconditioned by" in note for note in pairs.notes)


def test_one_learning_rate_alone_leaves_the_noise_scale_as_it_is(net: Subject) -> None:
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.25)
    same = Subject(net.module, (torch.randn(37, 4).double(), torch.arange(37) % 3), optimizer=optimizer)
    found, plain = (GradientNoise(preconditioned=p).run(same).data for p in (True, False))
    assert float(found.snr) == pytest.approx(float(plain.snr))
    assert float(found.gradient_square) == pytest.approx(0.25 * float(plain.gradient_square))
    assert float(found.layer_snr[0]) == pytest.approx(float(plain.layer_snr[0]))


def test_the_optimizers_state_decides_what_a_stored_reading_answers(net: Subject) -> None:
    subject = stepped("Adam")
    probe, before = GradientNoise(preconditioned=True), GradientNoise(preconditioned=True).context(subject)
    subject.optimizer.param_groups[0]["lr"] = 0.5
    assert probe.context(subject) != before
    assert GradientNoise().context(subject) == ""
    with pytest.raises(ValueError, match="has no optimizer"):
        probe.run(net)


@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_curvature_weights_directions(name: str) -> None:
    """tr(HΣ) and GᵀHG from all gradients and the whole matrix, for the Hessian by plain autograd."""
    subject = stepped("SGD")
    batch, flat = next(iter(subject.batches(1000))), subject.flatten(subject.params)

    def losses(vector: torch.Tensor) -> torch.Tensor:
        out = torch.func.functional_call(subject.module, subject.unflatten(vector), (batch.args[0],))
        return functional.cross_entropy(out, batch.targets, reduction="none")

    rows = torch.autograd.functional.jacobian(losses, flat)
    matrix = torch.autograd.functional.hessian(lambda v: losses(v).mean(), flat)
    if name == "ggn":
        out = subject.module(batch.args[0])
        slopes = torch.autograd.functional.jacobian(
            lambda v: torch.func.functional_call(subject.module, subject.unflatten(v), (batch.args[0],)), flat
        )
        p = out.detach().softmax(1)
        bend = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        matrix = torch.einsum("nca,ncd,ndb->ab", slopes, bend, slopes) / len(p)
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / 35
    trace = (matrix @ covariance).trace().item()
    square = (mean @ matrix @ mean).item() - trace / 36
    data = GradientNoise(curvature=name).run(subject).data
    assert float(data.noise_trace) == pytest.approx(trace)
    assert float(data.gradient_square) == pytest.approx(square)
    assert float(data.snr) == pytest.approx(square / trace)
    assert float(data.layer_noise_trace.sum()) == pytest.approx(trace)
    assert float(data.layer_gradient_square.sum()) == pytest.approx(square)
    assert float(data.gradient_norm) == pytest.approx(mean.norm().item())
    without = [torch.cat([rows[:k], rows[k + 1 :]]) for k in range(36)]
    left_out = []
    for part in without:
        spread = ((part - part.mean(0)) @ matrix * (part - part.mean(0))).sum().item() / 34
        left_out.append(((part.mean(0) @ matrix @ part.mean(0)).item() - spread / 35) / spread)
    deviation = np.std(left_out, ddof=1) * 35 / 6
    assert float(data.snr_error) == pytest.approx(deviation * stats.t.ppf(0.975, 35)), "the jackknife, by leaving out"
    assert np.isnan(float(data.diversity))


def test_where_the_loss_bends_down_the_noise_scale_is_undefined() -> None:
    """Loss -(w·x)²/2 has Hessian -E[xxᵀ]: noise lowers it, and there is no batch size to be had."""
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 2)))

    def downward(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -outputs[:, 0].square() / 2 + 0 * targets[:, 0]

    subject = Subject(Linear([0.3, 0.4]), (rows, torch.zeros(40, 1).double()), downward, reduction="none")
    reading = GradientNoise(curvature="hessian").run(subject)
    gradients = -(rows @ subject.flatten(subject.params))[:, None] * rows
    hessian = -rows.T @ rows / 40
    assert float(reading.data.noise_trace) == pytest.approx((hessian @ torch.cov(gradients.T)).trace().item())
    assert float(reading.data.noise_trace) < 0
    assert np.isnan(float(reading.data.noise_scale))
    assert any("undefined" in note for note in reading.notes)
    with pytest.raises(ValueError, match="choose one"):
        GradientNoise(curvature="ggn", preconditioned=True)
