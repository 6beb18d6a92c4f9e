"""The zoo: real data, nets and a loop that give the same numbers each time and touch nothing global."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from workbench.zoo import digits, nets, training


def test_digits_are_scikit_learns_split_without_overlap() -> None:
    from sklearn.datasets import load_digits

    split = digits.digits(test_fraction=0.2, seed=3)
    (x, y), (held_x, held_y) = split
    assert (len(x), len(held_x)) == (1438, 359)
    assert x.shape[1:] == (1, 8, 8)
    assert x.dtype == torch.float32
    pixels, classes = load_digits(return_X_y=True)
    ours = torch.cat([x, held_x]).flatten(1).numpy() * 8 + 8
    rows = np.c_[ours, torch.cat([y, held_y]).numpy()]
    wanted = np.c_[pixels, classes]
    assert np.array_equal(rows[np.lexsort(rows.T)], wanted[np.lexsort(wanted.T)])
    assert torch.equal(digits.examples("test", 0.2, 3)[0], held_x)
    assert not torch.equal(digits.digits(0.2, seed=4).train[0], x)


def test_bad_words_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        digits.digits(1.5)
    with pytest.raises(ValueError, match="'train', 'test' and 'all'"):
        digits.examples("validation")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="relu, tanh"):
        nets.dense(activation="swish")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least an input and an output"):
        nets.dense((3,))
    with pytest.raises(ValueError, match="cannot be halved"):
        nets.conv((4, 4, 4, 4))


@pytest.mark.parametrize("build", [nets.dense, nets.conv, lambda seed=0: nets.conv(batch_norm=True, seed=seed)])
def test_builders_depend_on_their_arguments_alone(build) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = build(seed=1).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    again, other = build(seed=1).state_dict(), build(seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert build()(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert all(t.isfinite().all() for t in first.values())


def test_initial_weights_have_the_spread_of_pytorchs_own() -> None:
    ours, theirs = nets.dense((300, 200)).linear1, nn.Linear(300, 200)
    assert ours.weight.std().item() == pytest.approx(theirs.weight.std().item(), rel=0.05)
    assert ours.weight.abs().max().item() == pytest.approx(300**-0.5, rel=1e-3)


def test_training_learns_digits_and_repeats_bit_for_bit() -> None:
    split, ends = digits.digits(), []
    for _ in range(2):
        torch.seed()
        state = torch.get_rng_state()
        model = nets.dense().eval()
        scalars = training.train(model, split.train, steps=150, test=split.test)
        assert torch.equal(state, torch.get_rng_state())
        assert not model.training
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)
    assert scalars["test_accuracy"] > 0.9 > training.accuracy(nets.dense(), split.test)


def test_digits_are_standardised_over_all_of_them_and_drawn_without_repeats() -> None:
    before = torch.get_rng_state()
    inputs, labels = digits.standardised(1797, 0)
    assert torch.equal(torch.get_rng_state(), before)
    spread = inputs.std(0)
    assert ((spread - 1).abs() < 1e-3).logical_or(spread == 0).all()
    assert inputs.mean(0).abs().max() < 1e-4
    assert (spread == 0).sum() == 3, "three pixels are never inked"
    few, theirs = digits.standardised(100, 1)
    place = {row.numpy().tobytes(): k for k, row in enumerate(inputs)}
    places = [place[row.numpy().tobytes()] for row in few]
    assert len(set(places)) == 100
    assert theirs.tolist() == labels[places].tolist()
    assert not torch.equal(digits.standardised(100, 2)[0], few)
    floored = digits.standardised(1797, 0, floor=0.1)[0]
    deviation = digits.examples("all")[0].flatten(1).std(0)
    assert torch.allclose(floored * (deviation + 0.1), inputs * deviation, atol=1e-5)
    with pytest.raises(ValueError, match=r"between 1 and 1797, the images that there are; got 1798"):
        digits.standardised(1798)
