"""Preconditioners against PyTorch's own steps, thresholds against the iterations they are thresholds of."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import small
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import workbench as wb
from workbench.numerics.operator import Diagonal, Matrix
from workbench.operators.preconditioned import Preconditioned, preconditioner
from workbench.operators.table import curvature
from workbench.optimizers import scales, threshold
from workbench.subject import Subject

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
NET = "dense GELU"

ADAPTIVE: dict[str, Make] = {
    "Adam": lambda p: torch.optim.Adam(p, 0.01, betas=(0.8, 0.95), eps=1e-3),
    "Adam, foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "Adam, AMSGrad": lambda p: torch.optim.Adam(p, 0.01, betas=(0.8, 0.5), amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.0),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01, momentum_decay=0.05),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.01, eps=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, alpha=0.9, eps=1e-3),
    "RMSprop, centred": lambda p: torch.optim.RMSprop(p, 0.01, alpha=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01, lr_decay=0.1, initial_accumulator_value=0.2),
}
PLAIN: dict[str, Make] = {
    "gradient descent": lambda p: torch.optim.SGD(p, 0.1),
    "heavy ball": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "dampened": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.5),
    "Nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
}


def stepped(make: Make, name: str = NET, steps: int = 3) -> tuple[nn.Module, Any, torch.optim.Optimizer]:
    """A copy of a net, its examples, and an optimizer that has made some steps with it."""
    net = small(name)
    model = copy.deepcopy(net.model)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    for _ in range(steps):
        optimizer.zero_grad()
        net.loss(model).backward()
        optimizer.step()
    return model, net.data, optimizer


def exact_hessian(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Entry by entry in plain PyTorch."""
    names = [n for n, p in model.named_parameters()]

    def loss(*values: Tensor) -> Tensor:
        found = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (data[0],))
        return nn.functional.cross_entropy(found, data[1])

    values = tuple(p.detach() for p in model.parameters())
    blocks = torch.autograd.functional.hessian(loss, values)
    rows = [torch.cat([b.reshape(v.numel(), -1) for b in row], 1) for row, v in zip(blocks, values, strict=True)]
    return torch.cat(rows)


# ---------------------------------------------------------------------------------------------- preconditioners


def test_a_diagonal_by_hand() -> None:
    made = Preconditioned(Diagonal(torch.tensor([4.0, 1.0])), torch.tensor([2.0, 0.1]).rsqrt())
    assert torch.linalg.eigvalsh(made.dense()).tolist() == pytest.approx([2.0, 10.0])


def test_a_function_may_be_the_preconditioner() -> None:
    rng = torch.Generator().manual_seed(0)
    square, root = (torch.randn(6, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    matrix, root = square + square.T, root @ root.T
    made = Preconditioned(Matrix(matrix), lambda v: root @ v)
    torch.testing.assert_close(made.dense(), root @ matrix @ root)
    torch.testing.assert_close(made @ square[:, 0], root @ matrix @ root @ square[:, 0])


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_it_is_what_the_last_step_divided_by(kind: str) -> None:
    """θ moved by -η P⁻¹ (a g + b m), with m the average of gradients that were chosen here."""
    rng = torch.Generator().manual_seed(1)
    p = nn.Parameter(torch.randn(7, generator=rng, dtype=torch.float64))
    optimizer = ADAPTIVE[kind]([p])
    group, mean = optimizer.param_groups[0], torch.zeros(7, dtype=torch.float64)
    beta = group["betas"][0] if "betas" in group else 0.0
    for step in range(1, 8):
        p.grad = torch.randn(7, generator=rng, dtype=torch.float64)
        mean, before = beta * mean + (1 - beta) * p.grad, p.detach().clone()
        optimizer.step()
        (scale,) = scales(optimizer, {"w": p}).values()
        direct, averaged = (0.0, 1.0) if beta else (1.0, 0.0)
        if kind == "NAdam":
            now, then = (beta * (1 - 0.5 * 0.96 ** (t * 0.05)) for t in (step, step + 1))
            product = math.prod(beta * (1 - 0.5 * 0.96 ** (t * 0.05)) for t in range(1, step + 1))
            direct, averaged = (1 - now) / (1 - product), then / (1 - product * then)
            wanted = 2 * (1 + beta) / (direct * (1 + beta) + averaged * (1 - beta))
            assert scale.constant == pytest.approx(wanted, rel=1e-6)
        expected = -scale.rate * (direct * p.grad + averaged * mean) / scale.entries
        torch.testing.assert_close(p.detach() - before, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(("kind", "net"), [("Adam", NET), ("RMSprop, centred", "conv + BatchNorm")])
@pytest.mark.parametrize("operator", ["hessian", "ggn"])
def test_preconditioned_matrices_of_two_nets(kind: str, net: str, operator: Any) -> None:
    model, data, optimizer = stepped(ADAPTIVE[kind], net)
    subject = Subject(model, data, optimizer=optimizer)
    root = torch.cat([1 / _divisor(optimizer, p).reshape(-1).sqrt() for p in model.parameters()])
    with curvature(subject, operator) as matrix:
        plain = exact_hessian(model, data) if operator == "hessian" else matrix.dense()
        bare = preconditioner(subject, rates=False)
        torch.testing.assert_close(bare.of(matrix).dense(), root[:, None] * plain * root)
        folded = preconditioner(subject)
        torch.testing.assert_close(folded.of(matrix).dense(), 0.01 * root[:, None] * plain * root)
    assert folded.threshold == pytest.approx(bare.threshold * 0.01)


def _divisor(optimizer: torch.optim.Optimizer, p: Tensor) -> Tensor:
    """P written out once more, for two optimizers."""
    state, group = optimizer.state[p], optimizer.param_groups[0]
    if "betas" in group:
        one, two = (1 - b ** state["step"].item() for b in group["betas"])
        return one * (torch.sqrt(state["exp_avg_sq"] / two) + group["eps"])
    return torch.sqrt(state["square_avg"] - state["grad_avg"] ** 2) + group["eps"]


def test_weight_decay_of_adamw_changes_nothing() -> None:
    makers = [lambda p, w=w: torch.optim.AdamW(p, 0.0, weight_decay=w) for w in (0.0, 0.5)]  # a rate of 0: same weights
    found = [Subject(m, d, optimizer=o) for m, d, o in map(stepped, makers)]
    roots = [preconditioner(s, rates=False) for s in found]
    torch.testing.assert_close(roots[0].root, roots[1].root, rtol=0, atol=0)
    assert not roots[0].notes
    assert any("weight decay" in note for note in roots[1].notes)
    assert not preconditioner(found[0]).root.any(), "with a rate of 0 nothing can become unstable"


# --------------------------------------------------------------------------------------------- whose parameters


def test_matched_by_identity_through_everything_a_subject_can_become() -> None:
    model, data, optimizer = stepped(lambda p: torch.optim.Adam(p[::-1], 0.01))  # the order of the optimizer is another
    subject = Subject(model, data, optimizer=optimizer)
    whole = preconditioner(subject).root
    parts = subject.unflatten(whole)
    assert preconditioner(subject.selected(range(5))).root.equal(whole)
    half = preconditioner(subject.restricted("4.weight")).root
    assert half.equal(parts["4.weight"].reshape(-1))
    narrow = preconditioner(Subject(model, data, optimizer=optimizer, dtype=torch.float32))
    assert narrow.root.dtype == torch.float32
    assert narrow.root.equal(whole.float())
    assert preconditioner(subject.excerpt(4, torch.float32)).root.equal(whole.float())


def test_a_snapshot_keeps_the_optimizer_of_its_moment() -> None:
    model, data, optimizer = stepped(ADAPTIVE["Adam"])
    subject = Subject(model, data, optimizer=optimizer)
    still, before = subject.snapshot(), preconditioner(subject)
    assert still.fingerprint() == subject.fingerprint()
    small(NET).loss(model).backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1.0
    assert preconditioner(still).root.equal(before.root)
    assert preconditioner(still.snapshot().restricted("2.*")).root.equal(before.root[: 17 * 20])
    assert preconditioner(still).fingerprint() == before.fingerprint()
    assert preconditioner(subject).fingerprint() != before.fingerprint()


def test_tied_tensors_and_frozen_ones() -> None:
    for name in ("tied embedding", "partly frozen"):
        model, data, optimizer = stepped(ADAPTIVE["Adam"], name)
        subject = Subject(model, data, optimizer=optimizer)
        found = preconditioner(subject)
        assert found.root.shape == (subject.size,)
        assert not found.notes


def test_a_parameter_that_never_moved_stays_fixed() -> None:
    model, data, optimizer = stepped(ADAPTIVE["Adam"])
    loose = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model.register_parameter("loose", loose)
    optimizer.add_param_group({"params": [loose]})
    found = preconditioner(Subject(model, data, optimizer=optimizer))
    assert found.root[:3].tolist() == [0, 0, 0]
    assert any("never moved loose" in note for note in found.notes)


@pytest.mark.parametrize("keep", [True, False])
def test_recorded_optimizers(tmp_path: Path, keep: bool) -> None:
    net = small(NET)
    model = copy.deepcopy(net.model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01, betas=(0.8, 0.9))
    live: dict[int, Tensor] = {}
    with wb.Recorder(tmp_path, model, optimizer, every=1, keep_optimizer=keep) as recorder:
        for step in (1, 2):
            optimizer.zero_grad()
            net.loss(model).backward()
            optimizer.step()
            recorder.step()
            live[step] = preconditioner(Subject(model, net.data, optimizer=optimizer)).root
    path = wb.Trajectory.open(tmp_path).using(copy.deepcopy(model), net.data, "cross_entropy")
    for step, root in live.items():
        subject = path.subject(step)
        held = subject.optimizer
        assert held is not None
        assert threshold(held).constant == pytest.approx(2 * 1.8 / 0.2)
        if keep:
            assert preconditioner(subject).root.equal(root)
            assert preconditioner(subject.snapshot().restricted("4.*")).root.equal(root[-210:])
        else:
            with pytest.raises(ValueError, match="keep_optimizer=True"):
                preconditioner(subject)
    with pytest.raises(ValueError, match="has not stepped yet" if keep else "keep_optimizer=True"):
        preconditioner(path.subject(0))
    assert path.subject(1, optimizer=optimizer).optimizer is optimizer


# -------------------------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_updates_do_not_precondition_but_have_a_threshold(kind: str) -> None:
    model, data, optimizer = stepped(PLAIN[kind], steps=0)
    found = preconditioner(Subject(model, data, optimizer=optimizer), rates=False)
    assert found.root.tolist() == [1.0] * len(found.root)
    assert found.threshold == threshold(optimizer).sharpness == pytest.approx(threshold(optimizer).constant / 0.1)


def test_constants_by_name() -> None:
    w = [nn.Parameter(torch.zeros(1))]
    known = [2, 3.8, 2 * 1.9 / 0.5, 2 * 1.9 / 2.8]
    assert [threshold(make(w)).constant for make in PLAIN.values()] == pytest.approx(known)
    assert threshold(torch.optim.Adam(w)).constant == pytest.approx(38)
    assert threshold(torch.optim.RMSprop(w, momentum=0.5)).constant == pytest.approx(3)
    assert threshold(torch.optim.NAdam(w, betas=(0.9, 0.999))).constant == pytest.approx(2 * 1.9 / (0.1 * 2.8))
    assert "heavy ball, momentum 0.9" in threshold(PLAIN["heavy ball"](w)).words
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.1, 0.2)]
    assert math.isnan(threshold(torch.optim.SGD(groups)).sharpness)


def diverges(make: Make, curvature: float, steps: int) -> bool:
    """Run the optimizer itself on ½ a w²."""
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = make([w])
    for _ in range(steps):
        w.grad = curvature * w.detach()
        optimizer.step()
    return abs(w.item()) > 1


@pytest.mark.parametrize("kind", PLAIN)
def test_quadratics_diverge_just_above_the_threshold(kind: str) -> None:
    limit = threshold(PLAIN[kind]([nn.Parameter(torch.zeros(1))])).sharpness
    assert diverges(PLAIN[kind], 1.01 * limit, 3000)
    assert not diverges(PLAIN[kind], 0.99 * limit, 3000)


@given(beta=st.floats(0.0, 0.99), direct=st.floats(0.0, 3.0), averaged=st.floats(0.01, 3.0), rise=st.floats(1.01, 2.0))
@settings(max_examples=50, deadline=None)
def test_the_constant_is_where_the_spectral_radius_passes_one(
    beta: float, direct: float, averaged: float, rise: float
) -> None:
    from workbench.optimizers import Response

    def radius(height: float) -> float:
        mean = np.array([1 - beta, beta])  # the new average, of (w, old average), in units of the curvature
        matrix = np.stack([np.array([1 - height * direct, 0.0]) - height * averaged * mean, mean])
        return float(np.abs(np.linalg.eigvals(matrix)).max())

    constant = Response(beta, direct, averaged, "").constant
    assert radius(constant * rise) > 1
    assert radius(constant) == pytest.approx(1, abs=1e-6)
    assert radius(constant / rise) < 1


def test_groups_of_different_rates_and_momenta_have_one_threshold_without_units() -> None:
    """Coupled directions, two groups: SGD itself diverges just above the threshold and not just below."""
    matrix = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=torch.float64)

    def run(factor: float) -> tuple[float, float]:
        one, two = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
        groups = [{"params": [one], "lr": 0.3 * factor, "momentum": 0.8}, {"params": [two], "lr": 1.1 * factor}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        for _ in range(2000):
            one.grad, two.grad = (matrix @ torch.cat([one, two]).detach()).split(1)
            optimizer.step()
        model = nn.Module()
        model.one, model.two = one, two
        data = [torch.zeros(1)]

        def half(net: Any, batch: Tensor) -> Tensor:
            w = torch.cat([net.one, net.two])
            return 0.5 * w @ matrix @ w

        subject = Subject(model, data, objective=half, reduction="mean", optimizer=optimizer)
        found = preconditioner(subject)
        with curvature(subject) as hessian:
            top = float(torch.linalg.eigvalsh(found.of(hessian).dense())[-1])
        return top / found.threshold, float(torch.cat([one, two]).detach().norm())

    ratio, _ = run(0.5)
    assert ratio > 0
    assert run(0.5 * 0.99 / ratio)[1] < 1
    assert not run(0.5 * 1.01 / ratio)[1] < 1


@pytest.mark.slow
def test_adam_settles_at_its_threshold() -> None:
    """½ (x² + 50 y²) from (1, 1): the median of η λ_1(P⁻¹H) over the last 10⁴ of 5·10⁴ steps is 37.1, below 38."""
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.Adam([w], 0.01, foreach=False)
    heights, found = torch.tensor([1.0, 50.0], dtype=torch.float64), []
    for step in range(50_000):
        w.grad = heights * w.detach()
        optimizer.step()
        if step >= 40_000:
            (scale,) = scales(optimizer, {"w": w}).values()
            found.append(float((scale.rate * heights / scale.entries).max()))
    assert np.median(found) == pytest.approx(37.12, rel=0.1)
    assert threshold(optimizer).constant == pytest.approx(38)


# ------------------------------------------------------------------------------------------------------ errors


def test_what_cannot_be_preconditioned_says_what_to_do() -> None:
    model, data, optimizer = stepped(ADAPTIVE["Adam"])
    with pytest.raises(ValueError, match="no optimizer: make it with"):
        preconditioner(Subject(model, data))
    with pytest.raises(ValueError, match=r"has not stepped yet.*take at least one step"):
        preconditioner(Subject(model, data, optimizer=torch.optim.Adam(model.parameters())))
    with pytest.raises(ValueError, match=r"does not hold 2\.weight"):
        preconditioner(Subject(copy.deepcopy(model), data, optimizer=optimizer))
    with pytest.raises(ValueError, match="no preconditioner is known for Rprop"):
        preconditioner(Subject(model, data, optimizer=torch.optim.Rprop(model.parameters())))
    with pytest.raises(ValueError, match="maximises"):
        preconditioner(Subject(model, data, optimizer=torch.optim.SGD(model.parameters(), maximize=True)))
    with pytest.raises(ValueError, match=r"shape \(2,\); got \(3,\)"):
        Preconditioned(Diagonal(torch.ones(2)), torch.ones(3))
    with pytest.raises(ValueError, match="negative or not finite"):
        Preconditioned(Diagonal(torch.ones(2)), torch.tensor([1.0, math.inf]))


def test_a_preconditioner_of_zeros_is_refused() -> None:
    model, data, optimizer = stepped(lambda p: torch.optim.Adam(p, 0.01, eps=0.0), steps=1)
    optimizer.state[next(model.parameters())]["exp_avg_sq"].zero_()
    with pytest.raises(ValueError, match="eps is 0"):
        preconditioner(Subject(model, data, optimizer=optimizer))
