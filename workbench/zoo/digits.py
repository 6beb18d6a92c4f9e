"""Handwritten digits that come with scikit-learn: 1797 real images of 8 x 8 pixels, no download."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Part = Literal["train", "test", "all"]
IMAGES = 1797
"""Images that there are in all."""


class Digits(NamedTuple):
    """Images (N, 1, 8, 8) in [-1, 1], float32, and their classes (N,), int64, split at random into two parts."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(test_fraction: float = 0.25, seed: int = 0) -> Digits:
    """The images, shuffled by ``seed`` and split; the same split each time, and the global random state untouched.

    Args:
        test_fraction: share of the 1797 images that is held out, in (0, 1).
        seed: of the shuffle.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"digits(test_fraction=...) must lie between 0 and 1; got {test_fraction!r}.")
    inputs, targets = _images()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(inputs)))
    held_out = round(test_fraction * len(inputs))
    test, train = order[:held_out], order[held_out:]
    return Digits((inputs[train], targets[train]), (inputs[test], targets[test]))


def examples(part: Part = "train", test_fraction: float = 0.25, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One part of the split as (inputs, targets): what a record names as ``"workbench.zoo.digits:examples"``."""
    if part == "all":
        return tuple(t.clone() for t in _images())  # pyright: ignore[reportReturnType]
    split = digits(test_fraction, seed)._asdict()
    if part not in split:
        raise ValueError(f"digits has the parts 'train', 'test' and 'all'; got {part!r}.")
    return split[part]


def standardised(count: int = IMAGES, seed: int = 0, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """So many of the images, drawn by ``seed``, flat (count, 64), and their classes.

    Each pixel has its mean over all images taken off and is divided by its standard deviation there plus ``floor``,
    which keeps pixels that hardly ever differ from counting as much as the others; one that never does is 0. Small nets
    memorise random labels several times faster from these than from the images.
    """
    if not 1 <= count <= IMAGES:
        raise ValueError(
            f"standardised(count=...) must lie between 1 and {IMAGES}, the images that there are; got {count!r}."
        )
    inputs, targets = _images()
    flat = inputs.flatten(1)
    flat = (flat - flat.mean(0)) / (flat.std(0) + floor).clamp_min(1e-6)
    rows = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(seed))[:count]
    return flat[rows], targets[rows]


@lru_cache(maxsize=1)
def _images() -> tuple[Tensor, Tensor]:
    state = random.getstate()
    from sklearn.datasets import load_digits  # whose first import draws from Python's own generator

    random.setstate(state)
    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(np.asarray(pixels, dtype=np.float32)).reshape(-1, 1, 8, 8)
    return images / 8 - 1, torch.from_numpy(np.asarray(classes, dtype=np.int64))
