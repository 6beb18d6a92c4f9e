"""Where a number comes from: versions, git commit, subject, seed. Plain JSON; no paths, no people, no machines."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("workbench", "torch", "numpy", "scipy", "xarray")


def provenance_of(subject: Any, seed: int) -> dict[str, Any]:
    """Everything that a reading records about how it came to be, beside probe and settings."""
    plan = getattr(subject, "plan", None)
    return {
        "seed": seed,
        "fingerprint": subject.fingerprint(),
        "examples": getattr(subject, "data_digest", ""),
        "subject": dict(subject.describe()),
        "versions": dict(versions()),
        "git": commit(str(Path.cwd())),
        "threads": torch.get_num_threads(),
        "plan": plan.to_json() if plan is not None else {},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@lru_cache(maxsize=1)
def versions() -> Mapping[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def commit(folder: str) -> str:
    """The git commit checked out in ``folder`` (with ``+`` when files differ), or empty outside a repository."""
    head = _git(folder, "rev-parse", "HEAD")
    return head + ("+" if head and _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: str, *words: str) -> str:
    try:
        done = subprocess.run(("git", "-C", folder, *words), capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
