"""A figure file that carries what it was drawn from: the reading as netCDF bytes, and facts about it as JSON.

| format | the reading | the facts |
|---|---|---|
| PDF | an attached file ``reading.nc`` | document properties (Subject), XMP |
| SVG | base64 of its zlib stream in ``<metadata>`` | JSON in ``<metadata>`` |
| PNG | a private chunk ``wbNc`` (zlib) | an ``iTXt`` chunk ``workbench`` |
| PGF | a sidecar ``<name>.reading.nc`` | a comment on the first line |
| VTS | field data ``reading.nc`` | field data ``workbench`` |

Readings over 5 MB go to the sidecar in every format; the facts then hold its name and SHA-256.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, unescape

from workbench.draw import vts

LIMIT = 5_000_000
"""Bytes beyond which a reading is laid beside the figure instead of into it."""

FORMATS = (".pdf", ".svg", ".png", ".pgf")
SURFACE = ".vts"
"""A surface in space for other programs, see :mod:`workbench.draw.heights`: the same cargo, but no figure."""
_ATTACHED = "reading.nc"
_PNG_HEAD = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Cargo:
    """What a figure file carries: facts for people and machines, and the reading's bytes (None when there are none)."""

    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    reading: bytes | None = None
    title: str = ""


def sidecar(path: Path) -> Path:
    """The file beside a figure that holds its reading: ``fig3.pgf`` -> ``fig3.reading.nc``."""
    return path.with_name(f"{path.stem}.reading.nc")


def load_up(path: Path, picture: bytes, cargo: Cargo) -> dict[Path, bytes]:
    """The files to write: the picture with its cargo inside, and a sidecar where the cargo does not fit in.

    Raises:
        ValueError: the suffix is not one of :data:`FORMATS`.
    """
    suffix = checked_suffix(path)
    if not cargo.facts and cargo.reading is None:
        return {path: picture}
    if cargo.reading is None or (suffix != ".pgf" and len(cargo.reading) <= LIMIT):
        return {path: _EMBED[suffix](picture, cargo)}
    beside = sidecar(path)
    facts = {**cargo.facts, "sidecar": beside.name, "sha256": hashlib.sha256(cargo.reading).hexdigest()}
    return {beside: cargo.reading, path: _EMBED[suffix](picture, Cargo(facts, None, cargo.title))}


def checked_suffix(path: Path) -> str:
    """The lower-case suffix of a figure file.

    Raises:
        ValueError: it is not a format that figures, or planes, are written in.
    """
    suffix = path.suffix.lower()
    if suffix not in (*FORMATS, SURFACE):
        raise ValueError(
            f"A figure is written as {', '.join(FORMATS)}, a plane also as {SURFACE}; got {path.name!r}. "
            "Choose one of these endings."
        )
    return suffix


def unload(path: Path) -> Cargo:
    """What a figure file carries, its sidecar read and checked.

    Raises:
        ValueError: it carries no reading, or the sidecar is missing or another one.
    """
    cargo = _EXTRACT[checked_suffix(path)](path.read_bytes())
    if cargo.reading is not None:
        return cargo
    if "sidecar" not in cargo.facts:
        raise ValueError(
            f"{path.name} carries no reading: it was not exported by Workbench, or with provenance='none', "
            "or another program has rewritten it. Load the stored reading instead."
        )
    return Cargo(cargo.facts, _from_beside(path, cargo.facts), cargo.title)


def _from_beside(path: Path, facts: Mapping[str, Any]) -> bytes:
    beside = path.with_name(Path(str(facts["sidecar"])).name)
    if not beside.exists():
        raise ValueError(
            f"{path.name} keeps its reading in {beside.name}, which is not beside it; put the two together."
        )
    content = beside.read_bytes()
    if hashlib.sha256(content).hexdigest() != facts.get("sha256"):
        raise ValueError(f"{beside.name} is not the reading that {path.name} was drawn from; export the figure again.")
    return content


def _json(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, ensure_ascii=True, sort_keys=True)


def _into_pdf(picture: bytes, cargo: Cargo) -> bytes:
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(picture)))
    writer.pdf_header = "%PDF-1.7"
    writer.add_metadata({"/Title": cargo.title, "/Subject": _json(cargo.facts), "/Creator": "Workbench"})
    _describe(writer, cargo)
    if cargo.reading is not None:
        _attach(writer, cargo.reading)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def _attach(writer: Any, content: bytes) -> None:
    """An attachment that is compressed in the file and whole again for whoever saves it from a viewer."""
    from pypdf.generic import NameObject

    made = writer.add_attachment(_ATTACHED, content)
    files = made.pdf_object["/EF"]
    squeezed = files["/F"].get_object().flate_encode(level=9)
    squeezed[NameObject("/Subtype")] = NameObject("/application/x-netcdf")
    files[NameObject("/F")] = writer._add_object(squeezed)


def _describe(writer: Any, cargo: Cargo) -> None:
    """The facts once more as XMP, which archives read."""
    from pypdf.generic import NameObject, StreamObject

    stream = StreamObject()
    stream.set_data(_xmp(cargo))
    stream.update({NameObject("/Type"): NameObject("/Metadata"), NameObject("/Subtype"): NameObject("/XML")})
    writer.root_object[NameObject("/Metadata")] = writer._add_object(stream)


def _xmp(cargo: Cargo) -> bytes:
    text = {"title": cargo.title, "description": _json(cargo.facts)}
    body = "".join(
        f'<dc:{name}><rdf:Alt><rdf:li xml:lang="x-default">{escape(words)}</rdf:li></rdf:Alt></dc:{name}>'
        for name, words in text.items()
    )
    return (
        '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">{body}</rdf:Description>'
        '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def _from_pdf(content: bytes) -> Cargo:
    from pypdf import PdfReader

    reader = PdfReader(io.BytesIO(content))
    said = reader.metadata or {}
    found = reader.attachments.get(_ATTACHED)
    return Cargo(_facts(str(said.get("/Subject") or "")), found[0] if found else None, str(said.get("/Title") or ""))


def _facts(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _into_svg(picture: bytes, cargo: Cargo) -> bytes:
    parts = [f"<title>{escape(cargo.title)}</title>" if cargo.title else ""]
    parts.append(f'<metadata id="workbench"><facts xmlns="urn:workbench">{escape(_json(cargo.facts))}</facts>')
    if cargo.reading is not None:
        packed = base64.b64encode(zlib.compress(cargo.reading, 9)).decode()
        parts.append(f'<reading xmlns="urn:workbench" encoding="zlib+base64">{packed}</reading>')
    text = picture.decode("utf-8")
    start = re.search(r"<svg\b[^>]*>", text)
    if start is None:
        raise ValueError("this is not an SVG picture: it has no <svg> element.")
    return (text[: start.end()] + "\n" + "".join(parts) + "</metadata>" + text[start.end() :]).encode()


def _from_svg(content: bytes) -> Cargo:
    text = content.decode("utf-8", errors="replace")
    facts = re.search(r'<facts xmlns="urn:workbench">(.*?)</facts>', text, re.DOTALL)
    packed = re.search(r'<reading xmlns="urn:workbench"[^>]*>(.*?)</reading>', text, re.DOTALL)
    data = zlib.decompress(base64.b64decode(packed[1])) if packed else None
    return Cargo(_facts(unescape(facts[1])) if facts else {}, data)


def _into_png(picture: bytes, cargo: Cargo) -> bytes:
    after_header = len(_PNG_HEAD) + 25
    said = b"workbench\0\0\0\0\0" + _json(cargo.facts).encode()
    chunks = _chunk(b"iTXt", said)
    if cargo.title:
        chunks += _chunk(b"iTXt", b"Title\0\0\0\0\0" + cargo.title.encode())
    if cargo.reading is not None:
        chunks += _chunk(b"wbNc", zlib.compress(cargo.reading, 9))
    return picture[:after_header] + chunks + picture[after_header:]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = len(_PNG_HEAD)
    while place + 8 <= len(content):
        (size,) = struct.unpack(">I", content[place : place + 4])
        yield content[place + 4 : place + 8], content[place + 8 : place + 8 + size]
        place += size + 12


def _from_png(content: bytes) -> Cargo:
    facts, data, title = {}, None, ""
    for kind, body in _chunks(content):
        if kind == b"iTXt" and body.startswith(b"workbench\0"):
            facts = _facts(body[len(b"workbench") + 5 :].decode())
        elif kind == b"iTXt" and body.startswith(b"Title\0"):
            title = body[len(b"Title") + 5 :].decode()
        elif kind == b"wbNc":
            data = zlib.decompress(body)
    return Cargo(facts, data, title)


def _into_pgf(picture: bytes, cargo: Cargo) -> bytes:
    return f"%% workbench {_json(cargo.facts)}\n".encode() + picture


def _from_pgf(content: bytes) -> Cargo:
    first = content.split(b"\n", 1)[0].decode("utf-8", errors="replace")
    return Cargo(_facts(first.removeprefix("%% workbench ")))


def _into_vts(content: bytes, cargo: Cargo) -> bytes:
    return vts.embed(content, _json(cargo.facts), cargo.reading)


def _from_vts(content: bytes) -> Cargo:
    facts, reading = vts.extract(content)
    return Cargo(_facts(facts), reading)


_EMBED: dict[str, Callable[[bytes, Cargo], bytes]] = {
    ".pdf": _into_pdf,
    ".svg": _into_svg,
    ".png": _into_png,
    ".pgf": _into_pgf,
    SURFACE: _into_vts,
}
_EXTRACT: dict[str, Callable[[bytes], Cargo]] = {
    ".pdf": _from_pdf,
    ".svg": _from_svg,
    ".png": _from_png,
    ".pgf": _from_pgf,
    SURFACE: _from_vts,
}
