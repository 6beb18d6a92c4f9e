r"""PGF without LaTeX: matplotlib's own PGF backend asks a running LaTeX how wide each word is; here fonts are asked.

The words are still set by the paper's LaTeX when the figure is included, in the paper's font, so measured widths are
those of a font of the same letter widths: close, not equal. Include the file by ``\input`` after ``\usepackage{pgf}``.
"""

from __future__ import annotations

import io
import re
from typing import Any

_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi o pi rho varsigma sigma tau upsilon phi "
    "chi psi omega"
)
_SIGNS = {
    **{"\N{MINUS SIGN}": "-", "×": r"\times", "±": r"\pm", "≤": r"\leq", "≥": r"\geq", "≠": r"\neq", "≈": r"\approx"},
    **{"∞": r"\infty", "∂": r"\partial", "∇": r"\nabla", "√": r"\surd", "·": r"\cdot", "∈": r"\in", "‖": r"\Vert"},
    **{"→": r"\rightarrow", "←": r"\leftarrow", "∑": r"\sum", "∏": r"\prod", "⟨": r"\langle", "⟩": r"\rangle"},
    **{
        "ᵀ": r"^{\top}",
        "′": r"^{\prime}",
        "ε": r"\varepsilon",
        "½": r"{}^{1}\!/_{2}",
        "ℓ": r"\ell",
        "⊤": r"\top",
        "⊥": r"\perp",
        "∥": r"\parallel",
        "≪": r"\ll",
        "≫": r"\gg",
        "•": r"\bullet",
        "…": r"\ldots",
        "°": r"^{\circ}",
        "∝": r"\propto",
    },
}
_ROOM = 1.08
"""Times the measured width of words: small sizes of a paper's font may be wider than the font that was asked."""

_SUPER, _SUB = "⁰¹²³⁴⁵⁶⁷⁸⁹", "₀₁₂₃₄₅₆₇₈₉"
_SPECIAL = {c: f"\\{c}" for c in "&#$_%{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def tex_words(text: str, mathematics: bool = True) -> str:
    r"""Words for LaTeX of any engine: signs beyond its usual letters as mathematics, special characters escaped.

    With ``mathematics``, what stands between two dollar signs is LaTeX already and ``\$`` is a dollar sign, as in
    matplotlib; without, every character stands for itself.
    """
    if not mathematics:
        return "".join(_letter(c) for c in text)
    parts = re.split(r"((?<!\\)\$.*?(?<!\\)\$)", text.replace(r"\mathdefault", ""))
    return "".join(p if p.startswith("$") else tex_words(p.replace(r"\$", "$"), False) for p in parts)


def _letter(char: str) -> str:
    if char in _SPECIAL:
        return _SPECIAL[char]
    found = _letters().get(char)
    return rf"\ensuremath{{{found}}}" if found else char


def _letters() -> dict[str, str]:
    small = dict(zip("αβγδεζηθικλμνξοπρςστυφχψω", (f"\\{n}" for n in _GREEK.split()), strict=True))
    large = {c: f"\\{n.capitalize()}" for c, n in zip("ΓΔΘΛΞΠΣΦΨΩ", _LARGE, strict=True)}
    powers = {c: f"^{{{i}}}" for i, c in enumerate(_SUPER)} | {"⁻": "^{-}"}
    return small | large | powers | {c: f"_{{{i}}}" for i, c in enumerate(_SUB)} | _SIGNS


_LARGE = ("gamma", "delta", "theta", "lambda", "xi", "pi", "sigma", "phi", "psi", "omega")


def to_pgf(page: Any) -> bytes:
    """A matplotlib figure as PGF commands, with no LaTeX run and no image files beside it."""
    from matplotlib.backends.backend_mixed import MixedModeRenderer

    width, height = (float(s) for s in page.get_size_inches())
    page.dpi = 72
    out = io.StringIO()
    out.write(_HEAD)
    out.write(
        f"\\begingroup%\n\\makeatletter%\n\\begin{{pgfpicture}}%\n\\pgfpathrectangle{{\\pgfpointorigin}}"
        f"{{\\pgfqpoint{{{width:f}in}}{{{height:f}in}}}}%\n\\pgfusepath{{use as bounding box, clip}}%\n"
    )
    renderer = _renderer()(page, out)
    page.draw(MixedModeRenderer(page, width, height, 72, renderer))
    out.write("\\end{pgfpicture}%\n\\makeatother%\n\\endgroup%\n")
    return out.getvalue().encode()


_HEAD = r"""%% Figure by Workbench. Include it with \input; the preamble needs \usepackage{pgf}.
%%
"""


def _renderer() -> Any:
    """matplotlib's PGF renderer with two answers changed: how large words are, and how they are written."""
    from matplotlib.backends.backend_pgf import RendererPgf
    from matplotlib.textpath import text_to_path

    class Renderer(RendererPgf):
        """Draws PGF; measures words with the fonts that matplotlib has."""

        def get_text_width_height_descent(self, s: Any, prop: Any, ismath: Any) -> Any:
            width, height, descent = text_to_path.get_text_width_height_descent(s, prop, ismath)
            return _ROOM * width, height, descent

        def draw_text(
            self, gc: Any, x: Any, y: Any, s: Any, prop: Any, angle: Any, ismath: Any = False, mtext: Any = None
        ) -> None:
            super().draw_text(gc, x, y, tex_words(s, bool(ismath)), prop, angle, ismath, mtext)

    return Renderer
