"""Standard, neural-tangent and maximal-update parametrisation: how initial sizes and learning rates go with the width.

A parametrisation is told by the exponents with which multiplier, initial standard deviation and learning rate of every
weight go with the width. A multiplier c in front of a weight does the same as an initial size times c and a learning
rate times c² (SGD) or c (Adam); so all three are written here without multipliers, and any module can take them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

Parametrisation = Literal["standard", "ntk", "mup"]
Rule = Literal["sgd", "adam"]
PARAMETRISATIONS: Mapping[Parametrisation, str] = {
    "standard": "one learning rate for all: as PyTorch has it",
    "ntk": "neural tangent: wide networks learn as their initial tangent kernel does",
    "mup": "maximal update: features of every layer learn at every width",
}
"""The parametrisations in words."""


@dataclass(frozen=True)
class Scale:
    """How one parameter goes with the width.

    ``ins`` and ``outs``: its growing dimensions over those of the base, 1 where one does not grow; ``init``: factor of
    its standard initial value; ``rate``: factor of the learning rate.
    """

    role: Literal["input", "hidden", "output", "fixed"]
    ins: float
    outs: float
    init: float
    rate: float


@dataclass(frozen=True, eq=False)
class Parametrised:
    """A model with initial values of a parametrisation, and what its optimizer is told.

    ``groups(lr)`` gives parameter groups for an optimizer of the ``rule`` that it was made for.
    """

    model: nn.Module
    scales: Mapping[str, Scale]
    parametrisation: Parametrisation
    rule: Rule

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups of parameters of one learning rate each, for torch.optim.SGD or Adam; ``lr`` is the base's."""
        found: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            found.setdefault(self.scales[name].rate, []).append(parameter)
        return [{"params": group, "lr": lr * rate} for rate, group in found.items()]

    def rates(self) -> dict[str, float]:
        """The factor of each parameter's learning rate."""
        return {name: scale.rate for name, scale in self.scales.items()}


def parametrised(
    build: Callable[[int], nn.Module],
    width: int,
    base: int,
    parametrisation: Parametrisation = "mup",
    rule: Rule = "sgd",
) -> Parametrised:
    """The model of one ``width``, with initial values and learning rates that go with the width as asked.

    At ``width == base`` all parametrisations are the model as built. Else each weight's initial value and learning rate
    get these factors, with m_in, m_out the growth of its two sides (1 for one that does not grow):

    ======== ====================== ====================== ======================
    ..       initial value          rate, SGD              rate, Adam
    ======== ====================== ====================== ======================
    standard 1                      1                      1
    ntk      1                      1 / m_in               1 / (m_in √m_out)
    mup      output: m_in^(-1/2)    m_out / m_in           1 / m_in
    ======== ====================== ====================== ======================

    A step then changes the outputs as much at every width under "mup" and "ntk", the features of hidden layers as much
    under "mup" and m^(-1/2) times as much under "ntk".

    ``build`` must itself give weights of variance ∝ 1/fan_in, as ``workbench.zoo`` and PyTorch do. Biases, gains and
    embeddings have one growing side, which is out. Biases start as built; mup asks only that they do not grow.

    Args:
        build: from a width to a freshly initialised model.
        width: wanted.
        base: the width at which learning rates are known.
        parametrisation: "standard", "ntk" or "mup".
        rule: the optimizer's: "sgd" (with or without momentum) or "adam" (AdamW, and others that divide by the size).

    Raises:
        ValueError: an unknown word; widths that change the parameters' names or nothing; attention heads whose size
            goes with the width; tied embeddings and outputs, which no factors of one tensor can serve.

    Source: Yang and Hu 2021 (Feature Learning in Infinite-Width Neural Networks); Yang et al. 2022 (Tensor Programs V,
    table 3); Jacot, Gabriel and Hongler 2018 for the neural tangent one.
    """
    for word, known in ((parametrisation, get_args(Parametrisation)), (rule, get_args(Rule))):
        if word not in known:
            raise ValueError(f"{word!r} is not known here; known: {', '.join(known)}.")
    model, small, large = build(width), build(base), build(2 * base)
    _check(model, small, large)
    scales = {name: _scale(*at, parametrisation, rule) for name, at in _growth(model, small, large).items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(scales[name].init)
    return Parametrised(model, scales, parametrisation, rule)


def _check(model: nn.Module, small: nn.Module, large: nn.Module) -> None:
    """Refuse what has no answer here."""
    names = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (model, small, large)]
    if any(set(names[0]) != set(n) or any(len(n[k]) != len(s) for k, s in names[0].items()) for n in names[1:]):
        raise ValueError("build(width) must give the same parameters at every width, of other sizes; names differ.")
    if names[1] == names[2]:
        raise ValueError("build(width) gives the same sizes at every width: nothing goes with the width.")
    pairs = zip(small.modules(), large.modules(), strict=True)
    if any(isinstance(a, nn.MultiheadAttention) and a.head_dim != getattr(b, "head_dim", None) for a, b in pairs):
        raise ValueError(
            "the size of the attention heads goes with the width, and logits would have to be divided by it; keep the "
            "size of a head fixed and let the number of heads go with the width."
        )
    tied = {n for n, _ in model.named_parameters(remove_duplicate=False)} - set(names[0])
    if tied:
        raise ValueError(f"{', '.join(sorted(tied))}: tied weights act as inputs and as outputs; untie them.")


def _growth(model: nn.Module, small: nn.Module, large: nn.Module) -> dict[str, tuple[float, float, bool]]:
    """(m_in, m_out, whether only the inputs grow) of each parameter: which sides grow, and by how much here."""
    found: dict[str, tuple[float, float, bool]] = {}
    others = dict(small.named_parameters()), dict(large.named_parameters())
    for name, parameter in model.named_parameters():
        base, wide = (tuple(o[name].shape) for o in others)
        ratio = [now / b if b != w else 1.0 for now, b, w in zip(parameter.shape, base, wide, strict=True)]
        grows = [b != w for b, w in zip(base, wide, strict=True)]
        matrix = len(ratio) > 1 and _is_map(model, name)
        ins = ratio[1] if matrix else 1.0
        outs = ratio[0] if matrix else math.prod(ratio)
        found[name] = ins, outs, matrix and grows[1] and not grows[0]
    return found


def _is_map(model: nn.Module, name: str) -> bool:
    """Whether a parameter is (out, in, ...): all of two and more dimensions but embeddings and places."""
    path, _, attribute = name.rpartition(".")
    holder = model.get_submodule(path)
    if isinstance(holder, nn.Embedding | nn.EmbeddingBag):
        return False
    return attribute.startswith(("weight", "in_proj_weight", "q_proj", "k_proj", "v_proj"))


def _scale(ins: float, outs: float, readout: bool, parametrisation: Parametrisation, rule: Rule) -> Scale:
    role = "output" if readout else "hidden" if ins != 1 else "input" if outs != 1 else "fixed"
    init, rate = 1.0, 1.0
    if parametrisation == "ntk":
        rate = 1 / ins if rule == "sgd" else outs**-0.5 / ins
    elif parametrisation == "mup":
        init = ins**-0.5 if readout else 1.0
        rate = outs / ins if rule == "sgd" else 1 / ins
    return Scale(role, ins, outs, init, rate)
