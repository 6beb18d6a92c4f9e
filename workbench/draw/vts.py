"""VTK's XML file of a structured grid (``.vts``), which ParaView opens: written and taken apart without VTK.

Arrays are uncompressed base64, each after its size in bytes as one little-endian 64-bit number; texts are bytes that
end with a zero. See "XML file formats" in the documentation of VTK.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

HIDDEN = 2
"""What ``vtkGhostType`` is at points that are not drawn."""
_FACTS, _READING = "workbench", "reading.nc"
_TYPES = {"f": ("Float64", "<f8"), "b": ("UInt8", "u1"), "u": ("UInt8", "u1")}


def grid(places: NDArray[np.float64], values: Mapping[str, NDArray[Any]], texts: Mapping[str, str]) -> bytes:
    """A surface in space as a file.

    Args:
        places: (n, m, 3), where each point lies.
        values: by name, each (n, m): floats (NaN and Inf stay), bools or bytes. The first is coloured by.
        texts: kept beside the grid, as field data.
    """
    n, m, _ = places.shape
    extent = f"0 {n - 1} 0 {m - 1} 0 0"
    # The first index runs fastest in the file.
    points = _array("Points", places.transpose(1, 0, 2).reshape(-1, 3), 'NumberOfComponents="3"')
    held = "\n".join(_array(name, np.asarray(v).T.ravel()) for name, v in values.items())
    said = "\n".join(_text(name, words) for name, words in texts.items())
    return (
        '<?xml version="1.0"?>\n'
        '<VTKFile type="StructuredGrid" version="1.0" byte_order="LittleEndian" header_type="UInt64">\n'
        f'<StructuredGrid WholeExtent="{extent}">\n<FieldData>\n{said}\n</FieldData>\n<Piece Extent="{extent}">\n'
        f"<PointData Scalars={quoteattr(next(iter(values)))}>\n{held}\n</PointData>\n<CellData/>\n"
        f"<Points>\n{points}\n</Points>\n</Piece>\n</StructuredGrid>\n</VTKFile>\n"
    ).encode()


def embed(content: bytes, facts: str, reading: bytes | None) -> bytes:
    """The file with facts, and where given the bytes of a reading, among its field data."""
    more = _text(_FACTS, facts)
    if reading is not None:
        more += "\n" + _array(_READING, np.frombuffer(reading, dtype=np.uint8), f'NumberOfTuples="{len(reading)}"')
    return content.replace(b"</FieldData>", more.encode() + b"\n</FieldData>", 1)


def extract(content: bytes) -> tuple[str, bytes | None]:
    """The facts and the reading in a file; empty and None where there are none."""
    facts, reading = _found(content, _FACTS), _found(content, _READING)
    return (facts or b"").rstrip(b"\0").decode(errors="replace"), reading


def _found(content: bytes, name: str) -> bytes | None:
    pattern = rf'<DataArray type="\w+" Name="{re.escape(name)}"[^>]*>([^<]*)</DataArray>'
    held = re.search(pattern.encode(), content)
    return base64.b64decode(held[1])[8:] if held else None


def _array(name: str, values: NDArray[Any], more: str = "") -> str:
    kind, stored = _TYPES[values.dtype.kind]
    return _data(kind, name, np.ascontiguousarray(values, dtype=stored).tobytes(), more)


def _text(name: str, words: str) -> str:
    return _data("String", name, words.encode() + b"\0", 'NumberOfTuples="1"')


def _data(kind: str, name: str, content: bytes, more: str) -> str:
    packed = base64.b64encode(struct.pack("<Q", len(content)) + content).decode()
    head = " ".join(part for part in (f'type="{kind}" Name={quoteattr(name)}', more, 'format="binary"') if part)
    return f"<DataArray {head}>{packed}</DataArray>"
