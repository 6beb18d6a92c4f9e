"""Initial weights of low rank at an unchanged size."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Net = TypeVar("Net", bound=nn.Module)


def low_rank(net: Net, rank: int, layers: tuple[str, ...] = ()) -> Net:
    """Keep the ``rank`` largest singular values of each weight matrix, in place, scaled to its Frobenius norm before.

    Rank without the norm would confound it with the scale of the weights. Convolutions count as (out, in · k²).

    Args:
        net: a model; returned.
        rank: at least 1; matrices of lower rank stay as they are.
        layers: names of modules whose weights are taken; empty: all with a weight of two and more dimensions.

    Raises:
        ValueError: a rank below 1, or a name that no module with such a weight has.

    Source: the protocol of Liu et al. 2023 (arXiv 2310.08513).
    """
    if rank < 1:
        raise ValueError(f"low_rank keeps at least one singular value; got rank={rank}.")
    matrices = {
        name.removesuffix(".weight"): parameter
        for name, parameter in net.named_parameters()
        if name.endswith(".weight") and parameter.ndim > 1
    }
    unknown = set(layers) - set(matrices)
    if unknown:
        raise ValueError(f"no weight matrix in {', '.join(sorted(unknown))}; there are {', '.join(matrices)}.")
    with torch.no_grad():
        for name in layers or matrices:
            _cut(matrices[name], rank)
    return net


def _cut(weight: nn.Parameter, rank: int) -> None:
    matrix = weight.double().flatten(1)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = (left[:, :rank] * values[:rank]) @ right[:rank]
    weight.copy_((kept * (matrix.norm() / kept.norm())).view(weight.shape))
