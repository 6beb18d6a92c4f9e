"""Surfaces that the original loss-landscape scripts (Li et al. 2018) wrote: ``.h5`` files, opened as readings.

Such a file holds ``xcoordinates``, for a surface also ``ycoordinates``, and ``train_loss``, ``train_acc``,
``test_loss``, ``test_acc`` (accuracies in percent) as far as they were computed; -1 marks points that were not. The
scripts make arrays of (x, y) and fill them in the order of a (y, x) mesh, so that for equal sides the first index is y,
and for others only the order of the numbers is right; here ``loss[i, j]`` is that at (x_i, y_j) in any case.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from workbench.landscape.line import SHALLOW, Line
from workbench.landscape.plane import NORMALIZATIONS, Plane
from workbench.numerics.persistence import excess_variation, persistence
from workbench.probe import Reading
from workbench.provenance import versions
from workbench.schema import Range, fields

Array = NDArray[np.float64]
Split = Literal["train", "test"]
P = TypeVar("P", Plane, Line)
NOT_COMPUTED = -1.0
LAYOUT = "original loss-landscape scripts (Li et al. 2018)"
UNKNOWN = (
    "how the directions were made, which examples, loss and BatchNorm statistics were used, and standard errors are "
    "not in the file; settings of this reading that the file does not tell are defaults"
)


@dataclass(frozen=True)
class _Values:
    """One split's values at every point, NaN where there are none; ``computed``: whether the point was evaluated."""

    loss: Array
    error_rate: Array
    computed: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _Held:
    """What a surface file holds, in (x, y) order."""

    name: str
    digest: str
    axes: tuple[Array, ...]
    splits: Mapping[str, _Values]
    dir_file: str


def read(path: str | Path, split: Split | None = None) -> Reading:
    """The reading in a surface file: a :class:`Plane`'s, or a :class:`Line`'s where there are no ``ycoordinates``.

    ``error_rate`` is 1 - accuracy / 100. Nothing that the file does not tell is made up: standard errors, slope,
    curvature and the like are NaN, and a note says what is not known. The scripts' origin is the model: ``loss_here``
    is the value at 0 where the grid has that point. A plane whose file has both splits holds the other one as own
    metrics.

    Args:
        path: the file.
        split: which values become ``loss`` and ``error_rate``; None: training where the file has them, else test.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a file, datasets missing or of wrong shapes, or nothing in it was computed.
    """
    held = _opened(Path(path))
    chosen = _chosen(held, split)
    values = held.splits[chosen]
    if not values.computed.any():
        raise ValueError(f"no point of {chosen}_loss in {held.name} was computed (all are -1); run the script first.")
    return (_plane if len(held.axes) > 1 else _line)(held, chosen, values)


def _chosen(held: _Held, split: str | None) -> str:
    if not held.splits:
        raise ValueError(
            f"{held.name} has coordinates but neither train_loss nor test_loss: nothing was computed, or it holds "
            "something else (eigenvalues, say). Run the script that fills it first."
        )
    chosen = next(iter(held.splits)) if split is None else split
    if chosen not in held.splits:
        raise ValueError(f"{held.name} has no {chosen}_loss; it has {', '.join(f'{s}_loss' for s in held.splits)}.")
    return chosen


# ------------------------------------------------------------------------------------------------------- the file


def _opened(path: Path) -> _Held:
    import h5py

    content = path.read_bytes()
    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            axes = _axes(file, path.name)
            splits = {s: _values(file, s, axes, path.name) for s in ("train", "test") if f"{s}_loss" in file}
            return _Held(path.name, hashlib.sha256(content).hexdigest(), axes, splits, _text(file))
    except OSError as problem:
        raise ValueError(
            f"{path.name} is not a whole HDF5 file ({problem}); it may have been cut off in copying."
        ) from problem


def _text(file: Any) -> str:
    said = file["dir_file"][()] if "dir_file" in file else b""
    return said.decode(errors="replace") if isinstance(said, bytes) else str(said)


def _axes(file: Any, name: str) -> tuple[Array, ...]:
    if "xcoordinates" not in file:
        has = ", ".join(sorted(file)) or "nothing"
        kind = "directions, not a surface" if "xdirection" in file else "no surface of the loss-landscape scripts"
        raise ValueError(f"{name} holds {kind}: there is no xcoordinates in it, but {has}.")
    named = [key for key in ("xcoordinates", "ycoordinates") if key in file]
    return tuple(_ticks(_numbers(file, key, name), key, name) for key in named)


def _numbers(file: Any, key: str, name: str) -> Array:
    try:
        return np.asarray(file[key][()], dtype=np.float64)
    except (TypeError, ValueError) as problem:
        raise ValueError(f"{key} in {name} does not hold numbers ({problem}).") from problem


def _ticks(found: Array, key: str, name: str) -> Array:
    if found.ndim != 1 or found.size < 2 or not np.isfinite(found).all() or not (np.diff(found) > 0).all():
        raise ValueError(
            f"{key} in {name} must be at least two finite numbers that rise; got an array of shape {found.shape}."
        )
    found[np.abs(found) < 1e-12 * np.abs(found).max()] = 0.0  # the middle of an even division, up to rounding
    return found


def _values(file: Any, split: str, axes: tuple[Array, ...], name: str) -> _Values:
    loss = _placed(file, f"{split}_loss", axes, name)
    computed = loss != NOT_COMPUTED
    known = f"{split}_acc" in file
    accuracy = _placed(file, f"{split}_acc", axes, name) if known else np.full(loss.shape, np.nan)
    accuracy = np.where(computed & (accuracy != NOT_COMPUTED), accuracy, np.nan)
    if (accuracy < 0).any() or (accuracy > 100).any():
        raise ValueError(f"{split}_acc in {name} must be percentages from 0 to 100, or -1 where not computed.")
    return _Values(np.where(computed, loss, np.nan), 1 - accuracy / 100, computed)


def _placed(file: Any, key: str, axes: tuple[Array, ...], name: str) -> Array:
    """The values at (x_i, y_j), from an array in the order of a mesh whose rows are y."""
    found, sizes = _numbers(file, key, name), tuple(a.size for a in axes)
    if found.shape not in (sizes, sizes[::-1]):
        raise ValueError(f"{key} in {name} must have the shape of its coordinates, {sizes}; got {found.shape}.")
    return found.reshape(sizes[::-1]).T.copy()


# ---------------------------------------------------------------------------------------------------- the readings


def _plane(held: _Held, split: str, values: _Values) -> Reading:
    u, v = held.axes
    middles, widths = zip(*((float(a[0] + a[-1]) / 2, float(a[-1] - a[0]) / 2) for a in (u, v)), strict=True)
    given = {"points": max(u.size, v.size), "extent": max(widths), "centre_u": middles[0], "centre_v": middles[1]}
    probe = _with(Plane(ellipse=False, sampling="grid", **_told(held.dir_file)), given)
    own = {f"{s} {what}": a for s, o in held.splits.items() if s != split for what, a in _named(o).items()}
    found: dict[str, Any] = _arrays(values) | {"loss_here": _at_origin(held.axes, values.loss)}
    made = probe.reading(
        _share(values),
        found | {"own_metric": np.array(list(own.values())).reshape(-1, *values.loss.shape)},
        coords={"u": u, "v": v, "own": list(own)},
        converged=bool(values.computed.all()),
        notes=_notes(held, split, values, other="own metrics" if own else ""),
        sizes={"direction": 2, "along": 2, "path": 0, "sample": 0},
    )
    return _finished(made, held, split, ("u", "v"))


def _line(held: _Held, split: str, values: _Values) -> Reading:
    (alpha,) = held.axes
    probe = _with(Line(), {"points": alpha.size, "extent": float(np.abs(alpha[[0, -1]]).max())})
    loss = values.loss[values.computed]
    finite = loss[np.isfinite(loss)]
    span = float(np.ptp(finite)) if finite.size else 0.0
    shape = {"roughness": excess_variation(loss)}
    shape |= {"minima": float(persistence(loss).count(SHALLOW * span))} if span > 0 else {}
    others = [s for s in held.splits if s != split]
    made = probe.reading(
        _share(values),
        _arrays(values) | shape | {"loss_here": _at_origin(held.axes, values.loss)},
        coords={"alpha": alpha},
        converged=bool(values.computed.all()),
        notes=_notes(held, split, values, other=f"surface_files.read(path, {others[0]!r})" if others else ""),
    )
    return _finished(made, held, split, ("alpha",))


def _arrays(values: _Values) -> dict[str, Any]:
    return {"loss": values.loss, "error_rate": values.error_rate, "evaluated": values.computed}


def _named(values: _Values) -> dict[str, Array]:
    return {"loss": values.loss, "error rate": values.error_rate}


def _share(values: _Values) -> float:
    return float((values.computed.sum() + 1) / (values.computed.size + 1))


def _at_origin(axes: tuple[Array, ...], loss: Array) -> float:
    """The loss at the model, which the scripts have at 0; NaN where the grid has no such point."""
    at = loss[np.ix_(*(a == 0.0 for a in axes))]
    return float(at.item()) if at.size else float("nan")


def _told(dir_file: str) -> dict[str, Any]:
    """The settings that the direction file's name tells: the normalisation of both axes, and whether biases move."""
    norms = re.findall(r"_[xy]norm=([a-z]+)", dir_file)
    if len(set(norms)) != 1 or norms[0] not in NORMALIZATIONS:
        return {}
    still = dir_file.count("ignore=biasbn")
    one_dim = {0: {"one_dim": "copy"}, len(norms): {"one_dim": "zero"}}.get(still, {})
    return {"normalization": norms[0], **one_dim}


def _with(probe: P, given: Mapping[str, float]) -> P:
    """The probe with these settings, each moved into its range: a file may have more points than the bench offers."""
    ranges = {f.name: f for f in fields(probe)}
    moved: dict[str, Any] = {name: _inside(value, ranges[name]) for name, value in given.items()}
    return replace(probe, **moved)


def _inside(value: float, setting: Any) -> float:
    limits: Range | None = setting.range
    return value if limits is None else type(value)(min(max(value, limits.low), limits.high))


def _notes(held: _Held, split: str, values: _Values, other: str) -> tuple[str, ...]:
    missing = int((~values.computed).sum())
    said = [f"read from {held.name}, written by the {LAYOUT}: {split} loss", UNKNOWN]
    said += [f"the name of its direction file says {words}"] if (words := _words(held.dir_file)) else []
    said += [f"{missing} of {values.computed.size} points were not computed"] if missing else []
    said += [] if np.isfinite(values.error_rate).any() else [f"there is no {split}_acc: error rates are not known"]
    return (*said, f"the other split's values: {other}") if other else tuple(said)


def _words(dir_file: str) -> str:
    """What the name of a direction file tells about it: type of weights, normalisation, what stands still."""
    return ", ".join(re.findall(r"_((?:weights|states|same_dir)(?=[_.])|[xy](?:norm|ignore)=[a-z]+)", dir_file))


def _finished(made: Reading, held: _Held, split: str, axes: tuple[str, ...]) -> Reading:
    """With the axes' own names, and where it comes from."""
    for letter, name in zip("xy", axes, strict=False):
        norm = re.search(rf"_{letter}norm=([a-z]+)", held.dir_file)
        told = f"{letter}norm={norm[1]}" if norm else "direction not known"
        made.data[name].attrs["long_name"] = f"{letter} ({told})"
    source = {"file": held.name, "sha256": held.digest, "layout": LAYOUT, "dir_file": held.dir_file, "split": split}
    said = {"subject": {"on": f"{split} loss of a file from elsewhere"}, "versions": dict(versions())}
    return Reading(made.probe, made.data, made.done, {"source": source, **said})
