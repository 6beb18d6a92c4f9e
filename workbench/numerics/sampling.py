"""Counter-based random vectors: the value at (seed, key, vector, chunk) never depends on what was drawn before it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

CHUNK = 65536
"""Entries in a chunk: the unit in which a shard can draw its own part of a vector."""

Kind = Literal["normal", "rademacher"]


@dataclass(frozen=True)
class Draw:
    """Reproducible random vectors of one seed and key (usually a probe's name).

    ``draw(vector)`` is the whole vector of that number; ``draw(vector, chunk)`` only its chunk of :data:`CHUNK`
    entries, so that the vector is the same however it is split over processes. Philox in counter mode: no state.
    Entries are drawn in float64 on the host, then cast; cost about 10 ns an entry.
    """

    seed: int
    key: str
    size: int
    dtype: torch.dtype = torch.float64
    device: torch.device | str = "cpu"

    def __call__(
        self, vector: int, chunk: int | None = None, *, size: int | None = None, kind: Kind = "normal"
    ) -> Tensor:
        """Vector number ``vector`` with independent N(0, 1) entries, or ±1 entries for ``kind="rademacher"``."""
        total = self.size if size is None else size
        chunks = range(-(-total // CHUNK)) if chunk is None else (chunk,)
        parts = [self._chunk(vector, c, min(CHUNK, total - c * CHUNK), kind) for c in chunks]
        values = np.concatenate(parts) if parts else np.empty(0)
        return torch.from_numpy(values).to(device=self.device, dtype=self.dtype)

    def generator(self, vector: int, chunk: int = 0) -> np.random.Generator:
        """A NumPy generator of its own at this place, for draws that are not vectors (sub-samples, bootstraps)."""
        return np.random.Generator(np.random.Philox(key=self._key(), counter=[0, 0, chunk, vector]))

    def _chunk(self, vector: int, chunk: int, count: int, kind: Kind) -> np.ndarray:
        if count <= 0:
            raise IndexError(f"chunk {chunk} lies beyond the vector's last entry.")
        rng = self.generator(vector, chunk)
        if kind == "rademacher":
            return 2.0 * rng.integers(0, 2, count) - 1.0
        return rng.standard_normal(count)

    def _key(self) -> np.ndarray:
        digest = hashlib.blake2b(f"{self.seed}/{self.key}".encode(), digest_size=16).digest()
        return np.frombuffer(digest, dtype=np.uint64)
