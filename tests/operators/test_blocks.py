"""Groups of parameters and the diagonal blocks that they make, against Hessians computed entry by entry."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from architectures import SMALL, Tied, perceptron, small
from torch import Tensor, nn

from workbench.numerics.operator import Matrix, Restricted
from workbench.operators.blocks import Block, Group, coverage, groups, restrict, unused
from workbench.operators.gauss_newton import GaussNewton
from workbench.operators.table import curvature
from workbench.subject import Subject


def subject(name: str, **words: Any) -> Subject:
    net = small(name)
    return Subject(net.model, net.data, **words)


def names(model: nn.Module, level: Any = "layer", shape: tuple[int, ...] = (4, 8), **words: Any) -> dict[str, Group]:
    """Groups of a model that is never trained, by name; ``shape`` is that of an input."""
    x, y = torch.randn(*shape, dtype=torch.float64), torch.zeros(shape[0], dtype=torch.float64)

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        found = net(batch[0])
        return (found if isinstance(found, Tensor) else found[0]).square().mean()

    made = Subject(model.double(), [(x, y)], objective=loss, reduction="mean", **words)
    return {g.name: g for g in groups(made, level)}


# ------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("level", ["layer", "block"])
@pytest.mark.parametrize("name", SMALL)
def test_groups_take_every_scalar_once(name: str, level: Any) -> None:
    here = subject(name)
    found = groups(here, level)
    places = torch.cat([g.index(here.params) for g in found])
    assert places.sort().values.equal(torch.arange(here.size))
    assert [g.size for g in found] == [len(g.index(here.params)) for g in found]
    squares = sum(g.norm(here.params) ** 2 for g in found)
    assert squares == pytest.approx(float(here.flatten(here.params).square().sum()))


def test_attention_is_queries_keys_values_and_output() -> None:
    found = {g.name: g for g in groups(subject("transformer encoder"))}
    assert list(found) == [
        "embed", "body.self_attn.q", "body.self_attn.k", "body.self_attn.v", "body.self_attn.out_proj",
        "body.linear1", "body.linear2", "body.norm1", "body.norm2", "head",
    ]  # fmt: skip
    assert [found[f"body.self_attn.{n}"].size for n in "qkv"] == [6 * 6 + 6] * 3
    assert [found[f"body.self_attn.{n}"].parts[0].start for n in "qkv"] == [0, 6, 12], "the order that PyTorch cuts in"
    assert found["body.self_attn.k"].words == "attention, keys"
    assert found["body.self_attn.out_proj"].words == "attention, output"
    assert [g.name for g in groups(subject("transformer encoder"), "block")] == ["embed", "body", "head"]


def test_attention_in_other_forms() -> None:
    class Cross(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[..., :4], x[..., :3], x[..., :5])[0]

    apart = names(Cross(4, 2, kdim=3, vdim=5, add_bias_kv=True), shape=(2, 3, 8))
    assert {n: g.size for n, g in apart.items()} == {"q": 20, "k": 4 * 3 + 4 + 4, "v": 4 * 5 + 4 + 4, "out_proj": 20}
    fused = nn.Sequential(OrderedDict(qkv=nn.Linear(8, 24), rest=nn.Linear(24, 8)))
    assert {n: g.size for n, g in names(fused).items()} == {"qkv.q": 72, "qkv.k": 72, "qkv.v": 72, "rest": 200}
    odd = nn.Sequential(OrderedDict(qkv=nn.Linear(8, 16), rest=nn.Linear(16, 8)))
    assert list(names(odd)) == ["qkv", "rest"], "grouped queries: unequal parts are left together"


class Conv1D(nn.Module):
    """GPT-2's linear layer, its weight transposed."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inside, outside)), nn.Parameter(torch.zeros(outside))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_columns_of_a_transposed_weight() -> None:
    found = names(nn.Sequential(OrderedDict(c_attn=Conv1D(8, 24))))
    keys = found["c_attn.k"]
    places = torch.arange(8 * 24).view(8, 24)[:, 8:16].reshape(-1).tolist() + list(range(8 * 24 + 8, 8 * 24 + 16))
    sizes = {"c_attn.weight": torch.zeros(8, 24), "c_attn.bias": torch.zeros(24)}
    assert keys.index({f"{n}": t for n, t in sizes.items()}).tolist() == places


def test_bare_parameters_parametrisations_and_lists() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * torch.tanh(self.inner(x))

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Residual(), Residual()), normed)
    layers = names(copy.deepcopy(model))
    assert list(layers) == ["0", "1.0.scale", "1.0.inner", "1.1.scale", "1.1.inner", "2"]
    assert layers["2"].size == 8 + 8 + 64
    assert layers["1.0.scale"].words == "parameter of Residual"
    assert list(names(nn.ModuleDict({"net": model})["net"], "block")) == ["0", "1", "2"]
    wrapped = nn.Sequential(OrderedDict(stem=nn.Linear(8, 8), body=nn.Sequential(Residual(), Residual())))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Module()
            self.trunk.stem, self.trunk.layers = wrapped.stem, nn.ModuleList(wrapped.body)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk.stem(x)
            for layer in self.trunk.layers:
                x = layer(x)
            return self.head(x)

    assert list(names(Outer(), "block")) == ["trunk.stem", "trunk.layers.0", "trunk.layers.1", "head"]
    assert list(names(nn.Linear(8, 2))) == ["model"]


def test_tied_tensors_count_once() -> None:
    found = groups(subject("tied embedding"))
    assert [g.name for g in found] == ["embed", "mix"]
    assert found[0].words == "Embedding, tied with out.weight"


# ------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("name", ["transformer encoder", "conv + BatchNorm", "tied embedding", "LSTM"])
def test_blocks_are_those_of_the_exact_hessian(name: str) -> None:
    net, here = small(name), subject(name, batch_size=32)
    for group in groups(here):
        index = group.index(here.params)
        exact = net.hessian[index][:, index]
        with restrict(here, group) as block:
            assert isinstance(block, Block)
            some = torch.randn(group.size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(group.size))
            torch.testing.assert_close(block @ some, exact @ some, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(block @ some[:, 0], exact @ some[:, 0], rtol=1e-9, atol=1e-12)
            assert block.products == 5


def test_blocks_of_a_curvature_at_hand_and_of_a_matrix() -> None:
    net, here = small("transformer encoder"), subject("transformer encoder")
    group = {g.name: g for g in groups(here)}["body.self_attn.v"]
    index = group.index(here.params)
    with curvature(here, "hessian") as whole:
        block = restrict(whole, group)
        torch.testing.assert_close(block.dense(), net.hessian[index][:, index], rtol=1e-9, atol=1e-12)
    square = torch.arange(16.0).view(4, 4)
    assert Restricted(Matrix(square), torch.tensor([3, 1])).dense().tolist() == [[15.0, 13.0], [7.0, 5.0]]
    for wrong in (torch.tensor([4]), torch.tensor([1, 1]), torch.tensor([0.5]), torch.tensor([[1]])):
        with pytest.raises(ValueError, match="index"):
            Restricted(Matrix(square), wrong)


def test_relu_blocks_without_biases_are_gauss_newton_blocks() -> None:
    """The net is linear in each layer's weights alone, so its own curvature lives off the diagonal blocks only."""
    rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)
    ).double()
    data = torch.randn(20, 5, generator=rng, dtype=torch.float64), torch.arange(20) % 3
    here = Subject(model, data)
    for group in groups(here):
        with restrict(here, group) as hessian, restrict(here, group, "ggn") as newton:
            torch.testing.assert_close(hessian.dense(), newton.dense(), rtol=1e-9, atol=1e-14)
    with curvature(here, "hessian") as hessian, GaussNewton(here) as newton:
        assert (hessian.dense() - newton.dense()).norm() > 1e-3


def test_a_product_of_two_numbers() -> None:
    """f = w2 w1 x, y = 3 at (1, 2): blocks w2² and w1²."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    model.load_state_dict({"0.weight": torch.tensor([[1.0]]), "1.weight": torch.tensor([[2.0]])})
    one = torch.ones(1, 1, dtype=torch.float64)
    here = Subject(model, (one, 3 * one), "half_mse")
    assert [float(restrict(here, g).dense()) for g in groups(here)] == pytest.approx([4.0, 1.0])


# ----------------------------------------------------------------------------------------------------- coverage


def test_coverage_says_why_not() -> None:
    model = perceptron(6, nn.GELU).double()
    model[2].bias.requires_grad_(False)
    model.register_parameter("whole", nn.Parameter(torch.arange(3), requires_grad=False))
    model.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    here = Subject(model, small("dense GELU").data)
    found = groups(here)
    assert unused(here) == {"spare"}

    def reasons(subject: Subject, chosen: list[Group]) -> dict[str, str]:
        return {c.name: c.reason for c in coverage(subject, chosen)}

    wanted = dict.fromkeys(("spare", "2.weight", "4.weight", "4.bias"), "analysed")
    wanted |= {"whole": "not floating point", "2.bias": "frozen"}
    for one in (here, here.snapshot()):
        assert reasons(one, groups(one)) == wanted
    fewer = here.restricted(["4.*"])
    for one in (fewer, fewer.snapshot()):
        assert reasons(one, groups(one))["2.weight"] == "filtered"
        assert reasons(one, groups(one))["2.bias"] == "frozen"
    assert reasons(here, found[:1])["4.bias"] == "left out"
    assert {c.name: c.groups for c in coverage(here, found)}["4.bias"] == (2,)


def test_tied_model_in_training_mode_is_left_alone() -> None:
    model = Tied(17, 14).double().train()
    here = Subject(model, small("tied embedding").data)
    assert not unused(here)
    for group in groups(here):
        with restrict(here, group) as block:
            block @ torch.ones(group.size, dtype=torch.float64)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
