"""Parametrisations: the coordinate check, equality at the base, the NTK's width-free kernel, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workbench.zoo.nets import conv, dense
from workbench.zoo.parametrisation import parametrised
from workbench.zoo.transformer import transformer

BASE, WIDTHS, SEEDS = 32, (64, 256), 2
GENERATOR = torch.Generator().manual_seed(0)
ROWS, IMAGES = torch.randn(32, 16, generator=GENERATOR), torch.randn(32, 1, 8, 8, generator=GENERATOR)
TOKENS, TARGETS = torch.randint(0, 16, (32, 8), generator=GENERATOR), torch.randn(32, 4, generator=GENERATOR)

Build = Callable[[int, int], nn.Module]
NETS: dict[str, tuple[Build, Tensor]] = {
    "dense": (lambda width, seed: dense([16, width, width, 4], "relu", seed=seed), ROWS),
    "conv": (lambda width, seed: conv([width, width], 4, 8, seed=seed), IMAGES),
    "transformer": (lambda width, seed: transformer(16, 4, 8, width, 8, 2, read="mean", seed=seed), TOKENS),
}
OPTIMIZERS = {"sgd": (torch.optim.SGD, 0.05), "adam": (torch.optim.Adam, 0.005)}
OUTPUTS = {"linear3", "classifier", "head"}


@contextmanager
def features(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What each layer with weights gives."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: found.__setitem__(name, out.detach()))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)
    ]
    yield found
    for hook in hooks:
        hook.remove()


def changes(build: Build, x: Tensor, width: int, seed: int, words: tuple[str, str]) -> dict[str, float]:
    """Mean size of the change of each layer's features by three steps."""
    made = parametrised(lambda w: build(w, seed), width, BASE, *words)  # type: ignore[arg-type]
    kind, lr = OPTIMIZERS[words[1]]
    optimizer = kind(made.groups(lr))
    with features(made.model) as seen:
        made.model(x)
        before = dict(seen)
        for _ in range(3):
            optimizer.zero_grad()
            (made.model(x) - TARGETS).square().mean().backward()
            optimizer.step()
        made.model(x)
    return {name: float((seen[name] - before[name]).abs().mean()) for name in seen}


def slopes(net: str, *words: str) -> dict[str, float]:
    """d log(change) / d log(width) of each layer."""
    build, x = NETS[net]
    runs = [[changes(build, x, width, seed, words) for seed in range(SEEDS)] for width in WIDTHS]  # type: ignore[arg-type]
    logs = {name: [np.log(np.mean([run[name] for run in seeds])) for seeds in runs] for name in runs[0][0]}
    return {name: float(np.polyfit(np.log(WIDTHS), values, 1)[0]) for name, values in logs.items()}


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("net", NETS)
def test_coordinate_check(net: str, rule: str) -> None:
    """Maximal update: all features change alike at every width; neural tangent: hidden ones by width^(-1/2)."""
    mup, ntk, standard = (slopes(net, word, rule) for word in ("mup", "ntk", "standard"))
    assert all(abs(slope) < 0.3 for slope in mup.values()), mup
    assert all(-0.75 < slope < -0.3 for name, slope in ntk.items() if name not in OUTPUTS), ntk
    assert all(abs(ntk[name]) < 0.3 for name in OUTPUTS & set(ntk)), ntk
    assert max(abs(slope) for slope in standard.values()) > 0.35, standard


@pytest.mark.parametrize("net", NETS)
def test_all_are_the_model_as_built_at_the_base(net: str) -> None:
    build, _ = NETS[net]
    wanted = build(BASE, 3).state_dict()
    for word in ("standard", "ntk", "mup"):
        made = parametrised(lambda w: build(w, 3), BASE, BASE, word)  # type: ignore[arg-type]
        assert all(torch.equal(wanted[name], t) for name, t in made.model.state_dict().items())
        assert set(made.rates().values()) == {1.0}
        assert len(made.groups(0.1)) == 1


def test_rates_and_roles_of_every_kind_of_weight() -> None:
    made = parametrised(lambda w: transformer(16, 4, 8, w, 8, 1), 4 * BASE, BASE, "mup", "adam")
    wanted = {
        "embedding.weight": ("input", 1.0),
        "places": ("input", 1.0),
        "blocks.0.norm1.weight": ("input", 1.0),
        "blocks.0.query.weight": ("hidden", 0.25),
        "blocks.0.up.bias": ("input", 1.0),
        "head.weight": ("output", 0.25),
        "head.bias": ("fixed", 1.0),
    }
    assert {name: (made.scales[name].role, made.scales[name].rate) for name in wanted} == wanted
    groups = made.groups(0.5)
    assert sorted(g["lr"] for g in groups) == [0.125, 0.5]
    assert sum(len(g["params"]) for g in groups) == len(list(made.model.parameters()))


def test_the_tangent_kernel_weighted_by_the_rates_does_not_grow_under_ntk() -> None:
    """Σ_l rate_l J_l J_lᵀ is the kernel of the network with multipliers: of one size at every width; SP's grows."""
    kernels = {word: [_kernel(word, width) for width in (64, 512)] for word in ("standard", "ntk")}
    assert kernels["ntk"][1] == pytest.approx(kernels["ntk"][0], rel=0.15)
    assert kernels["standard"][1] > 4 * kernels["standard"][0]


def _kernel(word: str, width: int) -> float:
    totals = []
    for seed in range(3):
        made = parametrised(lambda w, s=seed: dense([16, w, w, 1], "relu", seed=s), width, BASE, word)  # type: ignore[arg-type]
        rates = made.rates()
        for x in ROWS[:4]:
            names, tensors = zip(*made.model.named_parameters(), strict=True)
            grads = torch.autograd.grad(made.model(x[None]).sum(), tensors)
            totals.append(sum(rates[n] * float(g.square().sum()) for n, g in zip(names, grads, strict=True)))
    return float(np.mean(totals))


class Tied(nn.Module):
    """An embedding that is the output map too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda w: nn.Linear(4, 2), "gives the same sizes at every width"),
        (lambda w: nn.Sequential(*(nn.Linear(w, w) for _ in range(w // 32))), "names differ"),
        (lambda w: nn.MultiheadAttention(w, 2), "size of the attention heads"),
        (Tied, "untie them"),
    ],
)
def test_what_has_no_answer_is_refused(build: Callable[[int], nn.Module], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parametrised(build, 64, 32)


def test_unknown_words_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="standard, ntk, mup"):
        parametrised(lambda w: dense([4, w, 2]), 64, 32, "sp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of head"):
        transformer(width=10, head=8)
    with pytest.raises(ValueError, match="all sizes >= 1"):
        transformer(hidden=-1)
    with pytest.raises(ValueError, match="'last', 'mean' or 'every'"):
        transformer(read="first")  # type: ignore[arg-type]


def test_a_transformer_depends_on_its_arguments_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (transformer(seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert transformer(read="every")(TOKENS).shape == (32, 8, 16)
    small = transformer(hidden=5, embedding_scale=0.1).state_dict()
    assert small["blocks.0.up.weight"].shape == (5, 32)
    assert transformer().state_dict()["blocks.0.up.weight"].shape == (128, 32)
    assert torch.allclose(small["embedding.weight"], 0.1 * transformer().state_dict()["embedding.weight"])
    assert torch.allclose(small["places"], 0.1 * transformer().state_dict()["places"])


def test_a_causal_transformer_does_not_look_ahead() -> None:
    net, changed = transformer(causal=True, read="every").double(), TOKENS.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 16
    one, two = net(TOKENS), net(changed)
    assert torch.equal(one[:, :5], two[:, :5])
    assert not torch.equal(one[:, 5:], two[:, 5:])
