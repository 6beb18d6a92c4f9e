"""What is written out equals PyTorch's own kernels, and has the second derivative that they lack or get wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from workbench.kernels import Rules, attention


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- attention ------------------------------------------------------------------------------------------------------

MASKS = {
    "none": None,
    "causal": "causal",
    "bool": double(4, 6, seed=3) > -0.5,
    "additive": double(2, 1, 4, 6, seed=4),
    "one row without a key": torch.cat([torch.zeros(1, 6), torch.ones(3, 6)]).bool(),
}


def attend(function: Callable[..., Tensor], mask: Any, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """The value, the gradient of a function of it, and a Hessian-vector product."""
    causal = isinstance(mask, str)
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    value = function(*inputs, attn_mask=None if causal else mask, is_causal=causal, scale=0.3, enable_gqa=True)
    slopes = torch.autograd.grad(value.pow(3).sum(), inputs, create_graph=True)
    products = torch.autograd.grad(sum((g * g.detach().sin()).sum() for g in slopes), inputs)
    return [value.detach(), *(g.detach() for g in slopes), *products]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_attention_equals_the_math_kernel(mask: str) -> None:
    q, k, v = double(2, 4, 4, 8), double(2, 2, 6, 8, seed=1), double(2, 2, 6, 8, seed=2)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = attend(F.scaled_dot_product_attention, MASKS[mask], q, k, v)
    for ours, theirs in zip(attend(attention, MASKS[mask], q, k, v), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_attention_off_the_defaults_goes_through_the_rules() -> None:
    q = double(1, 2, 3, 4)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = F.scaled_dot_product_attention(q, q, q)
    with Rules(0) as rules:
        found = F.scaled_dot_product_attention(q, q, q, dropout_p=0.9)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert rules.seen == {"attention"}


# --- kernels without a second derivative, or with a wrong one -------------------------------------------------------

BAG, STARTS = torch.tensor([0, 2, 1, 3, 2, 4, 4]), torch.tensor([0, 3, 3, 5])
ENDED = torch.tensor([0, 3, 3, 5, 7])
SHARES = double(7, seed=8)

WRITTEN: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "hardsigmoid": (F.hardsigmoid, (3 * double(9),)),
    "cdist": (torch.cdist, (double(3, 2), double(4, 2, seed=1))),
    "cdist, batched, p=1": (lambda a, b: torch.cdist(a, b, p=1.0), (double(2, 3, 2), double(2, 4, 2, seed=1))),
    "weight norm 0": (lambda v, g: torch._weight_norm(v, g, 0), (double(4, 3), double(4, 1, seed=1))),
    "weight norm 1": (lambda v, g: torch._weight_norm(v, g, 1), (double(4, 3, 2), double(1, 3, 1, seed=1))),
    "weight norm, whole": (lambda v, g: torch._weight_norm(v, g, -1), (double(4, 3), double(1, seed=1).squeeze())),
    "bag of means": (lambda w: F.embedding_bag(BAG, w, STARTS), (double(5, 3),)),
    "bag of maxima": (lambda w: F.embedding_bag(BAG, w, STARTS, mode="max", padding_idx=2), (double(5, 3),)),
    "bag of sums": (lambda w: F.embedding_bag(BAG, w, ENDED, mode="sum", include_last_offset=True), (double(5, 3),)),
    "bag of shares": (
        lambda w, s: F.embedding_bag(BAG, w, STARTS, mode="sum", per_sample_weights=s, padding_idx=1),
        (double(5, 3), SHARES),
    ),
    "bag in two dimensions": (lambda w: F.embedding_bag(BAG[:6].view(2, 3), w, padding_idx=1), (double(5, 3),)),
    "fractional pooling": (
        lambda x: F.fractional_max_pool2d(x, 2, output_size=2, _random_samples=torch.full((1, 1, 2), 0.5).double()),
        (double(1, 1, 5, 5),),
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_written_out_kernels_equal_pytorchs_and_have_second_derivatives(name: str) -> None:
    function, inputs = WRITTEN[name]

    def ruled(*given: Tensor) -> Tensor:
        with Rules(0):
            return function(*given)

    torch.testing.assert_close(ruled(*inputs), function(*inputs), rtol=1e-12, atol=1e-12)
    leaves = tuple(t.clone().requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(ruled, leaves)
    assert torch.autograd.gradgradcheck(ruled, leaves)


def test_the_rules_are_still_needed() -> None:
    """PyTorch's own weight norm has a wrong second derivative; when this fails, the rule for it can go."""
    v, g = double(4, 3).requires_grad_(), double(4, 1, seed=1).requires_grad_()
    assert not torch.autograd.gradgradcheck(lambda v, g: torch._weight_norm(v, g, 0), (v, g), raise_exception=False)


def test_rules_belong_to_their_thread() -> None:
    before = torch.get_rng_state()
    with Rules(0):
        worker = threading.Thread(target=lambda: torch.randn(3))
        worker.start()
        worker.join()
    assert not torch.equal(before, torch.get_rng_state())


def test_every_kind_of_dropout_is_off_in_every_mode() -> None:
    x = double(2, 4, 3, 3, 3)
    kinds = (nn.Dropout(), nn.Dropout1d(), nn.Dropout2d(), nn.Dropout3d(), nn.AlphaDropout(), nn.FeatureAlphaDropout())
    with Rules(0):
        assert all(
            torch.equal(
                kind.train()(x[0] if isinstance(kind, nn.Dropout1d) else x),
                x[0] if isinstance(kind, nn.Dropout1d) else x,
            )
            for kind in kinds
        )
