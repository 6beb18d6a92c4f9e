"""Neural collapse against a dense pseudo-inverse written separately, and against closed forms."""

import architectures
import numpy as np
import pytest
import torch
from pytest import approx
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from workbench.probes.collapse import NeuralCollapse
from workbench.subject import Subject


def simplex() -> np.ndarray:
    return np.sqrt(4 / 3) * (np.eye(4) - 0.25)


def reference(features: np.ndarray, labels: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> dict[str, float]:
    """NC1 to NC4 with d x d matrices and NumPy's pinv: the textbook way, for small d."""
    classes = np.unique(labels)
    means = np.stack([features[labels == c].mean(0) for c in classes])
    centred = means - means.mean(0)
    within = sum(
        (features[labels == c] - m).T @ (features[labels == c] - m) for c, m in zip(classes, means, strict=True)
    )
    within, between = within / len(features), centred.T @ centred / len(classes)
    inverse = np.linalg.pinv(between, rcond=1e-10, hermitian=True)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    off = ~np.eye(len(classes), dtype=bool)
    lengths = np.linalg.norm(centred, axis=1)
    rows = weight[classes]
    nearest = classes[((features[:, None] - means[None]) ** 2).sum(2).argmin(1)]
    return {
        "nc1": np.trace(within @ inverse) / len(classes),
        "nc1_ratio": np.trace(within) / np.trace(between),
        "nc2_equinorm": lengths.std() / lengths.mean(),
        "nc2_equiangle": np.abs((unit @ unit.T)[off] + 1 / (len(classes) - 1)).mean(),
        "nc3": ((rows / np.linalg.norm(rows) - centred / np.linalg.norm(centred)) ** 2).sum(),
        "nc4": (nearest != (features @ weight.T + bias).argmax(1)).mean(),
    }


def trained(labels: torch.Tensor, inputs: torch.Tensor, steps: int = 60) -> nn.Sequential:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    return net


@pytest.fixture
def blobs() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 70)
    return torch.from_numpy(rng.normal(size=(70, 6)) + 2 * np.eye(4, 6)[labels]), torch.from_numpy(labels)


@pytest.mark.parametrize("batch_size", [70, 64, 7])
def test_equals_the_dense_reference(blobs, batch_size):
    inputs, labels = blobs
    net = trained(labels, inputs)
    data = NeuralCollapse().run(Subject(net, blobs, batch_size=batch_size)).data
    features = net[:2](inputs).detach().numpy()
    want = reference(features, labels.numpy(), net[2].weight.detach().numpy(), net[2].bias.detach().numpy())
    assert {k: float(data[k]) for k in want} == approx(want, rel=1e-9)


def test_imbalanced_and_absent_classes_use_the_present_ones(blobs):
    inputs, labels = blobs
    kept = (labels != 2) & ((labels != 1) | (torch.arange(70) % 3 == 0))
    net = trained(labels, inputs)
    reading = NeuralCollapse().run(Subject(net, (inputs[kept], labels[kept])))
    features = net[:2](inputs[kept]).detach().numpy()
    want = reference(features, labels[kept].numpy(), net[2].weight.detach().numpy(), net[2].bias.detach().numpy())
    assert {k: float(reading.data[k]) for k in want} == approx(want, rel=1e-9)
    assert any("class 2" in note for note in reading.notes)
    assert reading.summary["missing_classes"] == 1
    assert np.isnan(reading.data.class_norm.values[2])


@pytest.mark.parametrize(("inside", "nc1"), [(True, 0.0075), (False, 0.0)])
def test_simplex_with_small_noise_has_the_closed_form(inside, nc1):
    means = np.pad(simplex(), ((0, 0), (0, 1)))
    step = 0.1 * (means[0] / np.linalg.norm(means[0]) if inside else np.eye(5)[4])
    features = np.concatenate([means + step, means - step])
    head = nn.Linear(5, 4).double()
    head.weight.data = torch.from_numpy(2 * means)
    head.bias.data.zero_()
    labels = torch.arange(4).repeat(2)
    data = NeuralCollapse().run(Subject(nn.Sequential(nn.Identity(), head), (torch.from_numpy(features), labels))).data
    assert float(data.nc1) == approx(nc1, abs=1e-12)
    assert float(data.nc1_ratio) == approx(0.01)
    assert float(data.cdnv) == approx(0.00375)
    assert float(data.nc3) == approx(0, abs=1e-12)
    assert float(data.nc4) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", list(architectures.SMALL))
def test_every_architecture_equals_the_dense_reference(name: str, dtype: torch.dtype):
    net = architectures.small(name)
    inputs, labels = net.data
    head = [m for m in net.model.modules() if isinstance(m, nn.Linear)][-1]
    caught: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda module, given, output: caught.append(given[0]))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        net.model(inputs)
    hook.remove()
    features = caught[0].reshape(-1, caught[0].shape[-1]).numpy()
    bias = np.zeros(len(head.weight)) if head.bias is None else head.bias.detach().numpy()
    want = reference(features, labels.flatten().numpy(), head.weight.detach().numpy(), bias)
    reading = NeuralCollapse().run(Subject(net.model, net.data, dtype=dtype))
    narrow = features.shape[1] < len(np.unique(labels)) - 1
    assert any("span" in note for note in reading.notes) == narrow
    assert {k: float(reading.data[k]) for k in want} == approx(want, rel=1e-7 if dtype == torch.float64 else 1e-3)


def test_a_large_offset_does_not_cancel(blobs):
    inputs, labels = blobs
    net = trained(labels, inputs)
    with torch.no_grad():
        net[2].bias -= net[2].weight.sum(1) * 1e4
    shifted = nn.Sequential(net[0], net[1], Shift(1e4), net[2])
    plain = NeuralCollapse().run(Subject(net, blobs)).data
    far = NeuralCollapse().run(Subject(shifted, blobs)).data
    assert float(far.nc1) == approx(float(plain.nc1), rel=1e-6)


class Shift(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.by


class Tokens(nn.Module):
    """A language-model-like net: embedding, mixing, a head over the vocabulary at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.embed(x))))


def test_tokens_count_as_examples_and_ignored_ones_do_not():
    torch.manual_seed(0)
    net = Tokens().double()
    x = torch.randint(0, 5, (12, 6))
    y = (x + 1) % 5
    y[:, 0] = -100
    data = NeuralCollapse().run(Subject(net, (x, y))).data
    features = torch.tanh(net.mix(net.embed(x)))[:, 1:].reshape(-1, 8).detach().numpy()
    want = reference(features, y[:, 1:].flatten().numpy(), net.head.weight.detach().numpy(), np.zeros(5))
    assert int(data.class_count.sum()) == 60
    assert float(data.nc2_equiangle) == approx(want["nc2_equiangle"], rel=1e-9)
    assert float(data.nc3) == approx(want["nc3"], rel=1e-9)


def test_one_class_is_unknown_not_zero(blobs):
    inputs, labels = blobs
    kept = labels == 1
    reading = NeuralCollapse().run(Subject(trained(labels, inputs), (inputs[kept], labels[kept])))
    assert np.isnan(float(reading.data.nc1))
    assert not reading.converged


def test_a_layer_by_name_and_a_wrong_name(blobs):
    inputs, labels = blobs
    net = trained(labels, inputs)
    inner = NeuralCollapse(layer="0").run(Subject(net, blobs)).data
    features = net[:1](inputs).detach().numpy()
    want = reference(features, labels.numpy(), np.eye(4, 12), np.zeros(4))
    assert float(inner.nc1) == approx(want["nc1"], rel=1e-9)
    assert np.isnan(float(inner.nc3))
    with pytest.raises(ValueError, match="no layer 'nope'"):
        NeuralCollapse(layer="nope").run(Subject(net, blobs))


def test_a_network_without_a_final_linear_layer_asks_for_one(blobs):
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    with pytest.raises(ValueError, match="name a layer"):
        NeuralCollapse().run(Subject(Functional(), blobs))


def test_errors_come_from_leaving_groups_of_examples_out(blobs):
    inputs, labels = blobs
    net = trained(labels, inputs)
    data = NeuralCollapse(groups=5).run(Subject(net, blobs, batch_size=32)).data
    features, numbers = net[:2](inputs).detach().numpy(), labels.numpy()
    weight, bias = net[2].weight.detach().numpy(), net[2].bias.detach().numpy()
    kept = [np.arange(70) % 5 != g for g in range(5)]
    again = [reference(features[i], numbers[i], weight, bias) for i in kept]
    for name in again[0]:
        values = np.array([a[name] for a in again])
        error = np.sqrt(4 / 5 * ((values - values.mean()) ** 2).sum())
        assert float(data[f"{name}_error"]) == approx(error, rel=1e-7)
    bare = NeuralCollapse(groups=0).run(Subject(net, blobs)).data
    assert float(bare.nc1) == approx(float(data.nc1))
    assert np.isnan(float(bare.nc1_error))


def test_a_class_that_one_group_holds_alone_has_no_errors_but_all_values(blobs):
    inputs, labels = blobs
    rare = (labels != 3) | (torch.arange(70) == int((labels == 3).nonzero()[0]))
    data = NeuralCollapse().run(Subject(trained(labels, inputs), (inputs[rare], labels[rare]))).data
    assert np.isfinite(float(data.nc1))
    assert np.isnan(float(data.nc1_error))


def test_held_out_examples_have_their_own_means_and_the_nearest_of_training(blobs):
    inputs, labels = blobs
    net, rng = trained(labels, inputs), np.random.default_rng(5)
    numbers = rng.integers(0, 4, 40)
    more = torch.from_numpy(rng.normal(size=(40, 6)) + 2 * np.eye(4, 6)[numbers])
    data = NeuralCollapse().run(Subject(net, blobs, held_out=(more, torch.from_numpy(numbers)))).data
    features, weight, bias = net[:2](more).detach().numpy(), *(p.detach().numpy() for p in net[2].parameters())
    want = reference(features, numbers, weight, bias)
    means = np.stack([net[:2](inputs[labels == c]).detach().numpy().mean(0) for c in range(4)])
    nearest = ((features[:, None] - means[None]) ** 2).sum(2).argmin(1)
    want["nc4"] = (nearest != (features @ weight.T + bias).argmax(1)).mean()
    assert {name: float(data[f"held_out_{name}"]) for name in want} == approx(want, rel=1e-9)
    assert np.isfinite(float(data.held_out_nc1_error))


def test_nc5_is_the_angle_with_examples_of_no_class():
    """Classes on three axes, and a fourth direction that no class has."""
    net, corner = nn.Sequential(nn.Identity(), nn.Linear(4, 3)).double(), torch.eye(4, dtype=torch.float64)
    labels = torch.arange(12) % 3
    for outside, want in ((corner[3], 0.0), (corner[0], 1 / 3), (corner[:3].sum(0), 1 / 3**0.5)):
        held = (outside.repeat(10, 1), torch.zeros(10, dtype=torch.int64))
        reading = NeuralCollapse(held_out="outside").run(Subject(net, (corner[labels], labels), held_out=held))
        assert float(reading.data.nc5) == approx(want, abs=1e-12)
        assert float(reading.data.nc5_error) == approx(0, abs=1e-12)
        assert np.isnan(float(reading.data.held_out_nc1))


def test_classes_that_have_merged_are_named(blobs):
    inputs, labels = blobs
    net = trained(labels, inputs)
    with torch.no_grad():
        inputs = torch.where((labels == 1)[:, None], inputs[:1], inputs)
        inputs = torch.where((labels == 2)[:, None], inputs[:1], inputs)
    reading = NeuralCollapse().run(Subject(net, (inputs, labels)))
    assert any("classes 1 and 2 are the same" in note for note in reading.notes)
    assert any("span 2 of 3" in note for note in reading.notes)
    assert float(reading.data.cdnv) > 1e6


def test_a_network_that_gives_all_examples_one_feature_has_no_nc1(blobs):
    inputs, labels = blobs
    net = trained(labels, inputs)
    with torch.no_grad():
        net[0].weight.zero_()
    reading = NeuralCollapse().run(Subject(net, blobs))
    assert np.isnan(float(reading.data.nc1)), "rounding was inverted"
    assert any("span 0 of 3" in note for note in reading.notes)


def test_features_near_these_contract_as_gradient_descent_on_them_says() -> None:
    """The loss with ½ λ ‖H‖² and ½ β ‖H - H_0‖², minimised over the features of all examples by L-BFGS."""
    rng = torch.Generator().manual_seed(3)
    h0, y = (torch.randn(9, k, generator=rng, dtype=torch.float64) for k in (4, 2))
    labels = torch.arange(9) % 2
    y = torch.eye(2, dtype=torch.float64)[labels]
    net = nn.Sequential(nn.Identity(), nn.Linear(4, 2)).double()
    decay, beta, h = 0.02, 0.05, h0.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([h], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (net(h) - y).square().mean() + decay / 2 * h.square().sum() + beta / 2 * (h - h0).square().sum()
        loss.backward(inputs=[h])
        return loss

    optimizer.step(closure)
    probe = NeuralCollapse(groups=0, feature_decay=decay, proximity=beta)
    found = probe.run(Subject(net, (h0, y), "mse")).data.contraction.values
    basis = torch.linalg.svd(net[1].weight.detach())[2]
    before, after = (
        (x - torch.stack([x[labels == c].mean(0) for c in (0, 1)])[labels]) @ basis.T for x in (h0, h.detach())
    )
    assert found.shape == (3,)
    assert after.numpy() == approx((before * torch.from_numpy(found[[0, 1, 2, 2]])).numpy(), abs=1e-6)
    entropy = NeuralCollapse(groups=0, proximity=beta).run(Subject(net, (h0, labels), "cross_entropy"))
    assert np.isnan(entropy.data.contraction).all()
    assert any("no contraction" in note for note in entropy.notes)
    assert np.isnan(NeuralCollapse(groups=0).run(Subject(net, (h0, y), "mse")).data.contraction).all()
