"""Figure files that carry their reading: there and back in each format, anonymous, atomic."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import re
import zlib

import h5py
import numpy as np
import pytest
from pictures import Drawn, reading
from PIL import Image
from pypdf import PdfReader

from workbench.draw import anonymous as anonymous_module
from workbench.draw import carry
from workbench.draw.anonymous import anonymous, scrub
from workbench.draw.carry import FORMATS, Cargo, sidecar, unload
from workbench.draw.export import export, load, render
from workbench.draw.files import write_all
from workbench.draw.show import LIMIT, PLOTLY, mimebundle

SECRETS = {
    "git": "0123456789abcdef0123456789abcdef01234567",
    "created": "2026-03-01T10:11:12+00:00",
    "user": "alice.author",
    "subject": {
        "model": "Net",
        "on": "on 10 of 20 examples",
        "label": "run of alice",
        "notes": ["read from /home/alice/runs/grok/step_3.safetensors", "ask alice@example.edu on wonderland"],
    },
}
WORDS = [b"alice", b"wonderland", b"0123456789abcdef0123456789abcdef01234567", b"2026-03-01", b"/home", b"runs/grok"]


def same(a, b):
    return (
        a.data.identical(b.data)
        and a.probe == b.probe
        and a.done == b.done
        and dict(a.provenance) == dict(b.provenance)
    )


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("limit", [carry.LIMIT, 10])
def test_a_figure_gives_its_reading_back(tmp_path, monkeypatch, suffix, limit):
    monkeypatch.setattr(carry, "LIMIT", limit)
    made, path = reading(), tmp_path / f"fig3{suffix}"
    assert export(made, path, venue="icml2024", column="full") == path
    assert same(load(path), made)
    assert sidecar(path).exists() == (suffix == ".pgf" or limit == 10)
    again = load(str(path))
    assert again.figure().panels
    export(again, tmp_path / f"again{suffix}", venue="neurips2024")


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_facts_travel_in_the_file(tmp_path, suffix):
    path = export(reading(git="abc"), tmp_path / f"f{suffix}", venue="jmlr2001")
    facts = unload(path).facts
    assert facts["probe"] == Drawn().path
    assert facts["settings"] == {"picture": "contour"}
    assert (facts["seed"], facts["git"], facts["venue"]) == (3, "abc", "jmlr2001, full column")
    assert facts["font"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_exporting_twice_gives_the_same_bytes(tmp_path, suffix):
    first, second = (export(reading(), tmp_path / name).read_bytes() for name in (f"a{suffix}", f"b{suffix}"))
    assert first.replace(b"a.reading.nc", b"b.reading.nc") == second


def test_a_pdf_that_another_program_reads(tmp_path):
    found = PdfReader(export(reading(), tmp_path / "f.pdf", venue="icml2024"))
    assert found.attachments["reading.nc"][0].startswith(b"\x89HDF")
    assert json.loads(found.metadata["/Subject"])["seed"] == 3
    assert b"rdf:Description" in found.root_object["/Metadata"].get_object().get_data()


def test_a_png_that_another_program_reads(tmp_path):
    path = export(reading(), tmp_path / "f.png", venue="icml2024", dpi=200)
    with Image.open(path) as image:
        image.load()
        assert image.width == round(3.25 * 200)
        assert json.loads(image.text["workbench"])["seed"] == 3


def everything_in(path):
    """All bytes of a file, also those inside compressed streams, attachments and HDF5."""
    content = path.read_bytes()
    pieces = [content]
    if path.suffix == ".pdf":
        found = PdfReader(io.BytesIO(content))
        pieces += [
            o.get_data() for o in map(found.get_object, range(1, found.trailer["/Size"])) if hasattr(o, "get_data")
        ]
        pieces += [repr(found.metadata).encode(), *(d for files in found.attachments.values() for d in files)]
    if path.suffix in FORMATS:
        pieces.append(unload(path).reading or b"")
        pieces += [zlib.decompress(base64.b64decode(m)) for m in re.findall(rb"zlib\+base64\">(.*?)<", content)]
    if path.suffix == ".nc":
        with h5py.File(io.BytesIO(content)) as file:
            pieces.append(repr(dict(file.attrs)).encode())
            file.visititems(lambda name, o: pieces.append(f"{name} {dict(o.attrs)}".encode()))
    return b"\n".join(pieces)


@pytest.fixture
def alice(monkeypatch):
    """A user and a machine whose names must not appear."""
    monkeypatch.setattr(anonymous_module.getpass, "getuser", lambda: "alice")
    monkeypatch.setattr(anonymous_module.socket, "gethostname", lambda: "wonderland.example.edu")


@pytest.mark.parametrize("suffix", FORMATS)
def test_anonymous_files_tell_no_name_path_commit_or_time(tmp_path, alice, suffix):
    made = reading(**SECRETS)
    for provenance, telling in (("full", True), ("anonymous", False)):
        path = export(
            made, tmp_path / provenance / f"f{suffix}" if mkdir(tmp_path / provenance) else "", provenance=provenance
        )
        content = b"\n".join(everything_in(p) for p in sorted(path.parent.iterdir())).lower()
        assert [w for w in WORDS if w in content] == (WORDS if telling else [])
    back = load(path)
    np.testing.assert_array_equal(back.data.loss, made.data.loss)
    assert back.provenance["seed"] == 3
    assert back.provenance["fingerprint"] == "ab" * 16


def mkdir(folder):
    folder.mkdir()
    return True


@pytest.mark.parametrize("suffix", FORMATS)
def test_without_provenance_nothing_is_attached(tmp_path, suffix):
    path = export(reading(), tmp_path / f"f{suffix}", provenance="none")
    assert b"fingerprint" not in everything_in_picture(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]
    with pytest.raises(ValueError, match="carries no reading"):
        load(path)


def everything_in_picture(path):
    content = path.read_bytes()
    if path.suffix != ".pdf":
        return content
    found = PdfReader(io.BytesIO(content))
    assert not found.attachments
    return content + repr(found.metadata).encode()


@pytest.mark.parametrize(
    "text",
    [
        "/home/me/x.pt",
        "~/runs/a",
        "C:\\Users\\me\\x",
        "file:///srv/data",
        "me@lab.org",
        "0" * 40,
        "see ./a/b/c.txt",
        "/scratch/user/data",
    ],
)
def test_texts_that_identify_are_hidden(text):
    hidden = scrub({"a": [f"from {text} on"]})["a"][0]
    assert text not in hidden
    assert "(hidden)" in hidden


@pytest.mark.parametrize(
    "text",
    ["on 10 of 20 examples", "loss 1/2 and 3/4", "λ/|λ|", "mypackage.nets:resnet", "10 %", "2.13.0+cpu", "and/or"],
)
def test_harmless_texts_stay(text):
    assert scrub(text) == text


def test_an_anonymous_reading_is_still_whole():
    made = anonymous(reading(**SECRETS))
    assert made.notes == ("autodiff ignores kinks",)
    assert made.converged
    assert made.figure().panels
    assert "created" not in made.provenance


@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, suffix, problem):
    path = export(reading(size=5), tmp_path / f"f{suffix}")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(handle):
        raise OSError(problem, os.strerror(problem))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"is full|denied") as caught:
        export(reading(size=6), path)
    assert caught.value.errno == problem
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_either_all_files_are_written_or_none(tmp_path):
    good, bad = tmp_path / "a", tmp_path / "missing" / "b"
    with pytest.raises(OSError, match="does not exist"):
        write_all({good: b"1", bad: b"2"})
    assert list(tmp_path.iterdir()) == []


def test_a_sidecar_that_is_missing_or_another_one_is_refused(tmp_path):
    path = export(reading(), tmp_path / "f.pgf")
    sidecar(path).write_bytes(reading(size=5).to_bytes())
    with pytest.raises(ValueError, match="is not the reading"):
        load(path)
    sidecar(path).unlink()
    with pytest.raises(ValueError, match="not beside it"):
        load(path)


def test_what_cannot_be_written_is_said_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.draw.export.render", lambda *a, **k: pytest.fail("drew"))
    for arguments, words in (
        ({"path": "f.jpg"}, r"\.pdf, \.svg, \.png, \.pgf"),
        ({"path": "f.pdf", "venue": "icml"}, "no venue"),
        ({"path": "f.pdf", "venue": "iclr2024", "column": "half"}, "'full'"),
        ({"path": "f.pdf", "provenance": "secret"}, "'anonymous'"),
    ):
        with pytest.raises(ValueError, match=words):
            export(reading(), **{**arguments, "path": tmp_path / arguments["path"]})


def test_stored_files_open_and_damaged_ones_say_so(tmp_path):
    file = tmp_path / "r.nc"
    file.write_bytes(reading().to_bytes())
    assert same(load(file), reading())
    assert same(load(sidecar(export(reading(), tmp_path / "f.pgf"))), reading())
    file.write_bytes(reading().to_bytes()[:3000])
    with pytest.raises(ValueError, match="not a whole netCDF file"):
        load(file)
    for missing in ("no.pdf", "no.nc", "no-such-key"):
        with pytest.raises(FileNotFoundError):
            load(missing if "." not in missing else tmp_path / missing)


def test_a_figure_of_another_program_has_no_reading(tmp_path):
    for suffix in FORMATS:
        file = tmp_path / f"x{suffix}"
        file.write_bytes(render(reading().figure(), suffix))
        with pytest.raises(ValueError, match="carries no reading"):
            load(file)


def test_latex_is_only_needed_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match="usetex=False"):
        export(reading(), tmp_path / "f.pdf", usetex=True)
    export(reading(), tmp_path / "f.pdf", venue="icml2024")


def test_hard_words_survive_in_every_format(tmp_path):
    facts = {"note": 'λ ≤ 3 & <b> "q" ]]> \\ % ü\n'}
    for suffix in FORMATS:
        file = tmp_path / f"x{suffix}"
        for target, content in carry.load_up(
            file, render(reading().figure(), suffix), Cargo(facts, b"data", "T & <t> λ")
        ).items():
            target.write_bytes(content)
        found = unload(file)
        assert found.facts["note"] == facts["note"]
        assert found.reading == b"data"


@pytest.mark.parametrize("picture", ["landscape", "spectrum", "curves", "surface"])
def test_a_notebook_keeps_a_small_picture(picture):
    bundle = mimebundle(reading(picture))
    assert set(bundle) == {"text/plain", "image/png", PLOTLY}
    assert len(json.dumps(bundle)) < LIMIT
    with Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))) as image:
        assert image.width >= 600
    assert "loss" in bundle["text/plain"]
    assert bundle[PLOTLY]["data"]
