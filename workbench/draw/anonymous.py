"""Readings for double-blind review: no name of a person, machine or folder, no commit, no time of day.

Two sieves, one after the other: provenance keeps only what is on a list of harmless keys, and every text that remains,
in settings, notes and attributes, loses e-mail addresses, paths, and the names of this user and this machine.
"""

from __future__ import annotations

import dataclasses
import getpass
import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from workbench.probe import Reading

KEPT = ("seed", "fingerprint", "examples", "context", "subject", "versions", "threads", "plan")
"""What provenance keeps: how to repeat the numbers, nothing about who made them, where or when."""

_DROPPED = {"label", "path", "folder", "host", "hostname", "user", "author", "email", "git", "commit", "created"}
HIDDEN = "(hidden)"
_MAIL = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+")
_PATH = re.compile(r"(?<![\w/:])(?:~|[A-Za-z]:)?[/\\](?:[\w.+@~-]+[/\\])+[\w.+@~-]*|file:\S+|~[/\\]\S+")
_COMMIT = re.compile(r"\b[0-9a-f]{40}\b")


def anonymous(reading: Reading) -> Reading:
    """The same numbers with nothing that tells who, where or when; the figure's words are cleaned as well."""
    kept = {k: scrub(v) if k != "fingerprint" else v for k, v in reading.provenance.items() if k in KEPT}
    data = reading.data.copy(deep=True)
    data.attrs = _clean_attrs(data.attrs)
    for name in data.variables:
        data[name].attrs = _clean_attrs(data[name].attrs)
        if data[name].dtype.kind in "OU":
            data[name] = data[name].copy(data=np.vectorize(scrub, otypes=[object])(data[name].values))
    return dataclasses.replace(reading, data=data, provenance=kept, probe=_clean_probe(reading.probe))


def _clean_probe(probe: Any) -> Any:
    texts = {
        f.name: getattr(probe, f.name) for f in dataclasses.fields(probe) if isinstance(getattr(probe, f.name), str)
    }
    changed = {name: scrub(text) for name, text in texts.items() if scrub(text) != text}
    return dataclasses.replace(probe, **changed) if changed else probe


def _clean_attrs(attrs: Mapping[Any, Any]) -> dict[Any, Any]:
    return {name: _clean_json(value) if isinstance(value, str) else value for name, value in attrs.items()}


def _clean_json(text: str) -> str:
    """A text; when it is JSON, each of its texts by itself, so that it stays JSON."""
    try:
        return json.dumps(scrub(json.loads(text)))
    except ValueError:
        return scrub(text)


def scrub(value: Any) -> Any:
    """Any JSON value with identifying words replaced by ``(hidden)``, keys included."""
    if isinstance(value, str):
        return _scrub_text(value)
    if isinstance(value, Mapping):
        return {_scrub_text(str(k)): scrub(v) for k, v in value.items() if str(k).lower() not in _DROPPED}
    if isinstance(value, list | tuple):
        return [scrub(v) for v in value]
    return value


def _scrub_text(text: str) -> str:
    for pattern in (_MAIL, _PATH, _COMMIT):
        text = pattern.sub(HIDDEN, text)
    for name in _names():
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", HIDDEN, text, flags=re.IGNORECASE)
    return text


def _names() -> list[str]:
    """Names of this user, home folder and machine; the names everyone has (root, user, localhost) are no secret."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = ""
    found = {user, Path.home().name, socket.gethostname(), socket.gethostname().split(".")[0]}
    return sorted(n for n in found if len(n) > 2 and n.lower() not in _COMMON)


_COMMON = {"root", "user", "home", "localhost", "ubuntu", "debian", "admin", "test", "python", "workbench", "main"}
