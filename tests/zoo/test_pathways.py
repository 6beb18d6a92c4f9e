"""Pathways: their maps, what a closed gate leaves alone, and examples on which the loss is that of the map."""

from __future__ import annotations

import itertools

import pytest
import torch
from pytest import approx
from torch import nn

from workbench.subject import Subject
from workbench.zoo.pathways import Gate, PathwayStack, align, examples_of, mapping, pathways


def test_every_pathway_begins_with_singular_values_of_the_scale_and_weights_of_its_own() -> None:
    net, state = pathways((6, 7, 7, 9), paths=3, scale=0.3, seed=2), torch.get_rng_state()
    maps = net.maps()
    assert maps.shape == (3, 9, 6)
    assert torch.linalg.svdvals(maps).numpy() == approx(0.3, rel=1e-5)
    assert (maps[0] - maps[1]).abs().max() > 0.1
    assert torch.equal(pathways((6, 7, 7, 9), paths=3, scale=0.3, seed=2).maps(), maps)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(4, 6)
    by_hand = sum(path(x) for path in net.paths)
    torch.testing.assert_close(net(x), by_hand)
    torch.testing.assert_close(net(x), x @ maps.sum(0).T, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="two sizes and one path"):
        pathways((4,))
    with pytest.raises(ValueError, match="above 0"):
        pathways(scale=0.0)


def test_the_loss_on_the_examples_of_a_map_is_half_the_squared_distance_to_it() -> None:
    target, net = mapping((4.0, 1.5), 5, seed=1), pathways((5, 5, 5), seed=1).double()
    assert torch.linalg.svdvals(target).numpy() == approx([4, 1.5, 0, 0, 0], abs=1e-12)
    subject = Subject(net, examples_of(target), "half_mse")
    assert float(subject.loss()) == approx(float((net.maps().sum(0) - target).square().sum()) / 2)
    with pytest.raises(ValueError, match="5 singular values at most"):
        mapping((1.0,) * 6, 5)


def test_aligned_pathways_are_balanced_multiples_of_the_modes() -> None:
    target, net = mapping((3.0, 2.0), 4, seed=3), pathways((4, 6, 3, 4)).double()
    align(net, target, (0.5, 0.02))
    left, _, right = torch.linalg.svd(target)
    for strength, found in zip((0.5, 0.02), net.maps(), strict=True):
        torch.testing.assert_close(found, strength * left[:, :2] @ right[:2])
    for path in net.paths:
        for one, two in itertools.pairwise(path):
            torch.testing.assert_close(one.weight @ one.weight.T, two.weight.T @ two.weight)
    with pytest.raises(ValueError, match="cannot carry the 2 modes"):
        align(pathways((4, 1, 4)), target, (1.0, 1.0))
    with pytest.raises(ValueError, match="for each of 2 pathways"):
        align(net, target, (1.0,))


def test_a_gate_closes_a_pathway_for_its_window_and_training_leaves_it_alone_meanwhile() -> None:
    target, net = mapping((3.0,), 4), pathways((4, 4, 4)).double()
    x, y = examples_of(target)
    gate, optimizer = Gate(net, path=1, onset=2, removal=5), torch.optim.SGD(net.parameters(), lr=0.05)
    shut, moved = [], []
    for _ in range(8):
        before = [p.detach().clone() for p in net.paths[1].parameters()]
        shut.append(gate.closed)
        alone = net.paths[0](x)
        assert torch.equal(net(x), alone) == gate.closed
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
        gate.after_step()
        moved.append(not all(torch.equal(a, b) for a, b in zip(before, net.paths[1].parameters(), strict=True)))
    assert shut == [False, False, True, True, True, False, False, False]
    assert moved == [not closed for closed in shut]
    never = Gate(net, path=0, onset=0, removal=0)
    assert not never.closed
    assert net.gates.tolist() == [1, 1]


def test_nets_of_a_stack_take_the_steps_that_each_would_take_alone() -> None:
    target = mapping((3.0, 2.0), 4, seed=1)
    (x, y), nets = examples_of(target), [pathways((4, 5, 4), paths=3, seed=k).double() for k in (3, 8)]
    before = [{n: p.detach().clone() for n, p in net.named_parameters()} for net in nets]
    stack = PathwayStack(nets, target, 0.05)
    together = Gate(stack, 1, 2, 6)
    gates, optimizers = [Gate(net, 1, 2, 6) for net in nets], [torch.optim.SGD(n.parameters(), lr=0.05) for n in nets]
    for _ in range(12):
        assert torch.equal(stack.gates, nets[0].gates)
        losses = [(net(x) - y).square().sum(1).mean() / 2 for net in nets]
        expected = torch.stack([loss.detach() for loss in losses])
        torch.testing.assert_close(stack.losses(), expected)
        torch.testing.assert_close(stack.descend(), expected)
        together.after_step()
        for loss, optimizer, gate in zip(losses, optimizers, gates, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            gate.after_step()
    held = stack.weights()
    for found, net, first in zip(held, nets, before, strict=True):
        wanted = {n: p.detach() for n, p in net.named_parameters()}
        torch.testing.assert_close(found, wanted)
        assert all((found[n] - first[n]).abs().max() > 1e-3 for n in found)
    stack.descend()
    torch.testing.assert_close(held[0], {n: p.detach() for n, p in nets[0].named_parameters()}, msg="a copy")
