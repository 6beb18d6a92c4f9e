"""Modular addition: every pair once, and the net of waves that solves it as written down."""

from __future__ import annotations

import math

import pytest
import torch

from workbench.zoo.modular import added_embeddings, pairs, split, waves


@pytest.mark.parametrize("modulus", [2, 7, 12])
def test_every_pair_is_there_once_and_the_split_shares_them_out(modulus: int) -> None:
    inputs, targets = pairs(modulus)
    assert [(a, b) for a in range(modulus) for b in range(modulus)] == [tuple(row) for row in inputs.tolist()]
    assert targets.tolist() == [(a + b) % modulus for a in range(modulus) for b in range(modulus)]
    (x, y), (held_x, held_y) = split(modulus, 0.3, seed=4)
    assert len(x) == round(0.3 * modulus**2)
    assert sorted(map(tuple, [*x.tolist(), *held_x.tolist()])) == sorted(map(tuple, inputs.tolist()))
    assert torch.equal(x.sum(1) % modulus, y)
    assert torch.equal(held_x.sum(1) % modulus, held_y)


def test_seeds_decide_everything_and_touch_nothing() -> None:
    state = torch.get_rng_state()
    one, two, other = (added_embeddings(7, 5, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not torch.equal(one["embedding_a.weight"], other["embedding_a.weight"])
    assert torch.equal(split(7, seed=3)[0][0], split(7, seed=3)[0][0])
    assert torch.equal(state, torch.get_rng_state())
    wide = added_embeddings(50, 400, scale=3.0)
    assert wide.embedding_a.weight.std().item() == pytest.approx(3 / 20, rel=0.05)


@pytest.mark.parametrize(("modulus", "frequency"), [(11, 1), (11, 4), (12, 5)])
def test_waves_give_the_logits_that_are_claimed(modulus: int, frequency: int) -> None:
    inputs, targets = pairs(modulus)
    logits = waves(modulus, frequency, 3.0)(inputs)
    for row, (a, b) in zip(logits.tolist(), inputs.tolist(), strict=True):
        wanted = [3.0 * math.cos(2 * math.pi * frequency * (a + b - c) / modulus) for c in range(modulus)]
        assert row == pytest.approx(wanted, abs=1e-12)
    assert torch.equal(logits.argmax(1), targets)


def test_a_net_without_hidden_products_cannot_say_more_than_its_activation() -> None:
    tokens = pairs(5)[0]
    net = added_embeddings(5, 6, "relu", seed=2)
    hidden = net.embedding_a.weight[tokens[:, 0]] + net.embedding_b.weight[tokens[:, 1]]
    torch.testing.assert_close(net(tokens), hidden.clamp(min=0) @ net.readout.weight.T)


def test_bad_words_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2; got 1"):
        pairs(1)
    with pytest.raises(ValueError, match=r"between 0 and 1; got 1\.5"):
        split(7, 1.5)
    with pytest.raises(ValueError, match="known: relu, square"):
        added_embeddings(7, 5, "tanh")  # type: ignore[arg-type]
