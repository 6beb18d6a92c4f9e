"""The command line: what a person types, what is printed, and one clear line when something is wrong."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import workbench as wb
from workbench import cli, doctor, report
from workbench.zoo import digits, nets, training

WIDTHS = (64, 5, 10)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model, data = tmp_path_factory.mktemp("runs") / "first", nets.dense(WIDTHS), digits.digits().train
    few = (data[0][:60], data[1][:60])
    arguments = {"data": few, "loss": "cross_entropy", "build": nets.dense, "build_args": {"widths": WIDTHS}}
    with wb.Recorder(folder, model, every=4, **arguments) as rec:
        training.train(model, few, steps=9, recorder=rec)
    return folder


def test_probe_prints_numbers_stores_the_reading_and_draws_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_store: Path
) -> None:
    words = ["probe", str(run), "--probe", "NeuralCollapse", "--set", "layer=linear2", "--step", "8"]
    figure = tmp_path / "fig.pdf"
    assert cli.main([*words, "--out", str(figure), "--venue", "icml2024", "--column", "full"]) == 0
    said = capsys.readouterr().out
    wanted = wb.probes.NeuralCollapse(layer="linear2").run(wb.Trajectory.open(run).subject(8))
    value, error = wanted.summary["nc1"], wanted.summary["nc1_error"]
    assert re.search(rf"^nc1 +{value:.3f} ± {error:.3f}$", said, re.MULTILINE)
    assert "on 60 of 60 examples" in said
    (entry,) = wb.Store(own_store).find(probe="NeuralCollapse")
    assert entry.key in said
    assert entry.load().data.equals(wanted.data)
    assert wb.load(figure).data.equals(wanted.data)
    # The second time the store answers: nothing is measured and the numbers are the same.
    before = entry.path.stat().st_mtime_ns, entry.path.read_bytes()
    assert cli.main(words) == 0
    assert capsys.readouterr().out == said.replace(f"figure written: {figure}\n", "")
    assert entry.path.read_bytes() == before[1]
    for name in ("a.svg", "b.png"):
        assert cli.main(["export", entry.key[:12], str(tmp_path / name), "--provenance", "anonymous"]) == 0
        assert (tmp_path / name).stat().st_size > 1000
    assert cli.main(["export", str(figure), str(tmp_path / "again.pdf"), "--store", str(own_store)]) == 0
    assert wb.load(tmp_path / "again.pdf").data.equals(wanted.data)


def test_a_second_opinion_is_printed_also_of_a_stored_reading(run: Path, capsys, own_store: Path) -> None:
    words = ["probe", str(run), "--probe", "HessianSpectrum", "--set", "top=1", "--set", "density=false"]
    for _ in range(2):  # measured, then from the store
        assert cli.main([*words, "--second-opinion"]) == 0
        said = capsys.readouterr().out
        assert re.search(r"^eigenvalue 1 +[\d.]+ ± \S+ +PyHessian +[\d.]+", said, re.MULTILINE)
        assert re.search(r"^trace .*PyHessian", said, re.MULTILINE)
        assert "on 60 of 60 examples" in said


def test_a_plane_has_its_second_opinion_too(run: Path, capsys, own_store: Path) -> None:
    assert cli.main(["probe", str(run), "--probe", "Plane", "--set", "points=5", "--second-opinion"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^RMS difference, rows put right +\S.* +loss-landscapes +\S+ .* yes$", said, re.MULTILINE)
    assert re.search(r"^RMS difference, as returned .* no$", said, re.MULTILINE)


def test_along_reads_every_checkpoint(run: Path, capsys: pytest.CaptureFixture[str], own_store: Path) -> None:
    assert cli.main(["along", str(run), "--probe", "NeuralCollapse", "--every", "2"]) == 0
    (entry,) = wb.Store(own_store).find(probe="Along")
    assert entry.load().data["step"].values.tolist() == [0, 8, 9]
    assert "3 checkpoints" not in capsys.readouterr().err


def test_a_sweep_measures_every_checkpoint_of_every_run(run: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("distributed")
    words = ["sweep", str(run), "--probe", "NeuralCollapse", "--probe", "Displacement"]
    assert cli.main([*words, "--store", str(tmp_path / "store"), "--workers", "1"]) == 2
    assert "Displacement looks at a pair; got trajectory" in capsys.readouterr().err
    words, table = words[:4], tmp_path / "numbers.csv"
    assert cli.main([*words, "--store", str(tmp_path / "store"), "--workers", "1", "--out", str(table)]) == 0
    steps = wb.Trajectory.open(run).steps
    assert f"<Sweep of {len(steps)} tasks: {len(steps)} measured>" in capsys.readouterr().out
    numbers = pd.read_csv(table)
    assert list(numbers.step) == list(steps)
    wanted = wb.probes.NeuralCollapse().run(wb.Trajectory.open(run).subject(steps[-1])).summary["nc1"]
    assert float(numbers.nc1.iloc[-1]) == pytest.approx(float(wanted), rel=1e-5)


def test_a_sweep_looks_at_the_steps_that_are_named(run: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("distributed")
    words = ["sweep", str(run), "--probe", "NeuralCollapse", "--store", str(tmp_path / "store"), "--workers", "1"]
    table = tmp_path / "numbers.csv"
    for chosen, wanted in (
        (["--steps", "last,4"], [4, 9]),
        (["--steps", "3..8"], [4, 8]),
        (["--every", "2"], [0, 8, 9]),
    ):
        assert cli.main([*words, *chosen, "--out", str(table)]) == 0
        assert list(pd.read_csv(table).step) == wanted
    assert "stored" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["sweep", "{run}", "--probe", "Plane", "--steps", "5"], "no weights at step 5; it has 0, 4, 8, 9"),
        (["sweep", "{run}", "--probe", "Plane", "--steps", "0,5..7"], "at steps 5..7; it has 0, 4, 8, 9"),
        (["sweep", "{run}", "--probe", "Plane", "--steps", "4-8"], "got '4-8'. .* has 0, 4, 8, 9"),
        (["sweep", "{run}", "--probe", "Plane", "--every", "0"], "every=0 must be at least 1"),
        (["sweep", "{run}", "--probe", "Spikes", "--steps", "4"], "choose among checkpoints, and none of these"),
        (["probe", "{run}", "--probe", "Nope"], "there is no probe called 'Nope'.*NeuralCollapse"),
        (["probe", "{run}", "--probe", "Plane", "--set", "points=x"], "Plane.points must be an integer; got 'x'"),
        (["probe", "{run}", "--probe", "Plane", "--set", "points=1"], r"Plane.points must lie in \["),
        (["probe", "{run}", "--probe", "Plane", "--set", "size=1"], "no setting 'size'"),
        (["probe", "{run}", "--probe", "Plane", "--set", "size"], "KEY=VALUE"),
        (["probe", "{run}", "--probe", "Plane", "--step", "5"], "no checkpoint at step 5; nearest: 4 and 8"),
        (["probe", "{run}", "--probe", "Plane", "--step", "x"], "--step takes a recorded step or `last`; got 'x'"),
        (["probe", "{run}", "--probe", "Plane", "--out", "a.pdf", "--venue", "icml"], "no venue 'icml'.*icml2024"),
        (["probe", "{run}", "--probe", "Plane", "--out", "a.jpg"], "jpg"),
        (["probe", "{run}", "--probe", "Line", "--out", "a.vts"], "a surface of losses, as Plane measures it; Line"),
        (["probe", "{run}", "--probe", "Bundle", "--second-opinion"], "about Bundle; .*HessianSpectrum, Line, Plane"),
        (["probe", "{run}/none", "--probe", "Plane"], "holds no record"),
        (["export", "ffff", "fig.pdf"], "no finished reading"),
        (["export", "none.nc", "fig.pdf"], "none.nc"),
        (["demo", "--out", "{run}"], "no part of a report"),
        (["serve", "{run}/none"], "none"),
        (["list", "nope"], "there is no probe called 'nope'"),
    ],
)
def test_what_is_wrong_takes_one_line_and_exit_code_2(
    run: Path, words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(p.name for p in run.rglob("*"))
    filled = [word.format(run=run) for word in words]
    assert cli.main(filled) == 2
    told = capsys.readouterr()
    assert re.search(wanted, told.err)
    assert told.err.startswith("workbench: ")
    assert len(told.err.splitlines()) == 1
    assert sorted(p.name for p in run.rglob("*")) == before
    with pytest.raises((ValueError, OSError, LookupError)):
        cli.main([*filled, "--debug"])


def test_code_from_outside_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "their_nets.py").write_text(
        "from workbench.zoo import nets\ndef build(): return nets.dense((64, 5, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = digits.digits().test
    with wb.Recorder(tmp_path / "r", nets.dense(WIDTHS), build="their_nets:build", data=data, loss="cross_entropy"):
        pass
    words = ["probe", str(tmp_path / "r"), "--probe", "NeuralCollapse"]
    assert cli.main(words) == 2
    assert re.search(r"their_nets:build, which is code from outside.*--trust", capsys.readouterr().err)
    assert "their_nets" not in sys.modules
    assert cli.main([*words, "--trust"]) == 0


def test_a_budget_says_that_the_answer_is_unfinished(
    run: Path, capsys: pytest.CaptureFixture[str], own_store: Path
) -> None:
    words = ["probe", str(run), "--probe", "Plane", "--set", "points=41", "--seconds", "1e-9"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "not converged, " in said
    assert "kept unfinished" in said
    assert not wb.Store(own_store).find(probe="Plane")
    assert len(wb.Store(own_store).find(probe="Plane", partial=True)) == 1


def test_ctrl_c_ends_with_the_answer_so_far(run: Path, own_store: Path, monkeypatch, capsys) -> None:
    seen: list[float] = []

    @contextlib.contextmanager
    def interrupted():
        def say(words: str, share: float) -> None:
            seen.append(share)
            if len(seen) == 3:
                raise KeyboardInterrupt

        yield say

    monkeypatch.setattr(cli, "_progress", interrupted)
    assert cli.main(["probe", str(run), "--probe", "Plane"]) == 0
    told = capsys.readouterr()
    assert "this is the answer so far" in told.err
    assert "kept unfinished" in told.out
    (entry,) = wb.Store(own_store).find(probe="Plane", partial=True)
    assert entry.done == seen[2]
    monkeypatch.setattr(wb.probes.NeuralCollapse, "stream", lambda *_: _raise(KeyboardInterrupt()))
    assert cli.main(["probe", str(run), "--probe", "NeuralCollapse"]) == cli.STOPPED
    assert capsys.readouterr().err == "stopped.\n"


def _raise(problem: BaseException):
    raise problem
    yield


def test_list_and_doctor_say_what_there_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["list"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == set(wb.catalog.probes())
    assert cli.main(["list", "Plane"]) == 0
    assert "--set points=65" in capsys.readouterr().out
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^ok +torch +2\.", said, re.MULTILINE)
    import platform

    assert platform.node() not in said
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "xarray" else "1")
    assert cli.main(["doctor"]) == 1
    assert re.search(r"^NO +xarray +not installed: pip install xarray$", capsys.readouterr().out, re.MULTILINE)


def test_serving_hands_the_words_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple] = []
    monkeypatch.setattr("workbench.ui.app.serve", lambda folder, **rest: seen.append((folder, rest)))
    assert cli.main(["serve", str(run), "--no-browser", "--trust", "--port", "8123"]) == 0
    assert seen == [(str(run), {"port": 8123, "trust": True, "open_browser": False})]


def test_the_demo_writes_a_report_whose_numbers_are_its_readings(tmp_path: Path, capsys) -> None:
    out = tmp_path / "report"
    assert cli.main(["demo", "--quick", "--out", str(out)]) == 0
    assert str(out / "index.html") in capsys.readouterr().out
    page, words = (out / "index.html").read_text(), (out / "index.md").read_text()
    found = {e.probe.rpartition(":")[2]: e.load() for e in wb.Store(out / "readings").find()}
    assert set(found) == {"HessianSpectrum", "Plane", "NeuralCollapse", "Along"}
    for reading in found.values():
        for name, text in wb.words.summary_rows(reading.summary):
            assert f"| {name.replace('_', ' ')} | {text} |" in words
    for name in re.findall(r"figures/([\w-]+)\.png", words):
        assert wb.load(out / "figures" / f"{name}.pdf").probe.name in found
        assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"figures/{name}.png" in page
    assert "±" in page
    assert str(tmp_path) not in page + words
    assert wb.Trajectory.open(out / "record").subject(120).path.label == "record"
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis.tex"):
        report.demo(out)
    assert (out / "thesis.tex").read_text() == "mine"


def test_importing_the_command_line_is_light() -> None:
    code = (
        "import sys, workbench.cli; "
        "heavy = {'torch', 'matplotlib', 'plotly', 'panel', 'rich', 'pandas', 'sklearn'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
