"""Which matrices a model has: by tensors cut by hand, circular convolutions of unit images, and a coverage report."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pytest import approx
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from workbench.spectra.weight_numbers import decompose, sizes, tail
from workbench.spectra.weights import Reshape, Weights, weight_matrices
from workbench.subject import Subject


class Everything(nn.Module):
    """Attention of both kinds, recurrence, parametrisations, ties, frozen and bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.att = nn.MultiheadAttention(6, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(6, 2, kdim=4, vdim=3, batch_first=True)
        self.place = nn.Parameter(torch.randn(1, 3, 6))
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.plain = parametrizations.weight_norm(nn.Linear(5, 7))
        self.words, self.head = nn.Embedding(4, 7), nn.Linear(7, 4, bias=False)
        self.head.weight = self.words.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.att(x + self.place, x, x, need_weights=False)[0]
        h = h + self.cross(h, x[..., :4], x[..., :3], need_weights=False)[0]
        return self.frozen(self.head(self.plain(self.lstm(h)[0][:, -1]) + self.words.weight[0]))


def subject(module: nn.Module, shape: tuple[int, ...]) -> Subject:
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.double().parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64))
    return Subject(module, (torch.randn(5, *shape, generator=rng, dtype=torch.float64), torch.arange(5) % 3))


def stacks(found: Weights) -> dict[str, Tensor]:
    return {m.name: m.of(found.tensors) for m in found.matrices}


def test_every_matrix_of_a_model_is_found_once() -> None:
    model = Everything()
    here = subject(model, (3, 6))
    found = weight_matrices(here, Reshape())
    thirds = dict(zip("qkv", model.att.in_proj_weight.detach().chunk(3), strict=True))
    wanted = {f"att.{word}": third for word, third in thirds.items()} | {
        "att.out_proj": model.att.out_proj.weight,
        "cross.q": model.cross.q_proj_weight,
        "cross.k": model.cross.k_proj_weight,
        "cross.v": model.cross.v_proj_weight,
        "cross.out_proj": model.cross.out_proj.weight,
        "place": model.place[0],
        "lstm.weight_ih_l0": model.lstm.weight_ih_l0,
        "lstm.weight_hh_l0": model.lstm.weight_hh_l0,
        "plain": model.plain.weight,
        "words": model.words.weight,
        "frozen": model.frozen.weight,
    }
    given = stacks(found)
    assert given.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(given[name][0], weight.detach()), name
    for matrix in found.matrices:
        assert matrix.shape == tuple(given[matrix.name].shape)
        assert matrix.count == min(matrix.shape[1:])
    together = weight_matrices(here, Reshape(), "together", ["att"])
    assert torch.equal(stacks(together)["att.in_proj_weight"][0], model.att.in_proj_weight.detach())


def test_the_coverage_report_leaves_no_parameter_out() -> None:
    here = subject(Everything(), (3, 6))
    found = {c.name: c for c in weight_matrices(here, Reshape(), layers=["att", "lstm.weight*"]).covered}
    assert found.keys() == {name for name, _ in here.module.named_parameters()}
    assert sum(c.size for c in found.values()) == sum(p.numel() for p in here.module.parameters())
    for name, c in found.items():
        inside = name in ("att.in_proj_weight", "att.out_proj.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0")
        vector = here.module.get_parameter(name).ndim < 2
        assert c.reason == ("analysed" if inside else "vector" if vector else "left out"), name
        assert c.frozen == name.startswith("frozen")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_a_convolution_as_the_operator_that_it_is(groups: int, kind: type[nn.Conv1d | nn.Conv2d]) -> None:
    """ "fourier" has the singular values of the circular convolution's matrix, built from its action on unit images."""
    side, places = 4, 1 if kind is nn.Conv1d else 2
    model = nn.Sequential(
        kind(4, 6, 3, groups=groups, padding=1, padding_mode="circular"), nn.Flatten(), nn.LazyLinear(3)
    )
    model(torch.zeros(1, 4, *[side] * places))
    here = subject(model, (4, *[side] * places))
    images = torch.eye(4 * side**places, dtype=torch.float64).reshape(-1, 4, *[side] * places)
    with torch.no_grad():
        whole = (model[0](images) - model[0](0 * images)).flatten(1)
    weight = model[0].weight.detach()

    def values(convolution: str) -> np.ndarray:
        found = weight_matrices(here, Reshape(convolution, side), layers=["0"])  # type: ignore[arg-type]
        (matrix,) = found.matrices
        return decompose(matrix, matrix.of(found.tensors), torch.float64).sigma

    exact = torch.linalg.svdvals(whole).numpy()
    fourier = values("fourier")
    assert fourier == approx(exact[: len(fourier)], abs=1e-10)
    assert exact[len(fourier) :] == approx(0, abs=1e-10)
    apart = [p.flatten(1) for p in weight.chunk(groups)]
    assert values("matrix") == approx(np.sort(np.concatenate([torch.linalg.svdvals(p) for p in apart]))[::-1])
    kernels = [p[(..., *at)] for p in weight.chunk(groups) for at in np.ndindex(*weight.shape[2:])]
    assert values("slices") == approx(np.sort(np.concatenate([torch.linalg.svdvals(k) for k in kernels]))[::-1])


def linear(weight: Tensor) -> Weights:
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    here = subject(model, (weight.shape[1],))
    return weight_matrices(here.at({"weight": weight}), Reshape())


def test_norms_and_ranks_by_hand() -> None:
    turns = [torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (6, 9)]
    sigma = np.array([4.0, 2.0, 1.0, 1.0, 0.0, 0.0])
    found = linear(turns[0] @ torch.diag(torch.from_numpy(sigma)) @ turns[1][:6])
    (matrix,) = found.matrices
    spectrum = decompose(matrix, matrix.of(found.tensors), torch.float64)
    shares = sigma[:4] / sigma.sum()
    wanted = {
        "blocks": 1, "rows": 6, "columns": 9, "value_count": 6, "zeros": 2, "spectral_norm": 4,
        "frobenius_norm": math.sqrt(22), "stable_rank": 22 / 16, "effective_rank": math.exp(-shares @ np.log(shares)),
        "log_norm": math.log10(22), "log_spectral_norm": math.log10(16), "entry_std": math.sqrt(22 / 54),
    }  # fmt: skip
    assert sizes(spectrum) == approx(wanted)
    assert spectrum.positive == approx(sigma[:4] ** 2)


@pytest.mark.parametrize(
    ("law", "called"),
    [("power", True), ("exponential", False), ("lognormal", False), ("random", False), ("equal", False)],
)
def test_only_a_power_law_is_called_one(law: str, called: bool) -> None:
    rng = np.random.default_rng(3)
    squares = {
        "power": rng.uniform(size=300) ** (-1 / 1.8),
        "exponential": 1 + rng.exponential(1, 300),
        "lognormal": rng.lognormal(0, 0.5, 300),
        "random": np.linalg.svd(rng.normal(size=(300, 400)), compute_uv=False) ** 2,
        "equal": 1 + 1e-6 * rng.uniform(size=300),
    }[law]
    found = linear(torch.diag(torch.from_numpy(np.sqrt(squares))))
    (matrix,) = found.matrices
    values, missing = tail(decompose(matrix, matrix.of(found.tensors), torch.float64), rng, 60, "two-sided")
    assert bool(values.get("power_law", False)) == called
    assert ("equal" in missing) == (law == "equal")
    if called:
        assert values["alpha_low"] < 2.8 < values["alpha_high"]
        ordered = np.sort(squares)
        assert values["alpha_weighted"] == approx(values["alpha"] * math.log10(ordered[-1]))
        assert values["log_alpha_norm"] == approx(math.log10((ordered ** values["alpha"]).sum()))


@pytest.mark.parametrize(
    ("module", "shape", "layers", "said"),
    [(nn.Linear(4, 3), (4,), ["conv*"], "names none of the 1 weight"), (nn.Linear(4, 3), (4,), ["bias"], "names none")],
)
def test_a_name_that_is_none_is_told(module: nn.Module, shape: tuple[int, ...], layers: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        weight_matrices(subject(module, shape), Reshape(), layers=layers)
