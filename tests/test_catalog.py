"""The catalog: finds every probe by itself, helps with names, and writes pages that are committed as they are made."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import toys

import workbench
from workbench import catalog

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def forget_entry_points() -> Any:
    catalog._foreign.cache_clear()
    yield
    catalog._foreign.cache_clear()


def test_everything_in_the_public_folders_is_in_the_catalog_and_nothing_else() -> None:
    found = catalog.probes()
    public = {name for folder in catalog.FOLDERS for name in dir(getattr(workbench, folder))}
    assert set(found) == public
    assert {"HessianSpectrum", "Plane", "NeuralCollapse", "Along"} <= public
    for name, cls in found.items():
        folder = cls.__module__.split(".")[1]
        assert getattr(getattr(workbench, folder), name) is cls


def test_a_new_probe_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(catalog.probes())
    (tmp_path / "brand_new.py").write_text(
        "from workbench.probe import Probe\n"
        "class BrandNew(Probe):\n"
        '    """New."""\n'
        "    def stream(self, subject, draw): ...\n"
        "    def summary(self, data): ...\n"
        "    def figure(self, data): ...\n"
        "class _Helper(BrandNew): ...\n"
        "class Unfinished(Probe): ...\n"
    )
    monkeypatch.setattr(workbench.probes, "__path__", [*workbench.probes.__path__, str(tmp_path)])
    assert set(catalog.probes()) - before == {"BrandNew"}
    assert workbench.probes.BrandNew is catalog.get("BrandNew")
    monkeypatch.delitem(sys.modules, "workbench.probes.brand_new")


def test_probes_by_what_they_look_at() -> None:
    kinds = {"subject", "pair", "trajectory", "runs", "nothing"}
    parts = [catalog.probes(kind) for kind in kinds]
    assert {n for part in parts for n in part} == set(catalog.probes())
    assert "HessianSpectrum" in catalog.probes("subject")
    assert "Along" in catalog.probes("trajectory")
    assert "Along" not in catalog.probes("subject")
    assert "Grokking" in catalog.probes("trajectory")
    assert "Grokking" in catalog.probes("runs")
    assert "GrokkingLazyToRich" in catalog.probes("nothing")


def test_an_unknown_name_is_answered_with_near_ones_and_all() -> None:
    with pytest.raises(ValueError, match=r"no probe called 'HesianSpectrum'. Did you mean HessianSpectrum\?") as caught:
        catalog.get("HesianSpectrum")
    for name in catalog.probes():
        assert name in str(caught.value)
    with pytest.raises(ValueError, match=r"Did you mean HessianSpectrum\?"):
        catalog.get("hessianspectrum")
    with pytest.raises(ValueError, match=r"called 'xyzzy'\. There are: Along"):
        catalog.get("xyzzy")


def test_names_may_carry_their_folder() -> None:
    assert catalog.get("probes.HessianSpectrum") is catalog.get("HessianSpectrum") is workbench.probes.HessianSpectrum


def test_a_probe_from_words() -> None:
    made = catalog.make("HessianSpectrum", {"top": "5", "density": "false"})
    assert made == workbench.probes.HessianSpectrum(top=5, density=False)
    assert catalog.make("Plane") == workbench.landscape.Plane()
    with pytest.raises(ValueError, match="must lie in"):
        catalog.make("HessianSpectrum", {"top": "0"})


def test_a_probe_and_its_settings_are_written_in_one_word() -> None:
    made = catalog.written("HessianSpectrum:top=5,layers=0.weight,0.bias, density=false")
    assert made == workbench.probes.HessianSpectrum(top=5, layers="0.weight,0.bias", density=False)
    assert catalog.written("landscape.Plane") == catalog.written("Plane:") == workbench.landscape.Plane()
    with pytest.raises(ValueError, match=r"written as in HessianSpectrum:top=5,depth=80; got 'top'"):
        catalog.written("HessianSpectrum:top")
    with pytest.raises(ValueError, match="HessianSpectrum"):
        catalog.written("HessianSpectrum:tops=5")


# ------------------------------------------------------------------------- other packages


def announce(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    points = [EntryPoint(name=f"p{k}", value=value, group=catalog.GROUP) for k, value in enumerate(values)]
    monkeypatch.setattr(catalog, "entry_points", lambda group: points if group == catalog.GROUP else [])


def test_other_packages_bring_probes_by_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, "toys")
    assert catalog.get("Trace") is toys.Trace
    assert catalog.get("Failing") is toys.Failing
    assert "Probe" not in catalog.probes()
    assert set(catalog.pages()) == {f"{c.__name__}.md" for c in catalog.own_probes()} | {"index.md"}
    catalog._foreign.cache_clear()
    announce(monkeypatch, "toys:Trace")
    assert catalog.probes()["Trace"] is toys.Trace
    assert "Failing" not in catalog.probes()


def test_a_package_that_cannot_be_imported_takes_nothing_else_away(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, "no_such_package.probes", "toys:Trace")
    with pytest.warns(RuntimeWarning, match=r"no_such_package\.probes cannot be imported"):
        assert "Trace" in catalog.probes()
    assert "HessianSpectrum" in catalog.probes()


def test_two_probes_of_one_name_are_an_error_that_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.new_class("Plane", (toys.Trace,), exec_body=lambda ns: ns.update(__module__="toys"))
    monkeypatch.setattr(toys, "Plane", other, raising=False)
    announce(monkeypatch, "toys:Plane")
    with pytest.raises(ValueError, match=r"two probes are called Plane: workbench\.landscape\.plane and toys"):
        catalog.probes()


# ---------------------------------------------------------------------------------- pages


def test_words_are_the_first_sentence() -> None:
    assert catalog.words(toys.Failing) == "Raises after its second reading."
    assert catalog.words(toys.Trace) == (
        "Trace of the toy's Hessian by random vectors, one reading each: `trace = mean(v · a v)`."
    )
    for cls in catalog.probes().values():
        assert 10 < len(catalog.words(cls)) < 200
        assert "\n" not in catalog.words(cls)


def test_a_page_names_every_setting_and_every_variable() -> None:
    text = catalog.page(toys.Trace)
    assert text.startswith("# Trace\n")
    assert "| `vectors` | int | `5` | 2 to 5000 | Random vectors to draw. |" in text
    assert "`'normal'`: Gaussian entries; `'rademacher'`: plus and minus one" in text
    assert "| `trace` | scalar | mean of the samples |  | `trace_error` |" in text
    assert "| `sample` | vector | one sample of the trace |  | exact for these examples |" in text
    for cls in catalog.probes().values():
        page, made = catalog.page(cls), cls()
        names = [*catalog.schema.fields(cls), *made.variables]
        assert [n.name for n in names if f"| `{n.name}` |" not in page] == []
        assert "``" not in page


def test_committed_pages_are_those_that_would_be_made_now() -> None:
    folder = ROOT / "docs" / "measures"
    held = {p.name: p.read_text(encoding="utf-8") for p in folder.glob("*.md")}
    made = catalog.pages()
    again = "run: python -m workbench.catalog docs/measures"
    assert set(held) == set(made), again
    assert [name for name in made if held[name] != made[name]] == [], again


def test_writing_pages_replaces_ours_and_leaves_others_alone(tmp_path: Path) -> None:
    old = catalog.page(toys.Trace)
    (tmp_path / "Gone.md").write_text(old, encoding="utf-8")
    (tmp_path / "essay.md").write_text("# By hand\n", encoding="utf-8")
    written = catalog.write_pages(tmp_path)
    assert {p.name for p in written} == set(catalog.pages())
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in written} | {"essay.md"}
    index = (tmp_path / "index.md").read_text(encoding="utf-8")
    for name in catalog.probes():
        assert f"[{name}]({name}.md)" in index


def test_pages_are_written_by_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "workbench.catalog", str(tmp_path / "pages")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == ""
    assert (tmp_path / "pages" / "index.md").is_file()
