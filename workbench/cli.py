"""The command line: ``workbench demo | probe | along | sweep | experiment | export | list | serve | doctor``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.probe import Probe, Reading
    from workbench.store import Store
    from workbench.trajectory import Trajectory

WRONG, STOPPED = 2, 130
"""Exit codes: something is wrong with what was asked, which one line explains; or Ctrl-C."""

_Run = Callable[[argparse.Namespace], int | None]
_OURS = (ValueError, TypeError, LookupError, OSError, RuntimeError, MemoryError, ImportError, ArithmeticError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when all went well. Errors print one line, with ``--debug`` the traceback too."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: spinning threads starve a shared machine
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.run(chosen) or 0)
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return STOPPED
    except _OURS as problem:
        if chosen.debug:
            raise
        words = problem.args[0] if isinstance(problem, KeyError) and problem.args else str(problem)
        print(f"workbench: {words or type(problem).__name__}", file=sys.stderr)
        return WRONG


def _parser() -> argparse.ArgumentParser:
    from workbench import __version__

    parser = argparse.ArgumentParser(prog="workbench", description="Watch how neural networks learn.")
    parser.add_argument("--version", action="version", version=__version__)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, (run, words, add) in _COMMANDS.items():
        command = commands.add_parser(name, help=words, description=words, parents=[shared])
        add(command)
        command.set_defaults(run=run)
    return parser


# --- demo -------------------------------------------------------------------------------------------------------------


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="report", help="folder to write (default: report)")
    parser.add_argument("--quick", action="store_true", help="coarser, in a quarter of the time")


def _demo(chosen: argparse.Namespace) -> None:
    from workbench.report import demo

    with _progress() as say:
        page = demo(chosen.out, chosen.quick, say)
    print(f"report written: {page}")


# --- probe and along --------------------------------------------------------------------------------------------------


def _add_probe(parser: argparse.ArgumentParser) -> None:
    _add_target(parser)
    parser.add_argument("--step", default="last", help="recorded step to look at (default: last)")
    parser.add_argument(
        "--second-opinion", action="store_true", help="print what other packages say, for a minute more"
    )


def _add_along(parser: argparse.ArgumentParser) -> None:
    _add_target(parser)
    parser.add_argument("--every", type=int, default=1, help="read every so many checkpoints (default: 1)")


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recording", metavar="RUN", help="folder of a recorded training")
    parser.add_argument("--probe", required=True, metavar="NAME", help="see `workbench list`")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the probe; repeat"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--seconds", type=float, help="time budget; the best answer by then")
    parser.add_argument("--trust", action="store_true", help="permit importing the code that the record names")
    parser.add_argument("--out", metavar="FILE", help="draw the figure too: .pdf, .svg, .pgf, .png; a plane: .vts")
    _add_figure(parser)


def _add_figure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--venue", help="such as icml2024 (default: a house style)")
    parser.add_argument("--column", choices=("half", "full"), help="of the venue (default: its narrower one)")
    parser.add_argument("--provenance", default="full", choices=("full", "anonymous", "none"), help="(default: full)")
    parser.add_argument("--usetex", action="store_true", help="set words by LaTeX, which must be installed")


def _probe(chosen: argparse.Namespace) -> None:
    from workbench import catalog
    from workbench.interop.opinion import why_not
    from workbench.trajectory import Trajectory

    probe = catalog.make(chosen.probe, _settings(chosen.set))
    if chosen.second_opinion and (words := why_not(probe)):
        raise ValueError(words)
    trajectory = Trajectory.open(chosen.recording, trust=chosen.trust)
    if probe.looks_at not in ("subject", "trajectory"):
        raise TypeError(
            f"{probe.name} looks at {probe.looks_at}, which one recorded run does not make; use it in Python."
        )
    whole = probe.looks_at == "trajectory"
    target = trajectory if whole else trajectory.subject(_step(chosen.step, trajectory))
    reading = _measure(probe, target, chosen)
    if chosen.second_opinion:
        print(reading.second_opinion(target))


def _along(chosen: argparse.Namespace) -> None:
    from workbench import catalog
    from workbench.dynamics.along import Along
    from workbench.trajectory import Trajectory

    probe = Along(catalog.make(chosen.probe, _settings(chosen.set)), every=chosen.every)
    _measure(probe, Trajectory.open(chosen.recording, trust=chosen.trust), chosen)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recordings", metavar="RUN", nargs="+", help="folders of recorded trainings")
    parser.add_argument("--probe", action="append", required=True, metavar="NAME[:KEY=VALUE,...]", help="repeat")
    parser.add_argument("--steps", metavar="0,100..500,last", help="recorded steps to look at (default: all)")
    parser.add_argument("--every", type=int, default=1, help="look at every so many of these (default: 1)")
    parser.add_argument(
        "--store", default="readings", help="folder of the readings, for all workers (default: readings)"
    )
    parser.add_argument("--workers", type=int, help="processes on this machine (default: one a core, at most eight)")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask cluster, instead of processes here")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--seconds", type=float, help="time budget of each task")
    parser.add_argument("--trust", action="store_true", help="permit importing the code that the records name")
    parser.add_argument("--out", metavar="FILE.csv", help="write the headline numbers as a table")


def _sweep(chosen: argparse.Namespace) -> int:
    from workbench import catalog
    from workbench.sweeping import cluster_at, sweep
    from workbench.trajectory import Trajectory

    probes = [catalog.written(text) for text in chosen.probe]
    runs = {folder: Trajectory.open(folder, trust=chosen.trust) for folder in chosen.recordings}
    with cluster_at(chosen.scheduler) as client, _progress() as say:
        done = sweep(
            probes, runs, chosen.store, client, seed=chosen.seed, seconds=chosen.seconds, workers=chosen.workers,
            steps=chosen.steps, every=chosen.every, on_progress=lambda so_far: say("sweep", so_far.done),
        )  # fmt: skip
    for task, outcome in zip(done.tasks, done.outcomes, strict=True):
        if outcome.status == "failed":
            print(f"{task.probe.name} on {task.label} at step {task.step}: {outcome.message}", file=sys.stderr)
    if chosen.out:
        done.summaries().to_csv(chosen.out, index=False)
    print(f"{done!r} in {done.store.path}")
    return WRONG if len(done.failed) else 0


def _settings(texts: Sequence[str]) -> Mapping[str, str]:
    for text in texts:
        if "=" not in text:
            raise ValueError(f"--set takes KEY=VALUE, as in --set top=5; got {text!r}.")
    return {name.strip(): value for name, _, value in (text.partition("=") for text in texts)}


def _step(word: str, trajectory: Trajectory) -> int:
    if word == "last":
        return trajectory.steps[-1]
    if not word.isdigit():
        raise ValueError(f"--step takes a recorded step or `last`; got {word!r}.")
    return int(word)


def _measure(probe: Probe[Any], target: Any, chosen: argparse.Namespace) -> Reading:
    """Ask the run's store, else measure; print the numbers, keep the reading, draw it where asked."""
    from workbench.store import Store

    if chosen.out:
        _check_figure(chosen, probe)
    store = Store.beside(chosen.recording)
    key = store.key(probe, target, chosen.seed)
    reading = store.ask(probe, key)
    if reading is None:
        reading = _run(probe, target, chosen)
        store.save(reading, key)
    _report(reading, key, store)
    if chosen.out:
        _draw(reading, chosen.out, chosen)
    return reading


def _run(probe: Probe[Any], target: Any, chosen: argparse.Namespace) -> Reading:
    """The last reading; after Ctrl-C the best one so far."""
    seen: list[Reading] = []

    def take(reading: Reading) -> None:
        seen[:] = [reading]
        say(probe.name, reading.done)

    cost = probe.estimate(target)
    if cost.seconds is not None:
        print(f"{probe.name}: {cost.price}", file=sys.stderr)
    with _progress() as say:
        try:
            return probe.run(target, seed=chosen.seed, seconds=chosen.seconds, on_reading=take)
        except KeyboardInterrupt:
            if not seen:
                raise
            print(f"stopped at {seen[0].done:.0%}; this is the answer so far:", file=sys.stderr)
            return seen[0]


def _report(reading: Reading, key: str, store: Store) -> None:
    from workbench.words import summary_rows

    rows = summary_rows(reading.summary)
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")
    state = "converged" if reading.converged else f"not converged, {reading.done:.0%} done"
    on = reading.provenance.get("subject", {}).get("on", "")
    print(" · ".join(part for part in (state, on) if part))
    for note in reading.notes:
        print(f"  {note}")
    print(f"{'stored' if reading.done == 1 else 'kept unfinished'} in {store.path}: {key}")


# --- export -----------------------------------------------------------------------------------------------------------


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="KEY|FILE", help="key of a stored reading, or a file: .nc, .h5, exported")
    parser.add_argument("target", metavar="OUT", help="figure to write: .pdf, .svg, .pgf, .png; of a plane also .vts")
    parser.add_argument("--store", help="folder of stored readings, or a run that holds one (default: the user's own)")
    _add_figure(parser)


def _export(chosen: argparse.Namespace) -> None:
    from workbench.draw.export import load
    from workbench.store import Store

    if chosen.store is None or Path(chosen.source).is_file():
        reading = load(chosen.source)
    else:
        inside = Path(chosen.store) / "readings"
        reading = Store(inside if inside.is_dir() else chosen.store).load(chosen.source)
    _draw(reading, chosen.target, chosen)


def _check_figure(chosen: argparse.Namespace, probe: Probe[Any]) -> None:
    """Say before the work starts that its figure could not be drawn."""
    from workbench.draw.carry import SURFACE, checked_suffix
    from workbench.draw.heights import check_plane
    from workbench.draw.venues import venue

    if checked_suffix(Path(chosen.out)) == SURFACE:
        check_plane(probe)
    venue(chosen.venue, chosen.column)


def _draw(reading: Reading, target: str, chosen: argparse.Namespace) -> None:
    from workbench.draw.export import export

    style = {"venue": chosen.venue, "column": chosen.column, "provenance": chosen.provenance, "usetex": chosen.usetex}
    print(f"figure written: {export(reading, target, **style)}")


# --- experiment -------------------------------------------------------------------------------------------------------


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="see `workbench list`")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds to judge (default: 5)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first of them (default: 0)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a knob; repeat")


def _experiment(chosen: argparse.Namespace) -> int:
    """Print a line for each seed; 1 where one of them failed."""
    from workbench import catalog
    from workbench.experiments.experiment import Experiment, judge

    experiment = catalog.make(chosen.name, _settings(chosen.set))
    if not isinstance(experiment, Experiment):
        known = ", ".join(sorted(catalog.probes("nothing"), key=lambda name: not name.startswith(experiment.name[:8])))
        raise TypeError(f"{experiment.name} is a probe and gives no verdict; the experiments are {known}.")
    if chosen.seeds < 1:
        raise ValueError(f"--seeds must be at least 1; got {chosen.seeds}.")
    passed = list[bool]()
    with _progress() as say:
        seeds = range(chosen.first, chosen.first + chosen.seeds)
        for found in judge(experiment, seeds, lambda reading: say(experiment.name, reading.done)):
            print(f"seed {found.seed}  {found.seconds:6.1f} s  {found.verdict}", flush=True)
            passed.append(found.verdict.passed)
    print(f"{experiment.name}: {sum(passed)} of {len(passed)} seeds passed; {experiment.threshold_words}")
    return 0 if all(passed) else 1


# --- list, serve, doctor ----------------------------------------------------------------------------------------------


def _add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show the settings of this probe")


def _list(chosen: argparse.Namespace) -> None:
    from workbench import catalog, schema

    if chosen.name:
        cls = catalog.get(chosen.name)
        print(catalog.words(cls))
        for field in schema.fields(cls):
            print(f"  --set {field.name}={field.default}   {field.doc}")
        return
    known = catalog.probes()
    width = max(map(len, known), default=0)
    for name, cls in known.items():
        print(f"{name:<{width}}  {catalog.words(cls)}")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUNS", help="folder of recorded runs, or one run")
    parser.add_argument("--port", type=int, help="(default: a free one)")
    parser.add_argument("--no-browser", action="store_true", help="print the address only")
    parser.add_argument("--trust", action="store_true", help="permit importing the code that the records name")


def _serve(chosen: argparse.Namespace) -> None:
    from workbench.ui.app import serve

    serve(chosen.runs, port=chosen.port, trust=chosen.trust, open_browser=not chosen.no_browser)


def _add_nothing(parser: argparse.ArgumentParser) -> None:
    """A command without arguments."""


def _doctor(chosen: argparse.Namespace) -> int:
    from workbench.doctor import examine

    found = examine()
    for finding in found:
        print(finding.line)
    missing = [f.name for f in found if f.state == "missing"]
    print(f"needed and not here: {', '.join(missing)}" if missing else "everything that is needed is here.")
    return 1 if missing else 0


_COMMANDS: dict[str, tuple[_Run, str, Callable[[argparse.ArgumentParser], None]]] = {
    "demo": (_demo, "train a small net, probe it, and write a report folder", _add_demo),
    "probe": (_probe, "measure one step of a recorded training", _add_probe),
    "along": (_along, "measure every checkpoint of a recorded training", _add_along),
    "sweep": (_sweep, "measure many probes at every checkpoint of many runs, in worker processes", _add_sweep),
    "experiment": (_experiment, "show a paper's effect on several seeds, with a verdict for each", _add_experiment),
    "export": (_export, "draw a stored reading for a paper", _add_export),
    "list": (_list, "the probes there are", _add_list),
    "serve": (_serve, "the bench as a web page, on this machine only", _add_serve),
    "doctor": (_doctor, "versions, devices, and what is missing", _add_nothing),
}


# --- progress ---------------------------------------------------------------------------------------------------------


@contextmanager
def _progress() -> Generator[Callable[[str, float], None]]:
    """A bar on the error stream with the time that remains; silent where nobody watches."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks = dict[str, Any]()

        def say(words: str, share: float) -> None:
            if words not in tasks:
                tasks[words] = bar.add_task(words, total=1.0)
            bar.update(tasks[words], completed=share)

        yield say
