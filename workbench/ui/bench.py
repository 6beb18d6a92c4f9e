"""The bench in JupyterLab: controls on the left, the live picture on the right, export and code below.

Callbacks arrive on threads of the kernel's choosing, also while a cell runs, so none of them computes: they read the
controls, hand an order to the session, and return. The job's thread draws.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import ipywidgets as ipw

from workbench.draw.shared import LiveFigure
from workbench.probe import Reading
from workbench.ui import form, look
from workbench.ui.bench_parts import Parts, card, heading, word
from workbench.ui.follow import PAUSE, Follower, Ticker
from workbench.ui.moves import Moves
from workbench.ui.place_card import PlaceCard
from workbench.ui.places import Rest, marked
from workbench.ui.session import Session
from workbench.ui.still import Still


def explore(
    target: Any, *, probe: Any = None, model: Any = None, data: Any = None, loss: Any = None, store: Any = None
) -> Bench:
    """Open a bench on a Subject, Pair, Trajectory or Runs, on an experiment, or on a folder of runs, and show it.

    Args:
        target: what to look at; of a folder (a path) all recorded runs, also those that begin there later.
        probe: the probe to begin with, as ``wb.landscape.Plane(points=25)``.
        model: what the record of a Trajectory lacks, or instead of what it has; as in ``wb.Subject``.
        data: the same for the examples.
        loss: the same for the loss.
        store: where readings are kept and asked for; beside the run when None.

    The first probe runs at once. What a Recorder is writing now, in this process or another, is followed: every two
    seconds new checkpoints and curves are taken in, until the recording ends or the widgets are closed.

    Below the bench a still picture of the newest finished reading is kept in the notebook, hidden while the bench is
    alive, so that the notebook shows it where there is no kernel.

    Raises:
        TypeError, LookupError: as :class:`~workbench.ui.session.Session`.
    """
    bench = Bench(Session(target, model=model, data=data, loss=loss, store=store, probe=probe))
    bench.show()
    return bench


class Bench(Moves, Parts):
    """The widgets of one session. ``view`` is what is shown; the other attributes are its parts, by name."""

    words: ClassVar[str] = "A Workbench bench: live where a kernel runs; elsewhere see the picture below."

    def __init__(self, session: Session) -> None:
        self.session, self.still = session, Still(session)
        session.on_reading, session.on_state, session.job.ready = (
            self._draw,
            self._tell,
            lambda: self.figure.acknowledged,
        )
        self._lock, self._quiet, self._rest = threading.RLock(), False, Rest()
        self.follower, self.ticker = Follower(session), None
        self._make_choosers()
        self._make_answer()
        self._make_exits()
        self.view = self._arranged()
        self._show_form()
        self._show_code()
        self._connect()
        session.chore(self._guarded(self._fill_venues))

    # Parts ----------------------------------------------------------------------------------------------------------

    def _make_answer(self) -> None:
        self.bar = ipw.FloatProgress(0.0, min=0.0, max=1.0, layout=ipw.Layout(width="auto")).add_class("wb-bar")
        self.progress = ipw.HTML().add_class("wb-progress")
        self.figure = LiveFigure().add_class("wb-figure")
        self.place = PlaceCard(self.session.places, self._pressed, self._guarded(self._typed))
        self.summary = ipw.HTML().add_class("wb-summary-box")
        self.ask = ipw.ToggleButton(description="Second opinion", icon="balance-scale", disabled=True)
        self.ask.tooltip = "What other packages say on the same model, examples and loss"
        self.ask.add_class("wb-ask")
        self.opinion = ipw.HTML().add_class("wb-opinion-box")
        self.status = ipw.HTML().add_class("wb-status")

    def _arranged(self) -> Any:
        buttons = ipw.HBox([self.run, self.cancel, self.explain]).add_class("wb-buttons")
        where = [*([self.run_choice] if self.session.labels else []), *([self.step] if self.session.steps else [])]
        controls = ipw.VBox([*where, self.probe, self.about, self.form, self.seed, self.budget, buttons])
        out = [self.venue, self.column, self.format, self.provenance, self.file, self.export]
        export = ipw.VBox([heading("Export for a paper"), *out])
        bar = ipw.HBox([self.bar, self.progress]).add_class("wb-bar-row")
        answer = ipw.VBox([bar, self.figure, self.place.view, self.summary, self.ask, self.opinion, self.status])
        code = ipw.VBox([heading("Copy as code"), ipw.HBox([self.code, self.copy]).add_class("wb-row")])
        left = ipw.VBox([card(controls, "wb-controls"), card(export, "wb-exports")]).add_class("wb-left")
        right = ipw.VBox([card(answer, "wb-answer"), card(code, "wb-codes")]).add_class("wb-right")
        sheet = ipw.HTML(f"<style>{look.SHEET}</style>", layout=ipw.Layout(display="none"))
        self.title = ipw.HTML(look.title(self.session.target))
        parts = [sheet, self.title, ipw.HBox([left, right]).add_class("wb-main")]
        return ipw.VBox(parts).add_class("wb-bench").add_class("wb-empty")

    def _connect(self) -> None:
        for control, answer in (
            (self.run_choice, self._visited),
            (self.step, self._moved),
            (self.probe, self._chosen),
            (self.seed, self._moved),
            (self.budget, self._moved),
            (self.explain, self._explained),
            (self.venue, self._offer_columns),
        ):
            control.observe(self._guarded(answer), "value")
        self.place.on_press(self._go, self._back, self._whole)
        self.figure.on_touch(self._touched)
        self.copy.observe(lambda _: self.session.chore(self._guarded(self._redraw)), "room")
        pressed = ((self.run, self._run), (self.cancel, self._stop), (self.export, self._export), (self.ask, self._ask))
        for button, answer in pressed:
            button.observe(self._pressed(button, answer), "value")

    # Callbacks: each through one wrapper, none computes -------------------------------------------------------------

    def _guarded(self, work: Callable[[], Any]) -> Callable[..., None]:
        """A callback whose exceptions are shown: Jupyter shows them nowhere."""

        def run(*_: Any) -> None:
            try:
                with self._lock:  # waits for another thread to have spoken; what this one sets itself is not heard
                    if not self._quiet:
                        work()
            except Exception as error:  # noqa: BLE001 - whatever it is, the person must see it
                self._say(look.problem(error), error=True)

        return run

    def _pressed(self, button: Any, work: Callable[[], Any]) -> Callable[..., None]:
        """A toggle button as a push button: it springs back, and only going down counts."""
        act = self._guarded(work)

        def run(change: Any) -> None:
            if change["new"]:
                button.value = False
                act()

        return run

    def _moved(self) -> None:
        """Anything on the left was changed: take it all and measure."""
        session = self.session
        if session.steps:
            session.move(self.step.value)
        session.limit(self.seed.value, self.budget.value or None)
        session.settle(self._read())
        self._submit()

    def _chosen(self) -> None:
        self.session.choose(word(self.probe))
        self._show_form()
        self._submit()

    def _visited(self) -> None:
        self.session.visit(word(self.run_choice))
        self._show_steps()
        self._submit()

    def _run(self) -> None:
        self.session.settle(self._read())
        self._submit(again=True)

    def _submit(self, again: bool = False) -> None:
        self._say("")
        self.view.add_class("wb-stale")
        if self.session.submit(again):
            self.opinion.value = ""
        else:
            self.view.remove_class("wb-stale")
        self._show_code()
        self.place.update()

    def _stop(self) -> None:
        self.session.cancel()

    def _ask(self) -> None:
        if self.session.offers_opinion:
            self.ask.disabled = True
            self._say(look.ASKING)
            self.session.ask_others(self._opined)

    def _opined(self, found: Any) -> None:
        """The others have answered, or failed; called in a thread of its own."""
        if found is not None:
            self._say(look.problem(found) if isinstance(found, Exception) else "", error=True)
        if found is not None and not isinstance(found, Exception):
            self.opinion.value = found.to_html()
        self.ask.disabled = not self.session.offers_opinion

    # On the map -----------------------------------------------------------------------------------------------------

    def _touched(self, touch: dict[str, Any]) -> None:
        """A person clicked, zoomed or double-clicked in the picture."""
        places = self.session.places
        if touch["kind"] == "click":
            self._guarded(lambda: places.click(touch["x"], touch["y"]) and self._remark())()
        elif touch["kind"] == "zoom":
            self._rest(self._guarded(lambda: places.zoom(tuple(touch["x"]), tuple(touch["y"])) and self._resample()))
        elif touch["kind"] == "reset":
            self._rest.give_up()
            self._guarded(self._whole)()

    def _typed(self) -> None:
        if self.session.places.choose(self.place.u.value, self.place.v.value):
            self._remark()

    def _remark(self) -> None:
        """Another point is chosen: mark it, beside this callback."""
        self.place.update()
        self.session.chore(self._guarded(self._redraw))

    def _whole(self) -> None:
        if self.session.places.whole():
            self._resample()

    def _explained(self) -> None:
        (self.form.add_class if self.explain.value else self.form.remove_class)("wb-explained")

    def _offer_columns(self) -> None:
        self.column.options = list(self.session.venues[word(self.venue)])

    def _export(self) -> None:
        ending = f".{word(self.format)}"
        path = word(self.file).removesuffix(ending) + ending
        asked = (path, word(self.venue), word(self.column), word(self.provenance))
        self._say(f"Writing {path} ...")
        self.session.chore(self._guarded(lambda: self._say(self.session.export(*asked))))

    def _fill_venues(self) -> None:
        self.venue.options = list(self.session.venues)

    # What the person sees -------------------------------------------------------------------------------------------

    def _show_form(self) -> None:
        probe = self.session.order.probe
        self.about.value = look.about(type(probe))
        shown, self._read = form.widgets(type(probe), probe, self._guarded(self._moved))
        self.form.children = (shown,)
        self.step.disabled, self.run_choice.disabled = not self.session.needs_step, not self.session.needs_run
        self.format.options = self.session.formats

    def _show_steps(self) -> None:
        if not self.session.steps:
            return
        self._quiet = True
        try:
            steps, now, before = self.session.steps, self.session.order.step, self.step.value
            with self.step.hold_sync():  # one message: the page would cut a later index to the shorter scale
                self.step.options = steps
                self.step.value = before if before in steps else now
            self.step.value = now
        finally:
            self._quiet = False

    def _show_runs(self) -> None:
        if self.run_choice.options != self.session.labels:
            self._quiet = True
            try:
                with self.run_choice.hold_sync():  # one message: new options alone would choose the first of them
                    self.run_choice.options, self.run_choice.value = self.session.labels, self.session.order.run
            finally:
                self._quiet = False
            self._show_code()

    def _show_code(self) -> None:
        self.copy.text = self.session.code()
        self.code.value = look.code(self.copy.text)

    def _say(self, words: str, error: bool = False) -> None:
        self.status.value = look.status(words, error) if words else ""

    def _tell(self, state: Any) -> None:
        """The job's state changed."""
        self.bar.value = state.done
        self.bar.bar_style = {"failed": "danger", "cancelled": "warning"}.get(state.status, "")
        self.progress.value = look.progress(state)
        self.cancel.disabled = not state.busy
        self.ask.disabled = not self.session.offers_opinion
        if state.message:
            self._say(state.message, error=state.status == "failed" or " raised " in state.message)

    def _draw(self, reading: Reading) -> None:
        """A reading came; called in the job's thread."""
        self._picture(reading)
        self.place.update()
        self.summary.value = look.answer(reading)
        self.ask.disabled = not self.session.offers_opinion
        self.view.remove_class("wb-stale").remove_class("wb-empty")
        if reading.done == 1:
            self.still.keep(reading)

    def _redraw(self) -> None:
        """The page has more or less room than before."""
        if self.session.latest is not None:
            self._picture(self.session.latest)

    def _picture(self, reading: Reading) -> None:
        drawn = look.fitted(reading.figure(), self.copy.room)
        places = self.session.places
        self.figure.update_from(drawn if places.map is None else marked(drawn, places.chosen))

    # A training that goes on ------------------------------------------------------------------------------------------

    def follow(self, pause: float = PAUSE) -> None:
        """Take in what is recorded from now on, until that ends (in a folder: never) or the widgets are closed."""
        live = self.follower.goes_on
        if (live or self.follower.watches) and self.ticker is None:
            self.title.value = look.title(self.session.target, live)
            self.ticker: Ticker | None = Ticker(self._followed, lambda: self.follower.spent, pause)

    def close(self) -> None:
        """Take the widgets from the page, and stop what measures and follows."""
        if self.ticker is not None:
            self.ticker.stop()
        self.session.job.close(0.0)
        self.view.close()

    def _followed(self) -> bool:
        """One look at the record, in the ticker's thread; whether another one is wanted."""
        if self.view.comm is None:
            return False
        goes_on = self.follower.goes_on  # asked before the look, so that the last look sees the whole record
        self._guarded(lambda: self._take_in(goes_on))()
        return goes_on or self.follower.waits or self.follower.watches

    def _take_in(self, live: bool) -> None:
        self.follower.look()
        again = self.follower.due()
        if (self.step.options, self.step.value) != (self.session.steps, self.session.order.step):
            self._show_steps()
        self._show_runs()
        self.title.value = look.title(self.session.target, live)
        if again:
            self._submit(again=True)

    # Notebook -------------------------------------------------------------------------------------------------------

    def show(self) -> None:
        """Show the bench as the output of this cell, and its still picture as the next one."""
        self._submit()
        self.still.show(self.view, self.words)
        self.follow()

    def _ipython_display_(self) -> None:
        if not self.still.shown_here:
            self.still.show(self.view, self.words)

    def __repr__(self) -> str:
        return f"<Bench on {self.session.target!r}>"
