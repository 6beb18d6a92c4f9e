"""The quadratic task and its net: targets by hand, zero at the start, and a tangent kernel that α scales by α²."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.zoo.quadratic import polynomial, scaled_sum


def test_targets_are_one_square_of_a_projection() -> None:
    (x, y), (held_x, held_y) = polynomial(dimension=6, train=40, test=30, seed=5)
    every, values = torch.cat([x, held_x]).double().numpy(), torch.cat([y, held_y]).double().numpy()[:, 0]
    # y = xᵀ B x with B = β βᵀ / 12: found by least squares over all products, of rank one and trace 6/12.
    products = np.einsum("ni,nj->nij", every, every).reshape(len(every), 36)
    form = np.linalg.lstsq(products, values, rcond=None)[0].reshape(6, 6)
    eigenvalues = np.linalg.eigvalsh((form + form.T) / 2)
    assert eigenvalues[:-1] == pytest.approx(0, abs=1e-5)
    assert eigenvalues[-1] == pytest.approx(0.5, abs=1e-5)
    assert (len(x), len(held_x)) == (40, 30)
    assert torch.equal(polynomial(6, 40, 30, 5)[0][0], x)
    assert not torch.equal(polynomial(6, 40, 30, 6)[0][0], x)


@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_the_net_is_the_formula_and_zero_at_the_start(alpha: float) -> None:
    x = polynomial(5, 8, 2)[0][0]
    net = scaled_sum(5, 7, alpha, 0.3, seed=2)
    assert torch.equal(net(x), torch.zeros(8, 1))
    before = net.hidden.weight.detach().clone()
    with torch.no_grad():
        net.hidden.weight += 0.1 * torch.randn(7, 5, generator=torch.Generator().manual_seed(0))

    def sums(w: torch.Tensor) -> torch.Tensor:
        h = torch.einsum("nd,id->ni", x, w) / 5**0.5
        return alpha / 7 * (h + 0.15 * h**2).sum(1, keepdim=True)

    torch.testing.assert_close(net(x), sums(net.hidden.weight) - sums(before))
    assert [n for n, _ in net.named_parameters()] == ["hidden.weight"]


def test_the_scale_multiplies_the_tangent_kernel_by_its_square() -> None:
    x = polynomial(4, 3, 2)[0][0]

    def kernel(alpha: float) -> torch.Tensor:
        net = scaled_sum(4, 6, alpha, seed=1)
        rows = [torch.autograd.grad(out, net.hidden.weight, retain_graph=True)[0].flatten() for out in net(x)[:, 0]]
        return torch.stack(rows) @ torch.stack(rows).T

    torch.testing.assert_close(kernel(3.0), 9 * kernel(1.0))


def test_bad_words_are_refused() -> None:
    with pytest.raises(ValueError, match="alpha > 0"):
        scaled_sum(alpha=0.0)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        polynomial(0)
