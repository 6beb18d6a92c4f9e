"""Interventions against plasticity loss, each by the property that defines it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from torch import nn

from workbench.zoo.interventions import (
    ContinualBackprop,
    Intervention,
    NormProjection,
    RecycleDormant,
    WeightPenalty,
    normalised_dense,
    shrink_and_perturb,
)
from workbench.zoo.nets import dense


def data(seed: int = 0, n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=rng, dtype=torch.float64), torch.randint(3, (n,), generator=rng)


def vector(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, arm: Intervention, steps: int = 20) -> None:
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        arm.before_step()
        optimizer.step()
        arm.after_step()
    arm.between_tasks()


# ---------------------------------------------------------------------------- penalties


def test_l2_is_weight_decay_and_towards_the_start_it_is_decay_of_the_difference() -> None:
    ours, theirs = (dense((5, 6, 3)).double() for _ in range(2))
    descend(ours, torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9), WeightPenalty(ours, 0.03))
    by_torch = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.03)
    descend(theirs, by_torch, Intervention())
    torch.testing.assert_close(vector(ours), vector(theirs), rtol=1e-12, atol=1e-14)
    model = dense((5, 6, 3)).double()
    start, arm = vector(model), WeightPenalty(model, 0.5, to_initial=True)
    shift = torch.randn(start.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nn.utils.vector_to_parameters(start + shift, model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    arm.before_step()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), 0.5 * shift)


# ------------------------------------------------------------------- shrink and perturb


@settings(max_examples=30, deadline=None)
@given(keep=st.floats(0, 1), seed=st.integers(0, 5))
def test_shrinking_towards_a_fresh_network_is_a_point_between_the_two(keep: float, seed: int) -> None:
    model, fresh = (dense((5, 6, 3), seed=s).double() for s in (seed, seed + 1))
    old, new = vector(model).numpy(), vector(fresh).numpy()
    shrink_and_perturb(model, keep, fresh)
    assert vector(model).numpy() == approx(keep * old + (1 - keep) * new, abs=1e-14)
    assert (vector(fresh).numpy() == new).all()


def test_the_expected_squared_norm_after_noise() -> None:
    model = dense((5, 40, 30)).double()
    old, state = vector(model), torch.get_rng_state()
    found = []
    for seed in range(60):
        nn.utils.vector_to_parameters(old.clone(), model.parameters())
        shrink_and_perturb(model, 0.7, noise=0.2, seed=seed)
        found.append(float(vector(model).square().sum()))
    assert np.mean(found) == approx(0.49 * float(old.square().sum()) + 0.04 * len(old), rel=0.01)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="between 0 and 1"):
        shrink_and_perturb(model, 1.1)
    with pytest.raises(ValueError, match="same parameters"):
        shrink_and_perturb(model, 0.5, dense((5, 3)))


# ------------------------------------------------------------------------- projection


def test_norms_stay_and_the_function_stays_where_a_normalisation_follows() -> None:
    model, x = normalised_dense((5, 8, 7, 3), epsilon=1e-14).double(), data()[0]
    norms = {n: p.norm().item() for n, p in model.named_parameters()}
    arm, optimizer = NormProjection(model), torch.optim.Adam(model.parameters(), lr=0.05)
    descend(model, optimizer, arm)
    for name, p in model.named_parameters():
        same = p.norm().item() == approx(norms[name], rel=1e-9)
        assert same if p.ndim > 1 else not same, f"{name}: weights are projected, scales and biases are not"
    before = model(x)
    with torch.no_grad():
        model.linear1.weight *= 3.0
        model.linear2.weight *= 0.2
    arm.after_step()
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        model.linear1.weight.zero_()
    arm.after_step()
    assert model.linear1.weight.abs().sum() == 0


def test_layer_norm_sits_before_each_non_linearity_and_makes_it_indifferent_to_scale() -> None:
    model, x = normalised_dense((5, 8, 7, 3), epsilon=1e-14).double(), data()[0]
    kinds = [type(m).__name__ for m in model]
    assert kinds == ["Flatten", *["Linear", "LayerNorm", "ReLU"] * 2, "Linear"]
    found = model[:3](x)
    assert found.mean(1).detach().numpy() == approx(np.zeros(40), abs=1e-9)
    assert found.std(1, correction=0).detach().numpy() == approx(np.ones(40), rel=1e-6)
    torch.testing.assert_close(model(1000 * x), model(x), rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------- continual backpropagation


def watched(**changes: float) -> tuple[nn.Sequential, torch.optim.Optimizer, ContinualBackprop]:
    model = dense((5, 8, 6, 3), "relu").double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return model, optimizer, ContinualBackprop(model, optimizer, **changes)  # type: ignore[arg-type]


def test_utility_and_mean_are_running_averages_of_what_the_batches_said() -> None:
    model, optimizer, arm = watched(rate=0.0, decay=0.9)
    utility, mean, (x, y) = np.zeros(8), np.zeros(8), data()
    for _ in range(5):
        hidden = model[:3](x).detach().numpy()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        arm.after_step()
        outgoing = model.linear2.weight.detach().numpy()
        for i in range(8):
            now = np.abs(hidden[:, i]).mean() * np.abs(outgoing[:, i]).sum()
            utility[i] = 0.9 * utility[i] + 0.1 * now
            mean[i] = 0.9 * mean[i] + 0.1 * hidden[:, i].mean()
    assert arm.layers[0].utility.numpy() == approx(utility)
    assert arm.layers[0].mean.numpy() == approx(mean)
    assert len(arm.layers) == 2


def test_a_constant_unit_leaves_without_a_trace_and_any_other_by_its_mean() -> None:
    model, _, arm = watched(rate=0.0)
    with torch.no_grad():
        model.linear1.weight[4] = 0
        model.linear1.bias[4] = 2.5
    x = data()[0]
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    descend(model, frozen, arm, steps=7)
    before = model(x).detach()
    arm.replace(arm.layers[0], 4)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    hidden, outgoing = model[:3](x).detach(), model.linear2.weight.detach().clone()
    into = model[:4](x).detach()
    arm.replace(arm.layers[0], 1)
    wanted = into + (hidden[:, 1].mean() - hidden[:, 1])[:, None] * outgoing[:, 1]
    torch.testing.assert_close(model[:4](x), wanted, rtol=1e-12, atol=1e-12)
    assert model.linear2.weight[:, 1].abs().sum() == 0
    assert model.linear1.weight[1].abs().max() <= 5**-0.5


def test_the_least_useful_old_unit_goes_with_its_moments_and_no_other() -> None:
    model, optimizer, arm = watched(rate=0.0, maturity=3)
    descend(model, optimizer, arm, steps=6)
    first = arm.layers[0]
    first.age[5] = 2  # young, and useless
    first.utility[5] = 0
    first.utility[2] = -1000
    old = copy.deepcopy(model.state_dict())
    arm.rate = 1 / 7 + 1e-9  # seven are old: one unit
    descend(model, torch.optim.SGD(model.parameters(), lr=0.0), arm, steps=1)
    new = model.state_dict()
    assert [i for i in range(8) if not torch.equal(old["linear1.weight"][i], new["linear1.weight"][i])] == [2]
    assert [i for i in range(8) if not torch.equal(old["linear2.weight"][:, i], new["linear2.weight"][:, i])] == [2]
    assert first.age.tolist() == [7, 7, 0, 7, 7, 3, 7, 7]
    for moment in ("exp_avg", "exp_avg_sq"):
        held = [optimizer.state[p][moment] for p in (model.linear1.weight, model.linear1.bias, model.linear2.weight)]
        assert held[0][2].abs().sum() == held[1][2] == held[2][:, 2].abs().sum() == 0
        assert (held[2].abs().sum(0) > 0).sum() >= 5
        assert (held[0].abs().sum(1) > 0).sum() >= 5


@settings(max_examples=10, deadline=None)
@given(rate=st.floats(0.001, 0.05), maturity=st.integers(1, 20), steps=st.integers(30, 80))
def test_as_many_are_replaced_as_the_rate_says(rate: float, maturity: int, steps: int) -> None:
    model, optimizer, arm = watched(rate=rate, maturity=maturity)
    replaced, owed = [0, 0], [0.0, 0.0]
    for _ in range(steps):
        descend(model, optimizer, arm, steps=1)
        for k, units in enumerate(arm.layers):
            fresh = int((units.age == 0).sum())
            owed[k] += rate * (int((units.age > maturity).sum()) + fresh)
            replaced[k] += fresh
    for k in range(2):
        assert replaced[k] == approx(owed[k], abs=1 + 1e-9)


def test_hooks_go_and_what_has_no_hidden_layer_is_refused() -> None:
    model, _, arm = watched()
    arm.close()
    assert not any(m._forward_hooks for m in model.modules())
    linear = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="found no linear, activation, linear"):
        ContinualBackprop(linear, torch.optim.SGD(linear.parameters(), lr=0.1))


# ------------------------------------------------------------------------ recycling dormant units


def with_dormant_units(dormant: dict[int, list[int]], dead: bool) -> nn.Sequential:
    """Units of a layer that are 0 for every input, or hardly above it."""
    model = dense((5, 8, 6, 3), "relu").double()
    with torch.no_grad():
        for layer in (1, 2):
            linear, places = model[1 + 2 * (layer - 1)], dormant.get(layer, [])
            linear.bias += 1.0
            linear.weight[places] = 0
            linear.bias[places] = -1.0 if dead else 1e-3
    return model


@settings(max_examples=20, deadline=None)
@given(
    first=st.sets(st.integers(0, 7), max_size=5),
    second=st.sets(st.integers(0, 5), max_size=4),
    dead=st.booleans(),
    seed=st.integers(0, 9),
)
def test_recycling_takes_away_what_dormant_units_gave_and_nothing_else(
    first: set[int], second: set[int], dead: bool, seed: int
) -> None:
    """By hand: the outputs with the dormant activations set to 0; unchanged to the bit's neighbourhood where dead."""
    chosen = {1: sorted(first), 2: sorted(second)}
    model, x = with_dormant_units(chosen, dead), data()[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    arm = RecycleDormant(model, optimizer, every=2, seed=seed)
    old = copy.deepcopy(model)
    kept = [torch.ones(n, dtype=torch.float64) for n in (8, 6)]
    for places, mask in zip(chosen.values(), kept, strict=True):
        mask[places] = 0
    hidden = old.activation1(old.linear1(x)) * kept[0]
    wanted = old.linear3(old.activation2(old.linear2(hidden)) * kept[1])
    if dead:
        torch.testing.assert_close(wanted, old(x), rtol=1e-13, atol=1e-13)
    descend(model, optimizer, arm, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), model.parameters(), strict=True)), "not yet"
    descend(model, optimizer, arm, steps=1)
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
    assert arm.recycled == len(first) + len(second)
    for layer, places in chosen.items():
        into, out = model[1 + 2 * (layer - 1)], model[1 + 2 * layer]
        before = old[1 + 2 * (layer - 1)]
        assert (out.weight[:, places] == 0).all()
        rest = [i for i in range(into.out_features) if i not in places]
        heard = [i for i in range(into.in_features) if i not in chosen.get(layer - 1, [])]
        assert (into.weight[places][:, heard] != before.weight[places][:, heard]).all()
        assert (into.weight[places].abs() <= into.in_features**-0.5).all()
        assert (into.bias[places] != before.bias[places]).all()
        assert torch.equal(into.weight[rest][:, heard], before.weight[rest][:, heard])
        assert torch.equal(into.bias[rest], before.bias[rest])


def test_recycled_units_learn_again_from_fresh_moments_and_the_others_keep_theirs() -> None:
    model = with_dormant_units({1: [2, 5]}, dead=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    arm = RecycleDormant(model, optimizer, every=4)
    descend(model, optimizer, arm, steps=3)
    assert all((optimizer.state[p]["exp_avg_sq"] > 0).any() for p in model.parameters())
    assert (optimizer.state[model.linear2.weight]["exp_avg_sq"][:, [2, 5]] > 0).any()
    descend(model, optimizer, arm, steps=1)
    for moment in ("exp_avg", "exp_avg_sq"):
        held = [optimizer.state[p][moment] for p in (model.linear1.weight, model.linear1.bias, model.linear2.weight)]
        assert held[0][[2, 5]].abs().sum() == held[1][[2, 5]].abs().sum() == held[2][:, [2, 5]].abs().sum() == 0
        assert (held[0].abs().sum(1) > 0).sum() == 6
        assert (held[2].abs().sum(0) > 0).sum() == 6
    assert arm.recycled == 2
    before = model.linear2.weight[:, [2, 5]].detach().clone()
    descend(model, torch.optim.SGD(model.parameters(), lr=0.1), arm, steps=1)
    assert (model.linear2.weight[:, [2, 5]] != before).any(), "they hear of the loss again"


def test_the_threshold_of_dormancy_holds_with_equality_and_a_layer_of_zeros_is_all_dormant() -> None:
    model = dense((3, 3, 2), "relu").double()
    with torch.no_grad():
        model.linear1.weight.zero_()
        model.linear1.bias.copy_(torch.tensor([0.0, 1.0, 3.0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arms = [RecycleDormant(model, optimizer, tau) for tau in (0.0, 0.74, 0.75, 3.0)]
    assert [arm.dormant(arm.layers[0]) for arm in arms] == [[]] * 4, "no batch was seen"
    model(torch.randn(4, 3, dtype=torch.float64))
    assert [arm.dormant(arm.layers[0]) for arm in arms] == [[0], [0], [0, 1], [0, 1, 2]]
    with torch.no_grad():
        model.linear1.bias.fill_(-1.0)
    model(torch.randn(4, 3, dtype=torch.float64))
    assert arms[0].dormant(arms[0].layers[0]) == [0, 1, 2]
    for arm in arms:
        arm.close()
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="tau >= 0 and every >= 1"):
        RecycleDormant(model, optimizer, every=0)
