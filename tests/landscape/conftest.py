"""What tests of landscapes share."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from workbench.landscape.evaluation import choice


@pytest.fixture(scope="module")
def plainly() -> Iterator[None]:
    """Points one way only: on a loaded machine ways are raced, which takes passes, and another rounds otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "QUICK", math.inf)
        patch.setattr(choice, "_chosen", type(choice._chosen)())
        yield
