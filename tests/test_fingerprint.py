"""Equal content, equal hash, whatever the objects; a difference anywhere shows."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from workbench.fingerprint import digest


def scaled(by: float) -> Callable[[float], float]:
    return lambda x: x * by


class Holder:
    """An object with attributes, one of which may be itself."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def cyclic(value: int) -> Holder:
    made = Holder(value=value)
    made.me = [made]
    return made


LAYER = nn.Linear(2, 2)
DIFFERENT: list[Any] = [
    None, 0, 0.0, False, "0", b"0", (), {}, (0,), ((0,),), [0, 0], {0: 0}, {"0": 0}, {0, 1},
    torch.zeros(2), torch.zeros(2, 1), torch.zeros(2).double(), torch.zeros(2).long(), torch.zeros(2).bfloat16(),
    torch.tensor([0.0, 1e-45]), torch.zeros(0), np.zeros(2), np.zeros(2, int), np.array(["a", None], object),
    abs, len, int, digest, scaled(1.0), scaled(2.0), lambda x: x, lambda x: x + 1, functools.partial(scaled, 1.0),
    functools.partial(scaled, 2.0), Holder(a=1), Holder(a=2), Holder(b=1), cyclic(1), cyclic(2), Holder(a=1).__init__,
    LAYER, nn.Linear(2, 2), nn.Dropout(0.1), nn.Dropout(0.2), nn.CrossEntropyLoss(), nn.CrossEntropyLoss(torch.ones(2)),
]  # fmt: skip


def test_different_things_have_different_hashes() -> None:
    for one, two in itertools.combinations(range(len(DIFFERENT)), 2):
        assert digest(DIFFERENT[one]) != digest(DIFFERENT[two]), (DIFFERENT[one], DIFFERENT[two])
    assert digest(1, 2) != digest((1, 2)) != digest(12)


def test_equal_things_have_equal_hashes_whether_shared_or_copied() -> None:
    for thing in DIFFERENT:
        assert digest(thing) == digest(copy.deepcopy(thing))
        assert digest([thing, thing]) == digest([thing, copy.deepcopy(thing)])
    assert digest(scaled(3.0)) == digest(scaled(3.0))
    x = torch.arange(6.0).reshape(2, 3)
    assert digest(x.T) == digest(x.T.contiguous())
    assert digest(LAYER.train()) == digest(LAYER.eval())


def test_a_wide_tangle_is_hashed_in_no_time() -> None:
    """Twenty-five layers of pairs of one object are 2^25 paths but 25 objects."""
    thing: Any = Holder(a=1)
    for _ in range(25):
        thing = Holder(left=thing, right=thing)
    assert digest(thing) == digest(thing)
