"""PGF files are written without a LaTeX, and are what a LaTeX can read."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from matplotlib.backends import backend_pgf
from pictures import PICTURES, spectrum

from workbench.draw.export import render
from workbench.draw.pgf import tex_words
from workbench.draw.venues import venue


@pytest.mark.parametrize("picture", PICTURES)
def test_no_latex_is_started(picture, monkeypatch):
    monkeypatch.setattr(backend_pgf.LatexManager, "__init__", lambda self: pytest.fail("LaTeX was started"))
    text = render(PICTURES[picture](), ".pgf", venue("icml2024")).decode()
    size = re.search(r"pgfqpoint\{([\d.]+)in\}\{([\d.]+)in\}\}%\n\\pgfusepath\{use as bounding box", text)
    assert float(size[1]) == pytest.approx(3.25)
    assert text.count(r"\begin{") == text.count(r"\end{")
    assert text.count("{") == text.count("}")
    assert "includegraphics" not in text
    assert "mathdefault" not in text
    assert "nan" not in re.sub(r"[A-Za-z]{4,}", "", text)


def test_the_words_are_there_for_latex_to_set():
    text = render(spectrum(), ".pgf", venue("icml2024")).decode()
    assert r"eigenvalue \ensuremath{\lambda}" in text
    assert r"Hessian \textless{}spectrum\textgreater{}" in text
    assert r"\rmfamily" in text
    assert r"\fontsize{8.000000}" in text


@pytest.mark.parametrize(
    ("words", "tex"),
    [
        ("a & b # c, 5 % ^", r"a \& b \# c, 5 \% \textasciicircum{}"),
        ("λ ≥ 10⁻³", r"\ensuremath{\lambda} \ensuremath{\geq} 10\ensuremath{^{-}}\ensuremath{^{3}}"),
        (r"$10^{-3}$", r"$10^{-3}$"),
        (r"$\mathdefault{10^{-3}}$ & x", r"${10^{-3}}$ \& x"),
        (r"costs \$5 & \$6", r"costs \$5 \& \$6"),
        ("ΔΩ", r"\ensuremath{\Delta}\ensuremath{\Omega}"),
        ("∇‖θ‖", r"\ensuremath{\nabla}\ensuremath{\Vert}\ensuremath{\theta}\ensuremath{\Vert}"),
    ],
)
def test_words_are_written_for_latex(words, tex):
    assert tex_words(words) == tex


def test_without_mathematics_every_character_stands_for_itself():
    assert tex_words(r"a_1 $ {b} \c", mathematics=False) == r"a\_1 \$ \{b\} \textbackslash{}c"


@pytest.mark.skipif(
    shutil.which("pdflatex") is None, reason="LaTeX is not installed; PGF files need it only to be read"
)
@pytest.mark.parametrize("picture", PICTURES)
def test_latex_reads_them(tmp_path, picture):
    (tmp_path / "f.pgf").write_bytes(render(PICTURES[picture](), ".pgf", venue("icml2024")))
    lines = [r"\documentclass{article}", r"\usepackage{pgf}", r"\begin{document}", r"\input{f.pgf}", r"\end{document}"]
    (tmp_path / "main.tex").write_text("\n".join(lines))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout[-2000:]
