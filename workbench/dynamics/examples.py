"""The examples that a record carries, so that others can probe it: stored when small, named when not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from workbench import record
from workbench.data import freeze
from workbench.fingerprint import digest
from workbench.trees import leaves

SMALL = 64 * 2**20
"""Bytes up to which examples are stored in the record."""
STREAMED = 2048
"""Examples that are stored from a stream, which does not say how many it has."""


@dataclass(frozen=True)
class Examples:
    """What the manifest says about the examples, and their tensors when they are to be stored."""

    words: dict[str, Any]
    tensors: Mapping[str, Tensor]
    place: str = ""

    def store(self, folder: Path) -> None:
        """Write the tensors, if there are any to be written."""
        if self.place:
            record.save_tensors(folder / record.EXAMPLES, self.tensors, {"place": self.place})


def pack(data: Any) -> Examples:
    """All examples of ``data`` as plain tensors, in any form that ``wb.Subject`` takes.

    Raises:
        ValueError: they take more than :data:`SMALL` bytes. A look at one of them tells before all are read.
    """
    counted = hasattr(data, "__len__")
    if counted:
        one = freeze(data, max_examples=1)
        _check_size(sum(t.numel() * t.element_size() for t in leaves(one.parts)) * (one.available or 1))
    parts = freeze(data, max_examples=None if counted else STREAMED).parts
    tensors, place = record.pack(parts[0] if len(parts) == 1 else list(parts))
    _check_size(sum(t.numel() * t.element_size() for t in tensors.values()))
    where = json.dumps(place)
    return Examples({"file": record.EXAMPLES, "digest": digest(tensors, where)}, tensors, where)


def _check_size(size: int) -> None:
    if size > SMALL:
        raise ValueError(
            f"the examples to probe on take {size / 2**20:.0f} MB, more than the {SMALL >> 20} MB that a record holds; "
            'give fewer of them, or data="module:callable" that returns them.'
        )
