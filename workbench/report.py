"""The main job without a browser: train, record, probe, and write a folder with numbers, errors and figures."""

from __future__ import annotations

import html
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import catalog
from workbench.dynamics.along import Along
from workbench.dynamics.recorder import Recorder
from workbench.dynamics.schedules import log_spaced
from workbench.probe import Probe, Reading, drive
from workbench.provenance import versions
from workbench.store import Store
from workbench.trajectory import Trajectory
from workbench.words import duration, summary_rows
from workbench.zoo.digits import digits
from workbench.zoo.nets import conv
from workbench.zoo.training import train

Say = Callable[[str, float], None]
"""Hears what is being done, and which share of it is."""

VENUE, COLUMN = "icml2024", "full"
RECIPE: Mapping[str, Any] = {"channels": [8, 16], "classes": 10, "size": 8, "seed": 0}
"""The tour's net: two convolutions and a linear map for 8 x 8 images."""


@dataclass(frozen=True)
class Section:
    """One measure in the report: a title, its reading, and how long it took."""

    title: str
    name: str
    reading: Reading
    seconds: float


def demo(out: str | Path, quick: bool = False, say: Say = lambda words, share: None) -> Path:
    """Train the tour's net on scikit-learn's digits, probe it, and write ``out``; the path of its ``index.html``.

    The folder holds ``record/`` (checkpoints and scalars), ``readings/`` (the store), ``figures/`` (PDF and PNG at a
    venue's width, each with its reading inside), ``index.md`` and ``index.html``. A former report there is replaced.

    Args:
        out: the folder to write; it must be new, empty, or hold an earlier report.
        quick: fewer steps and coarser settings: about a quarter of the time.
        say: called with words and a share between 0 and 1 while the work goes on.

    Raises:
        FileExistsError: ``out`` holds something else, which is left alone.
    """
    folder = _cleared(Path(out))
    trajectory = record(folder / "record", 120 if quick else 400, say)
    store, sections = Store(folder / "readings"), list[Section]()
    for title, probe in probes(quick):
        began = time.perf_counter()
        target = trajectory if probe.looks_at == "trajectory" else trajectory.subject(trajectory.steps[-1])
        reading = _measured(probe, target, title, say)
        store.save(reading, store.key(probe, target))
        sections.append(Section(title, _file_name(title), reading, time.perf_counter() - began))
        say(f"{title}: figures", 0.0)
        for suffix in (".pdf", ".png"):
            reading.export(folder / "figures" / f"{sections[-1].name}{suffix}", venue=VENUE, column=COLUMN)
    (folder / "index.md").write_text(as_markdown(trajectory, sections), encoding="utf-8")
    (folder / "index.html").write_text(as_html(trajectory, sections), encoding="utf-8")
    return folder / "index.html"


def _cleared(folder: Path) -> Path:
    """The folder without an earlier report. Nothing that is not ours is deleted."""
    ours = ("record", "readings", "figures", "index.md", "index.html")
    strange = sorted(p.name for p in folder.iterdir() if p.name not in ours) if folder.is_dir() else []
    if strange or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(
            f"{folder} holds {strange[0] if strange else 'a file'}, which is no part of a report; name a new folder."
        )
    for name in ours[:3]:
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "figures").mkdir(parents=True)
    return folder


def record(folder: Path, steps: int, say: Say) -> Trajectory:
    """Train the net with a recorder beside it, and open the record."""
    data, model = digits(), conv(**RECIPE)
    arguments: dict[str, Any] = {"build": conv, "build_args": RECIPE, "data": data.train, "loss": "cross_entropy"}
    with Recorder(folder, model, every=log_spaced(5), **arguments) as recorder:
        train(model, data.train, steps, lr=0.05, recorder=_Spoken(recorder, steps, say), test=data.test)
    return Trajectory.open(folder)


class _Spoken:
    """A recorder that tells how far training is."""

    def __init__(self, recorder: Recorder, steps: int, say: Say) -> None:
        self.recorder, self.steps, self.say = recorder, steps, say

    def step(self, /, **scalars: float) -> None:
        """Record the step and say it."""
        self.recorder.step(**scalars)
        self.say("training", self.recorder.count / self.steps)


def probes(quick: bool) -> Iterator[tuple[str, Probe[Any]]]:
    """The measures of the report, in its order, each with a title."""
    spectrum = {"top": "3", "tolerance": "0.1"} if quick else {}
    yield "Hessian spectrum of the trained net", catalog.make("HessianSpectrum", spectrum)
    yield "Loss landscape around it", catalog.make("Plane", {"points": "9" if quick else "25"})
    yield "Neural collapse", catalog.make("NeuralCollapse")
    yield "Neural collapse along training", Along(catalog.make("NeuralCollapse"), every=3 if quick else 1)
    if not quick:
        settings = {"top": "1", "density": "no", "trace": "no", "minimum": "no"}
        yield "Sharpness along training", Along(catalog.make("HessianSpectrum", settings))


def _measured(probe: Probe[Any], target: Any, title: str, say: Say) -> Reading:
    last = None
    for last in drive(probe, target):
        say(title, last.done)
    if last is None:
        raise RuntimeError(f"{probe.name} yielded no reading; its stream must yield at least one.")
    return last


def _file_name(title: str) -> str:
    return title.lower().replace(" ", "-")


def _intro(trajectory: Trajectory) -> str:
    curves = trajectory.scalars
    last = curves.ffill().iloc[-1]
    words = f"{trajectory.steps[-1]} steps, {len(trajectory)} checkpoints"
    accuracies = f"train accuracy {last['train_accuracy']:.3f}, test accuracy {last['test_accuracy']:.3f}"
    share = last["recorder_seconds"] / max(last["wall_time"], 1e-9)
    return (
        f"A small convolutional net trained on scikit-learn's digits: {words}; {accuracies}; training took "
        f"{duration(last['wall_time'])}, of which recording {share:.1%}."
    )


def _state(section: Section) -> str:
    reading = section.reading
    on = reading.provenance.get("subject", {}).get("on", "")
    converged = "converged" if reading.converged else "not converged"
    return " · ".join(filter(None, (on, converged, duration(section.seconds))))


def _versions() -> str:
    return ", ".join(f"{name} {number}" for name, number in versions().items())


def as_markdown(trajectory: Trajectory, sections: list[Section]) -> str:
    """The report as Markdown."""
    parts = ["# Workbench report", _intro(trajectory)]
    for s in sections:
        rows = [f"| {name.replace('_', ' ')} | {text} |" for name, text in summary_rows(s.reading.summary)]
        parts += [f"## {s.title}", f"![{s.title}](figures/{s.name}.png)", f"[PDF](figures/{s.name}.pdf) · {_state(s)}"]
        parts += ["\n".join(["| number | value |", "| --- | --- |", *rows]), *_notes(s)]
    return "\n\n".join([*parts, f"Made with {_versions()}.\n"])


def _notes(section: Section) -> list[str]:
    notes = section.reading.notes
    return ["\n".join(f"- {note}" for note in notes)] if notes else []


def as_html(trajectory: Trajectory, sections: list[Section]) -> str:
    """The report as one page without scripts."""
    body = [f"<h1>Workbench report</h1><p>{html.escape(_intro(trajectory))}</p>", *map(_html_section, sections)]
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Workbench report</title>"
        "<meta name='viewport' content='width=device-width'><style>body{font:16px/1.5 sans-serif;max-width:60rem;"
        "margin:2rem auto;padding:0 1rem}img{max-width:100%}td,th{padding:.15rem 1rem .15rem 0;text-align:left;"
        "font-variant-numeric:tabular-nums}small{color:#555}</style>"
        + "".join(body)
        + f"<p><small>Made with {html.escape(_versions())}.</small></p></html>\n"
    )


def _html_section(s: Section) -> str:
    title, rows = html.escape(s.title), summary_rows(s.reading.summary)
    cells = "".join(f"<tr><td>{html.escape(n.replace('_', ' '))}<td>{html.escape(t)}" for n, t in rows)
    notes = "".join(f"<li>{html.escape(note)}" for note in s.reading.notes)
    return (
        f"<h2>{title}</h2><img src='figures/{s.name}.png' alt='{title}'>"
        f"<p><a href='figures/{s.name}.pdf'>PDF</a> · {html.escape(_state(s))}</p>"
        f"<table><tr><th>number<th>value{cells}</table><ul><small>{notes}</small></ul>"
    )
