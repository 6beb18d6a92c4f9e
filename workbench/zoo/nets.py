"""Small nets, built from plain JSON arguments and initialised by a seed of their own.

Every builder gives the same weights for the same arguments and leaves the global random state alone, so that a record
can name it (``"workbench.zoo.nets:dense"``) and a probe can rebuild the net while training goes on elsewhere.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import nn

Net = TypeVar("Net", bound=nn.Module)
Activation = Literal["relu", "tanh", "gelu", "identity"]
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "identity": nn.Identity,
}


def dense(
    widths: Sequence[int] = (64, 32, 10), activation: Activation = "tanh", bias: bool = True, seed: int = 0
) -> nn.Sequential:
    """A fully connected net: flatten, then linear maps between ``widths`` with the activation between them.

    Args:
        widths: input size, hidden sizes, output size; at least two numbers.
        activation: "relu", "tanh", "gelu" or "identity".
        bias: whether the linear maps have one.
        seed: of the initial weights.
    """
    if len(widths) < 2 or any(w < 1 for w in widths):
        raise ValueError(f"dense(widths=...) needs at least an input and an output size, all >= 1; got {list(widths)}.")
    parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for layer, (ins, outs) in enumerate(itertools.pairwise(widths), 1):
        if layer > 1:
            parts[f"activation{layer - 1}"] = _activation(activation)
        parts[f"linear{layer}"] = nn.utils.skip_init(nn.Linear, ins, outs, bias=bias)
    return initialise(nn.Sequential(parts), seed)


def conv(
    channels: Sequence[int] = (8, 16),
    classes: int = 10,
    size: int = 8,
    inputs: int = 1,
    activation: Activation = "relu",
    batch_norm: bool = False,
    seed: int = 0,
) -> nn.Sequential:
    """A convolutional net: 3 x 3 convolutions, each followed by the activation and a halving, then one linear map.

    Args:
        channels: output channels of each convolution.
        classes: number of outputs.
        size: side of the square images; must stay >= 1 after one halving for each convolution.
        inputs: channels of the images.
        activation: "relu", "tanh", "gelu" or "identity".
        batch_norm: put BatchNorm between each convolution and its activation.
        seed: of the initial weights.
    """
    side = size >> len(channels)
    if not channels or side < 1:
        raise ValueError(f"conv: images of side {size} cannot be halved {len(channels)} times; use fewer channels.")
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for layer, (ins, outs) in enumerate(zip((inputs, *channels), channels, strict=False), 1):
        parts[f"conv{layer}"] = nn.utils.skip_init(nn.Conv2d, ins, outs, 3, padding=1)
        if batch_norm:
            parts[f"norm{layer}"] = nn.BatchNorm2d(outs)
        parts[f"activation{layer}"] = _activation(activation)
        parts[f"pool{layer}"] = nn.AvgPool2d(2)
    parts["flatten"] = nn.Flatten()
    parts["classifier"] = nn.utils.skip_init(nn.Linear, channels[-1] * side * side, classes)
    return initialise(nn.Sequential(parts), seed)


def _activation(name: str) -> nn.Module:
    if name not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]()


def initialise(net: Net, seed: int) -> Net:
    """Draw every linear and convolutional weight and bias from U(-1/√fan_in, 1/√fan_in), by a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for tensor in module.parameters(recurse=False):
                nn.init.uniform_(tensor, -bound, bound, generator=generator)
    return net
