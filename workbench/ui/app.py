"""The bench as a web page, by Panel: the same session, job, schema and figures as in JupyterLab, on another toolkit.

``serve(folder)`` serves the runs under a folder on this machine alone (loopback), without anything from the internet.
Each browser tab has a session of its own. Readings are drawn in the page's own thread, one at a time, the newest first.
A run that is being recorded is followed: new checkpoints and curves come into the page every two seconds, without a
touch, until the recording ends, another run is chosen or the page is closed. Runs that begin in the folder join the
list of runs in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workbench.probe import Reading
from workbench.record import runs_in
from workbench.trajectory import Trajectory
from workbench.ui import form, look
from workbench.ui.app_map import OnTheMap
from workbench.ui.app_parts import Parts
from workbench.ui.app_threads import Threads
from workbench.ui.follow import PAUSE, Finder, Follower, Ticker
from workbench.ui.session import Session

LOOPBACK = "127.0.0.1"
PAGE_SHEET = """
:root { color-scheme: light; }
body { background: #f4f6f7; font-family: system-ui, sans-serif; }
"""


def app(target: Any, *, model: Any = None, data: Any = None, loss: Any = None, trust: bool = False) -> Any:
    """A Panel page on what ``wb.explore`` opens on, or on a folder of recorded runs, to be served or shown.

    Args:
        target: what to look at, or the folder (a path) that holds runs.
        model: what the record of a Trajectory lacks; as in ``wb.Subject``.
        data: the same for the examples.
        loss: the same for the loss.
        trust: permit importing builders that a record names and that lie outside Workbench.

    Raises:
        FileNotFoundError: the folder holds no runs.
    """
    import panel as pn

    pn.extension("plotly", raw_css=[PAGE_SHEET])
    if not isinstance(target, str | Path):
        return Page({"": lambda: Session(target, model=model, data=data, loss=loss)}).view
    return Page(lambda: {name: _opener(folder, trust) for name, folder in runs_in(target).items()}).view


def serve(
    folder: str | Path, port: int | None = None, trust: bool = False, open_browser: bool = True, block: bool = True
) -> Any:
    """Serve the runs under ``folder`` at http://127.0.0.1:port until interrupted.

    Args:
        folder: a folder of recorded runs, or one run.
        port: None takes a free one.
        trust: as for :func:`app`.
        open_browser: open the page in the default browser.
        block: False returns the server at once, which then runs in a thread; ``stop()`` ends it.

    Raises:
        FileNotFoundError: no runs there. OSError: the port is taken.
    """
    import panel as pn

    runs_in(folder)  # an empty folder is said here, not in a page
    port = port or _free_port()
    return pn.serve(
        {"/": lambda: app(folder, trust=trust)},
        port=port,
        address=LOOPBACK,
        websocket_origin=[f"{LOOPBACK}:{port}", f"localhost:{port}"],
        title="Workbench",
        show=open_browser,
        threaded=not block,
    )


def _opener(folder: Path, trust: bool) -> Callable[[], Session]:
    return lambda: Session(Trajectory.open(folder, trust=trust))


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind((LOOPBACK, 0))
        return int(s.getsockname()[1])


Openers = Mapping[str, Callable[[], Session]]


class Page(OnTheMap, Parts, Threads):
    """One tab: a run chosen among ``openers``, its session, and the controls. ``view`` is what Panel shows.

    Where ``openers`` is a function, it is asked again and again, and the list of runs goes with what it answers.
    """

    def __init__(self, openers: Openers | Callable[[], Openers]) -> None:
        import panel as pn

        self.finder = Finder(openers if callable(openers) else lambda: openers)
        self._openers: Openers = self.finder.found
        self.watch: Ticker | None = None
        self._begin_map()
        self._begin(pn.state.curdoc)
        self.session: Any = None
        self.follower: Follower | None = None
        self.ticker: Ticker | None = None
        self._make_choosers(list(self._openers))
        self._make_answer()
        self._make_place()
        self._make_exits()
        self.view = self._arranged()
        self._connect()
        # What other threads ask of a page that is still being made can be lost, so the work begins once it is there.
        pn.state.onload(self._guarded(self._open))
        if callable(openers):
            pn.state.onload(self._guarded(self._watch))
        pn.state.on_session_destroyed(lambda _: self.close())

    # Callbacks ------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        for control, event, answer in (
            (self.folder, "value", self._open),
            (self.label, "value", self._visited),
            (self.step, "value", self._moved),
            (self.probe, "value", self._chosen),
            (self.seed, "value", self._moved),
            (self.budget, "value", self._moved),
            (self.run, "clicks", self._run),
            (self.cancel, "clicks", self._stop),
            (self.ask, "clicks", self._ask),
            (self.explain, "value", self._explained),
            (self.venue, "value", self._offer_columns),
            (self.figure, "click_data", self._clicked),
            (self.figure, "relayout_data", self._zoomed),
            (self.figure, "doubleclick_data", self._doubled),
            (self.u, "value", self._typed),
            (self.v, "value", self._typed),
            (self.go, "clicks", self._go),
            (self.back, "clicks", self._back),
            (self.whole, "clicks", self._whole),
            (self.export, "clicks", self._export),
        ):
            control.param.watch(self._guarded(answer), event)

    def _open(self) -> None:
        """Open the chosen run in a session of its own and measure with the first probe."""
        self._leave()
        self.session = session = self._openers[self.folder.value or ""]()
        session.on_reading, session.on_state = self._heard, self._told
        session.job.ready = lambda: self._drawn.value == self._sent.value
        self.head.object = look.title(session.target)
        self._show_steps()
        self._quiet = True
        try:
            self.label.param.update(options=list(session.labels), visible=bool(session.labels))
            self.probe.param.update(options=list(session.probes), value=session.order.probe.name)
        finally:
            self._quiet = False
        self._show_form()
        self._chore(self._fill_venues)
        self._submit()
        self._follow()

    def close(self) -> None:
        """Stop what measures, follows and looks for runs; the page cannot be used any more."""
        if self.watch is not None:
            self.watch.stop()
        self._leave()

    def _leave(self) -> None:
        """Stop what measures and follows the chosen run."""
        self._rest.give_up()
        if self.ticker is not None:
            self.ticker.stop()
        self.follower = self.ticker = None
        if self.session is not None:
            self.session.job.close(0.0)

    def _visited(self) -> None:
        self.session.visit(self.label.value)
        self._show_steps()
        self._submit()

    def _moved(self) -> None:
        session = self.session
        if session.steps:
            session.move(self.step.value)
        session.limit(self.seed.value or 0, self.budget.value or None)
        session.settle(self._read())
        self._submit()

    def _chosen(self) -> None:
        self.session.choose(self.probe.value)
        self._show_form()
        self._submit()

    def _run(self) -> None:
        self.session.settle(self._read())
        self._submit(again=True)

    def _stop(self) -> None:
        self.session.cancel()

    def _ask(self) -> None:
        if self.session.offers_opinion:
            self.ask.disabled = True
            self._say(look.ASKING)
            asked = self.session
            asked.ask_others(lambda found: self._opined(found if self.session is asked else None))

    def _opined(self, found: Any) -> None:
        """The others have answered, or failed; called in a thread of its own."""
        if found is not None:
            self._say(look.problem(found) if isinstance(found, Exception) else "", error=True)

        def show() -> None:
            if found is not None and not isinstance(found, Exception):
                self.opinion.object = found.to_html()
            self.ask.disabled = not self.session.offers_opinion

        self._later("opinion", show)

    def _explained(self) -> None:
        for row in self.form[0]:
            row[-1].visible = self.explain.value

    def _submit(self, again: bool = False) -> None:
        self._say("")
        if self.session.submit(again):
            self.opinion.object = ""
        self._text.value = self.session.code()
        self.code.object = look.code(self._text.value)
        self._show_place()

    def _fill_venues(self) -> None:
        venues = list(self.session.venues)
        self._later("venues", lambda: self.venue.param.update(options=venues, value=venues[0]))

    def _offer_columns(self) -> None:
        columns = list(self.session.venues[self.venue.value])
        self.column.param.update(options=columns, value=columns[0])

    def _export(self) -> None:
        path = f"{self.file.value.removesuffix('.' + self.format.value)}.{self.format.value}"
        asked = (path, self.venue.value, self.column.value, self.provenance.value)
        self._say(f"Writing {path} ...")
        self._chore(lambda: self._say(self.session.export(*asked)))

    # What the person sees -------------------------------------------------------------------------------------------

    def _show_steps(self) -> None:
        steps = self.session.steps
        self._quiet = True
        try:
            if steps and (tuple(self.step.options), self.step.value) != (steps, self.session.order.step):
                self.step.param.update(options=list(steps), value=self.session.order.step)
            self.step.visible = bool(steps)
        finally:
            self._quiet = False

    def _show_form(self) -> None:
        probe = self.session.order.probe
        self.about.object = look.about(type(probe))
        shown, self._read = form.panel(type(probe), probe, self._guarded(self._moved))
        self.form[:] = [shown]
        self._explained()
        self.step.disabled, self.label.disabled = not self.session.needs_step, not self.session.needs_run
        self.format.options = list(self.session.formats)

    def _heard(self, reading: Reading) -> None:
        """In the job's thread: make the picture here, hand it to the page's thread."""
        picture, rows = self._picture(reading), look.answer(reading)

        def show() -> None:
            self._show(picture)
            self.summary.object = rows
            self._show_place()
            self.ask.disabled = not self.session.offers_opinion
            self._sent.value = int(self._sent.value or 0) + 1

        self._later("reading", show)

    # A training that goes on ------------------------------------------------------------------------------------------

    def _follow(self, pause: float = PAUSE) -> None:
        """Where the target is being recorded now: take in what is new, until that ends or the page is left."""
        self.follower = follower = Follower(self.session)
        if follower.goes_on:
            self.head.object = look.title(self.session.target, live=True)
            self.ticker = Ticker(lambda: self._followed(follower), lambda: follower.spent, pause)

    def _followed(self, follower: Follower) -> bool:
        """One look at the record, in the ticker's thread; whether another one is wanted."""
        goes_on = follower.goes_on  # asked before the look, so that the last look sees the whole record
        try:
            with self._turn:
                if follower is self.follower:
                    follower.look()
        except Exception as error:  # noqa: BLE001 - whatever it is, the person must see it
            self._say(look.problem(error), error=True)
        self._later("follow", self._guarded(lambda: self._take_in(follower, goes_on)))
        return follower is self.follower and (goes_on or follower.waits)

    def _take_in(self, follower: Follower, live: bool) -> None:
        """In the page's thread: show what the last look found, and measure again where that is wanted."""
        if follower is not self.follower:
            return
        again = follower.due()
        self._show_steps()
        self.head.object = look.title(self.session.target, live)
        if again:
            self._submit(again=True)

    # Runs that begin --------------------------------------------------------------------------------------------------

    def _watch(self, pause: float = PAUSE) -> None:
        """Look for runs that begin in the folder, until the page is left."""
        self.watch = Ticker(self._sought, lambda: self.finder.spent, pause)

    def _sought(self) -> bool:
        """One look at the folder, in the ticker's thread."""
        self.finder.look()
        if {*self.finder.found, self.folder.value} != set(self._openers):
            self._later("runs", self._guarded(self._list))
        return True

    def _list(self) -> None:
        """In the page's thread: list the runs that there are; the chosen one stays, also where it was deleted."""
        chosen, there = self.folder.value, self.finder.found
        self._openers = there if chosen in there else {**there, chosen: self._openers[chosen]}
        self._quiet = True
        try:
            self.folder.param.update(options=list(self._openers), visible=len(self._openers) > 1)
        finally:
            self._quiet = False

    def _told(self, state: Any) -> None:
        def show() -> None:
            self.bar.value = round(100 * state.done)
            self.progress.object = look.progress(state)
            self.cancel.disabled = not state.busy
            self.ask.disabled = not self.session.offers_opinion
            if state.message:
                self.status.object = look.status(
                    state.message, error=state.status == "failed" or " raised " in state.message
                )

        self._later("state", show)
