"""Every loss is an exact sum: L does not depend on how the data are split, and equals PyTorch's own value on the "
"whole."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from workbench.losses import NAMES, Loss
from workbench.reductions import make
from workbench.subject import Subject

N = 9


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SCORES, LABELS = double(N, 4), torch.arange(N) % 4
SOFT = double(N, 4, seed=1).softmax(-1)
TOKENS, IDS = double(N, 5, 7, seed=2), torch.arange(5 * N).reshape(N, 5) % 7
IDS = IDS.masked_fill(double(N, 5, seed=3) > 0.8, -100)
IDS[2] = -100
VALUES = double(N, 4, seed=4)
YES = (double(N, seed=5) > 0).long()
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 4).sum(1).mean()


def sum_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 4).sum()


def each_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 4).sum(1)


FOURTH = float(each_loss(SCORES, VALUES).mean())

CASES: dict[str, tuple[Any, Tensor, Tensor, float]] = {
    "classes": ("cross_entropy", SCORES, LABELS, float(F.cross_entropy(SCORES, LABELS))),
    "classes as int32 column": ("cross_entropy", SCORES, LABELS[:, None].int(), float(F.cross_entropy(SCORES, LABELS))),
    "probabilities": ("cross_entropy", SCORES, SOFT, float(F.cross_entropy(SCORES, SOFT))),
    "tokens": ("cross_entropy", TOKENS, IDS, float(F.cross_entropy(TOKENS.movedim(-1, 1), IDS))),
    "tokens, classes first": (
        "cross_entropy", TOKENS.movedim(-1, 1), IDS, float(F.cross_entropy(TOKENS.movedim(-1, 1), IDS)),
    ),
    "nll": ("nll", SCORES.log_softmax(-1), LABELS, float(F.cross_entropy(SCORES, LABELS))),
    "half_mse": ("half_mse", SCORES, VALUES, float(0.5 * ((SCORES - VALUES) ** 2).sum() / N)),
    "half_mse of classes": (
        "half_mse", SCORES, LABELS, float(0.5 * ((SCORES - F.one_hot(LABELS, 4)) ** 2).sum() / N),
    ),
    "mse": ("mse", SCORES, VALUES, float(F.mse_loss(SCORES, VALUES))),
    "mse of a column": ("mse", SCORES[:, :1], VALUES[:, 0], float(F.mse_loss(SCORES[:, 0], VALUES[:, 0]))),
    "l1": ("l1", SCORES, VALUES, float(F.l1_loss(SCORES, VALUES))),
    "binary": (
        "binary_cross_entropy_with_logits", SCORES[:, :1], YES,
        float(F.binary_cross_entropy_with_logits(SCORES[:, 0], YES.double())),
    ),
    "module": (nn.CrossEntropyLoss(), SCORES, LABELS, float(F.cross_entropy(SCORES, LABELS))),
    "weighted module": (nn.CrossEntropyLoss(WEIGHTS), SCORES, LABELS, float(F.cross_entropy(SCORES, LABELS, WEIGHTS))),
    "weighted soft": (nn.CrossEntropyLoss(WEIGHTS), SCORES, SOFT, float(F.cross_entropy(SCORES, SOFT, WEIGHTS))),
    "smoothed and ignoring": (
        nn.CrossEntropyLoss(WEIGHTS, ignore_index=2, label_smoothing=0.1), SCORES, LABELS,
        float(F.cross_entropy(SCORES, LABELS, WEIGHTS, ignore_index=2, label_smoothing=0.1)),
    ),
    "token module": (
        nn.CrossEntropyLoss(), TOKENS.movedim(-1, 1), IDS, float(F.cross_entropy(TOKENS.movedim(-1, 1), IDS)),
    ),
    "summing module": (nn.CrossEntropyLoss(reduction="sum"), SCORES, LABELS, float(F.cross_entropy(SCORES, LABELS))),
    "nll module": (
        nn.NLLLoss(WEIGHTS), SCORES.log_softmax(-1), LABELS, float(F.nll_loss(SCORES.log_softmax(-1), LABELS, WEIGHTS)),
    ),
    "mse module": (nn.MSELoss(), SCORES, VALUES, float(F.mse_loss(SCORES, VALUES))),
    "summing mse module": (nn.MSELoss(reduction="sum"), SCORES, VALUES, float(((SCORES - VALUES) ** 2).sum() / N)),
    "huber module": (nn.HuberLoss(), SCORES, VALUES, float(F.huber_loss(SCORES, VALUES))),
    "batchmean module": (
        nn.KLDivLoss(reduction="batchmean"), SCORES.log_softmax(-1), SOFT,
        float(F.kl_div(SCORES.log_softmax(-1), SOFT, reduction="batchmean")),
    ),
    "function": (F.cross_entropy, SCORES, LABELS, float(F.cross_entropy(SCORES, LABELS))),
    "partial": (
        functools.partial(F.cross_entropy, label_smoothing=0.2), SCORES, LABELS,
        float(F.cross_entropy(SCORES, LABELS, label_smoothing=0.2)),
    ),
    "partial of smooth l1": (
        functools.partial(F.smooth_l1_loss, beta=0.5), SCORES, VALUES,
        float(F.smooth_l1_loss(SCORES, VALUES, beta=0.5)),
    ),
    "own mean": (mean_loss, SCORES, VALUES, FOURTH),
    "own sum": (sum_loss, SCORES, VALUES, FOURTH),
    "own, each": (each_loss, SCORES, VALUES, FOURTH),
}  # fmt: skip


def settle(name: str) -> tuple[Loss, Tensor, Tensor, float]:
    given_loss, outputs, targets, wanted = CASES[name]
    return make(given_loss, None, outputs[:4], targets[:4], 4), outputs, targets, wanted


def value(loss: Loss, outputs: Tensor, targets: Tensor, cuts: list[int]) -> float:
    edges = [0, *cuts, len(outputs)]
    parts = [(outputs[a:b], targets[a:b], b - a) for a, b in itertools.pairwise(edges)]
    weight = sum(loss.weight(outputs[:4].shape, t, n) for _, t, n in parts)
    return float(sum(loss.total(o, t, n) for o, t, n in parts)) / weight


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=25)
@given(st.lists(st.integers(1, N - 1), unique=True).map(sorted))
def test_any_split_gives_pytorchs_value_of_the_whole(name: str, cuts: list[int]) -> None:
    loss, outputs, targets, wanted = settle(name)
    assert value(loss, outputs, targets, cuts) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_examples_add_up_to_the_total_and_the_weight(name: str) -> None:
    loss, outputs, targets, _ = settle(name)
    assert loss.each is not None
    totals, weights = loss.each(outputs, targets)
    assert totals.shape == weights.shape == (N,)
    assert float(totals.sum()) == pytest.approx(float(loss.total(outputs, targets, N)), rel=1e-12)
    assert float(weights.sum()) == pytest.approx(loss.weight(outputs.shape, targets, N), rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_losses_are_twice_differentiable(name: str) -> None:
    loss, outputs, targets, _ = settle(name)
    if name != "l1":
        at = outputs[:3].clone().requires_grad_()
        assert torch.autograd.gradgradcheck(lambda o: loss.total(o, targets[:3], 3), (at,))


def test_wrong_decisions_are_counted_over_what_counts() -> None:
    loss, outputs, targets, _ = settle("tokens")
    wrong, decided = loss.wrong(outputs, targets) or (None, None)
    kept = targets != -100
    assert decided is not None
    assert wrong is not None
    assert decided.tolist() == kept.sum(1).tolist()
    assert wrong.tolist() == [int((o.argmax(-1) != t)[k].sum()) for o, t, k in zip(outputs, targets, kept, strict=True)]
    loss, outputs, targets, _ = settle("binary")
    assert (loss.wrong(outputs, targets) or (YES,))[0].tolist() == ((outputs[:, 0] > 0) != YES).int().tolist()
    assert settle("mse")[0].wrong(SCORES, VALUES) is None


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs @ outputs.T).logsumexp(1).sum()


def wrong_length(outputs: Tensor, targets: Tensor) -> Tensor:
    return each_loss(outputs, targets)[:-1]


def fails(outputs: Tensor, targets: Tensor) -> Tensor:
    raise RuntimeError("shapes")


REFUSED: dict[str, tuple[Any, Any, Tensor, Any, type[Exception], str]] = {
    "unknown name": ("crossentropy", None, SCORES, LABELS, ValueError, "cross_entropy, half_mse"),
    "no loss": (3, None, SCORES, LABELS, TypeError, "got int"),
    "unknown reduction": ("mse", "average", SCORES, VALUES, ValueError, "'average'"),
    "coupled": (contrastive, None, SCORES, LABELS, ValueError, "reduction='mean'"),
    "zero": (lambda o, t: o.sum() * 0, None, SCORES, LABELS, ValueError, "reduction="),
    "wrong length": (wrong_length, None, SCORES, VALUES, ValueError, r"\(8,\).*9 examples"),
    "not a vector": (each_loss, "mean", SCORES, VALUES, ValueError, "one number"),
    "not for each": (mean_loss, "none", SCORES, VALUES, ValueError, r"\(9,\)"),
    "fails": (fails, None, SCORES, VALUES, ValueError, r"outputs \(9, 4\) float64, targets \(9, 4\) float64: shapes"),
    "no tensor": (lambda o, t: 1.0, None, SCORES, VALUES, TypeError, "got float"),
    "real targets": ("cross_entropy", None, SCORES, VALUES[:, 0], ValueError, "targets.long"),
    "boolean targets": ("cross_entropy", None, SCORES, YES.bool(), ValueError, "targets.long"),
    "nll of real targets": ("nll", None, SCORES, VALUES[:, 0], ValueError, "targets.long"),
    "text": ("cross_entropy", None, SCORES, ["a"] * N, ValueError, "got list"),
    "one output": ("cross_entropy", None, SCORES[:, 0], LABELS, ValueError, "yes-or-no"),
    "transposed": (nn.CrossEntropyLoss(), None, TOKENS, IDS, ValueError, r"\(N, C, S\)"),
    "broadcast": ("mse", None, SCORES, VALUES[:, :2], ValueError, r"shape \(9, 4\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_settled_is_refused_with_what_to_do(name: str) -> None:
    loss, reduction, outputs, targets, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        make(loss, reduction, outputs, targets, N)


@pytest.mark.parametrize(
    ("name", "targets", "words"),
    [
        ("cross_entropy", torch.tensor([0, 4]), "label 4 is out of range.*0 to 3"),
        ("cross_entropy", torch.tensor([0, -1]), "label -1 is out of range"),
        ("binary_cross_entropy_with_logits", torch.tensor([0.5, 1.5]), "from 0 to 1"),
    ],
)
def test_targets_out_of_range_are_named(name: str, targets: Tensor, words: str) -> None:
    outputs = SCORES if name == "cross_entropy" else SCORES[:, :1]
    loss = make(name, None, outputs, LABELS if name == "cross_entropy" else YES, N)
    with pytest.raises(ValueError, match=words):
        loss.check_all(outputs.shape, targets)


def test_a_given_reduction_goes_before_all_others() -> None:
    """f = Σ over the batch / 2, told to be a mean: then L weighs it by examples, as said."""
    half: Callable[..., Tensor] = lambda o, t: sum_loss(o, t) / 2  # noqa: E731
    assert value(make(half, "sum", SCORES, VALUES, N), SCORES, VALUES, []) == pytest.approx(FOURTH / 2)
    assert value(make(half, "mean", SCORES, VALUES, N), SCORES, VALUES, []) == pytest.approx(FOURTH / 2 * N)
    assert {
        make(name, None, SCORES, t, N).name
        for name, t in zip(NAMES, (LABELS, VALUES, VALUES, VALUES, SOFT, LABELS), strict=True)
    } == set(NAMES)


@pytest.mark.parametrize("positions", [4, 9])
@pytest.mark.parametrize("class_first", [True, False])
def test_token_classes_are_found_in_either_dimension(positions: int, class_first: bool):
    torch.manual_seed(0)
    outputs, targets = torch.randn(8, 6, positions, dtype=torch.float64), torch.randint(0, 6, (8, positions))
    wanted = nn.functional.cross_entropy(outputs, targets).item()
    given = outputs if class_first else outputs.transpose(1, 2)
    subject = Subject(Handed(given), (torch.arange(8), targets))
    assert subject.classes == 6
    assert subject.loss() == pytest.approx(wanted, rel=1e-12)


def test_as_many_positions_as_classes_are_not_guessed():
    torch.manual_seed(0)
    outputs, targets = torch.randn(8, 6, 6, dtype=torch.float64), torch.randint(0, 6, (8, 6))
    with pytest.raises(ValueError, match="fit both"):
        Subject(Handed(outputs), (torch.arange(8), targets))
    subject = Subject(Handed(outputs), (torch.arange(8), targets), loss=nn.functional.cross_entropy)
    assert subject.loss() == pytest.approx(nn.functional.cross_entropy(outputs, targets).item(), rel=1e-12)


class Handed(nn.Module):
    """Gives the rows of a table that it was handed, times a parameter that is one."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.gain * self.table[rows]
