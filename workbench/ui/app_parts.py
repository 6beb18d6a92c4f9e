"""What a served page is made of: Panel's widgets and where they stand. What they do is in :mod:`workbench.ui.app`."""

from __future__ import annotations

from typing import Any

from workbench.draw.screen import CONFIG
from workbench.ui import look

BUDGETS = {"no limit": 0.0, "1 s": 1.0, "5 s": 5.0, "20 s": 20.0, "1 min": 60.0, "5 min": 300.0}

# Once a picture is painted, and the page has then had as long for the person as the picture took: on a slow machine a
# page that always draws answers no click. A page that nobody sees paints nothing, and answers at once.
_ANSWER = """
const count = cb_obj.value, began = performance.now();
const answer = () => { drawn.value = count; };
const rest = () => setTimeout(answer, Math.min(performance.now() - began, 2000));
if (document.hidden) answer(); else requestAnimationFrame(() => requestAnimationFrame(rest));
"""


class Parts:
    """The widgets of a page, by name."""

    head: Any

    def _make_choosers(self, runs: list[str]) -> None:
        import panel as pn

        wide = {"sizing_mode": "stretch_width"}
        self.folder = pn.widgets.Select(
            label="run", options=runs, visible=len(runs) > 1, css_classes=["wb-folder"], **wide
        )
        self.label = pn.widgets.Select(label="member", visible=False, **wide)
        self.step = pn.widgets.DiscreteSlider(label="checkpoint", options=[0], css_classes=["wb-step"], **wide)
        self.probe = pn.widgets.Select(label="probe", css_classes=["wb-probe"], **wide)
        self.about = pn.pane.HTML(**wide)
        self.form: Any = pn.Column(margin=0, **wide)
        self.seed = pn.widgets.IntInput(label="seed", value=0, start=0, css_classes=["wb-seed"], **wide)
        self.budget = pn.widgets.Select(label="time limit", options=BUDGETS, value=0.0, **wide)
        self.run = pn.widgets.Button(label="Run", css_classes=["wb-run"], **wide)
        self.cancel = pn.widgets.Button(label="Cancel", disabled=True, css_classes=["wb-cancel"], **wide)
        self.explain = pn.widgets.Toggle(label="?", width=40, css_classes=["wb-explain"])

    def _make_answer(self) -> None:
        import panel as pn

        wide = {"sizing_mode": "stretch_width"}
        self.bar = pn.indicators.Progress(value=0, max=100, height=8, css_classes=["wb-bar"], **wide)
        self.progress = pn.pane.HTML(css_classes=["wb-progress"])
        self.figure = pn.pane.Plotly(None, css_classes=["wb-figure"], config=CONFIG, **wide)
        # The page answers each picture by copying a number.
        self._sent, self._drawn = (
            pn.widgets.IntInput(value=0, visible=False),
            pn.widgets.IntInput(value=0, visible=False),
        )
        self._sent.jscallback(value=_ANSWER, args={"drawn": self._drawn})
        self.summary = pn.pane.HTML(css_classes=["wb-summary-box"], **wide)
        self.ask = pn.widgets.Button(label="Second opinion", disabled=True, css_classes=["wb-ask"])
        self.opinion = pn.pane.HTML(css_classes=["wb-opinion-box"], **wide)
        self.status = pn.pane.HTML(css_classes=["wb-status"], **wide)

    def _make_place(self) -> None:
        """The chosen point of a map, the code that loads it, and where probes look."""
        import panel as pn

        sheet = {"stylesheets": [look.SHEET], "sizing_mode": "stretch_width"}
        self.place_words = pn.pane.HTML(css_classes=["wb-place-words"], **sheet)
        self.u = pn.widgets.FloatInput(label="u", value=0.0, width=110, css_classes=["wb-place-u"])
        self.v = pn.widgets.FloatInput(label="v", value=0.0, width=110, css_classes=["wb-place-v"])
        self.go = pn.widgets.Button(label="Probe here", css_classes=["wb-place-probe"], align="end")
        self.back = pn.widgets.Button(label="Back to the model", css_classes=["wb-place-back"], align="end")
        self.whole = pn.widgets.Button(label="Whole map", css_classes=["wb-place-whole"], align="end")
        self.place_code = pn.pane.HTML(css_classes=["wb-place-code"], **sheet)
        row = pn.Row(self.u, self.v, self.go, self.back, self.whole, margin=0)
        self.place = pn.Column(self.place_words, row, self.place_code, visible=False, margin=0, **sheet)

    def _make_exits(self) -> None:
        import panel as pn

        wide = {"sizing_mode": "stretch_width"}
        formats, kinds = ["pdf", "svg", "pgf", "png"], ["full", "anonymous", "none"]
        self.venue = pn.widgets.Select(label="venue", css_classes=["wb-venue"], **wide)
        self.column = pn.widgets.Select(label="column", css_classes=["wb-column"], **wide)
        self.format = pn.widgets.Select(label="format", options=formats, css_classes=["wb-format"], **wide)
        self.provenance = pn.widgets.Select(label="provenance", options=kinds, css_classes=["wb-provenance"], **wide)
        self.file = pn.widgets.TextInput(label="file", value="figure", css_classes=["wb-file"], **wide)
        self.export = pn.widgets.Button(label="Export", css_classes=["wb-export"], **wide)
        self.code = pn.pane.HTML(css_classes=["wb-code-box"], **wide)
        self._text, self.copy = pn.widgets.TextInput(visible=False), pn.widgets.Button(label="Copy", width=80)
        self.copy.jscallback(clicks="navigator.clipboard.writeText(text.value)", args={"text": self._text})

    def _arranged(self) -> Any:
        import panel as pn

        wide, sheet = {"sizing_mode": "stretch_width"}, {"stylesheets": [look.SHEET]}
        answers = (self.summary, self.opinion, self.status)
        for pane in (self.about, self.progress, *answers, self.code, self.bar, self.run):
            pane.stylesheets = [look.SHEET]
        self.head = pn.pane.HTML(**sheet)
        buttons = pn.Row(self.run, self.cancel, self.explain, margin=0, **wide)
        chosen = [
            self.folder,
            self.label,
            self.step,
            self.probe,
            self.about,
            self.form,
            self.seed,
            self.budget,
            buttons,
        ]
        out = [self.venue, self.column, self.format, self.provenance, self.file, self.export]
        bar = pn.Row(self.bar, self.progress, align="center", **wide)
        answer = [
            bar,
            self.figure,
            self.place,
            self.summary,
            self.ask,
            self.opinion,
            self.status,
            self._sent,
            self._drawn,
        ]
        left = pn.Column(_card(None, *chosen), _card("Export for a paper", *out), width=350)
        right = pn.Column(_card(None, *answer), _card("Copy as code", self.code, self.copy, self._text), **wide)
        main = pn.Row(left, right, **wide)
        return pn.Column(self.head, main, css_classes=["wb-bench"], max_width=1500, **wide, **sheet)


def _card(heading: str | None, *parts: Any) -> Any:
    import panel as pn

    sheet = {"stylesheets": [look.SHEET], "sizing_mode": "stretch_width"}
    head = [pn.pane.HTML(f'<div class="wb-heading">{heading}</div>', **sheet)] if heading else []
    return pn.Column(*head, *parts, css_classes=["wb-card"], margin=5, **sheet)
