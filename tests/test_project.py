"""The project's own promises: one set of requirements, short documented code, clean notebooks, real commands."""

from __future__ import annotations

import ast
import json
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "workbench"
NOTEBOOKS = sorted(p for p in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
CONDA_NAMES = {"torch": "pytorch"}
NAMED_BY_THE_USER = {"jupyterlab", "ipywidgets", "torch", "plotly", "loss-landscapes", "pyhessian", "panel"}


# ---------------------------------------------------------------- requirements


@cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def by_name(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r for r in found}


def core() -> dict[str, Requirement]:
    return by_name(project()["project"]["dependencies"])


def extras() -> dict[str, dict[str, Requirement]]:
    held = project()["project"]["optional-dependencies"]
    return {
        name: by_name([line for line in lines if not line.startswith("workbench[")]) for name, lines in held.items()
    }


def pins() -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return by_name([line for line in lines if line])


def conda() -> tuple[dict[str, Requirement], list[str]]:
    """Packages of environment.yml by name (conda's and pip's), and the other arguments that pip gets."""
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    through_pip = next(entry["pip"] for entry in listed if isinstance(entry, dict))
    options = [line for line in through_pip if line.startswith("-")]
    lines = [entry for entry in listed if isinstance(entry, str)] + [p for p in through_pip if p not in options]
    return by_name(lines), options


def test_the_seven_packages_the_user_named_are_core() -> None:
    assert core().keys() >= NAMED_BY_THE_USER


def test_conda_users_get_the_same_requirements() -> None:
    listed, options = conda()
    wanted = {CONDA_NAMES.get(name, name): r.specifier for name, r in core().items()}
    got = {name: r.specifier for name, r in listed.items() if name not in {"python", "pip"}}
    assert got == wanted
    assert listed["python"].specifier == Requirement(f"python{project()['project']['requires-python']}").specifier
    assert options == ["-e .[dev]"], "the package and its tools are installed by pip, from this folder"


def test_each_pin_is_exact_and_satisfies_what_is_asked_for() -> None:
    asked = [core(), *extras().values()]
    for name, pin in pins().items():
        (spec,) = pin.specifier
        assert spec.operator == "==", f"constraints.txt pins {name} with {spec}; write =="
        for group in asked:
            assert name not in group or group[name].specifier.contains(Version(spec.version)), (
                f"{pin} misses {group[name]}"
            )
    assert next(iter(pins())) == "torch", "torch comes first: it decides whether gigabytes are downloaded"


def test_whatever_is_installed_by_default_is_pinned() -> None:
    wanted = core().keys() | extras()["test"].keys() | extras()["dev"].keys()
    wanted |= extras()["peers"].keys() | extras()["transformers"].keys()
    assert wanted - pins().keys() == set()


def imported(folder: Path) -> Iterator[tuple[str, Path]]:
    """The top names of third-party packages that files of ``folder`` import, lazily or not."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            yield from ((name.split(".")[0], path) for name in names)


def test_what_the_package_imports_is_declared() -> None:
    declared = core().keys() | {name for group in extras().values() for name in group}
    homes = {top: {canonicalize_name(d) for d in found} for top, found in packages_distributions().items()}
    foreign = [(n, p) for n, p in imported(PACKAGE) if n not in sys.stdlib_module_names and n != "workbench"]
    assert len({name for name, _ in foreign}) > 3, "the walk found next to nothing: is it still right?"
    undeclared = {
        f"{n} ({p.relative_to(ROOT)})" for n, p in foreign if not homes.get(n, {canonicalize_name(n)}) & declared
    }
    assert undeclared == set()


# ------------------------------------------------------------------------ code


@cache
def trees() -> dict[Path, ast.Module]:
    found = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    assert len(found) > 10, "the walk over the package found next to nothing"
    return found


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function]]:
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def code_lines(function: Function) -> int:
    """Lines of code in the body: without the docstring, comments, blank lines and the functions inside."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    inner = {id(n) for top in body for f in ast.walk(top) if isinstance(f, Function) for n in ast.walk(f)}
    held = [n for top in body for n in ast.walk(top) if id(n) not in inner]
    ends = {line for n in held if hasattr(n, "lineno") for line in (n.lineno, n.end_lineno)}
    return len(ends)


def test_functions_are_short() -> None:
    sizes = {name: code_lines(f) for name, f in functions()}
    assert len(sizes) > 50
    deciles = statistics.quantiles(sizes.values(), n=10)
    longest = sorted(sizes, key=sizes.__getitem__)[-5:]
    assert statistics.median(sizes.values()) < 8
    assert deciles[-1] < 30
    assert {name: sizes[name] for name in longest if sizes[name] > 45} == {}


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in trees()}
    assert {name: n for name, n in lengths.items() if n >= 400} == {}


def public_functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Functions of the module, and methods of its classes, whose names do not begin with an underscore."""
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            methods = [m for m in node.body if isinstance(m, Function)]
            yield from (
                (f"{node.name}.{m.name}", m) for m in methods if not m.name.startswith("_") or m.name == "__init__"
            )


def test_only_the_recorder_takes_arguments_of_any_name() -> None:
    found = [(name, f) for tree in trees().values() for name, f in public_functions(tree)]
    assert len(found) > 30
    # A callback's methods have the arguments that the other library's trainer gives them.
    home = {name: classes().get(name.partition(".")[0]) for name, _ in found}
    found = [(name, f) for name, f in found if not home[name] or not fills_in_another_library(home[name])]
    open_ended = {name for name, f in found if f.args.kwarg}
    assert open_ended <= {"Recorder.start", "Recorder.step", "TakesSteps.step"}, (
        "the last is the one before, a Protocol"
    )


def test_every_public_name_is_documented() -> None:
    for path, tree in trees().items():
        assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} does not say what it is for"
        public = [n for n in tree.body if isinstance(n, Function | ast.ClassDef) and not n.name.startswith("_")]
        bare = [n.name for n in public if not ast.get_docstring(n)]
        assert bare == [], f"{path.relative_to(ROOT)}: no docstring"


@cache
def classes() -> dict[str, ast.ClassDef]:
    return {n.name: n for tree in trees().values() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}


def line_of(name: str) -> Iterator[ast.ClassDef]:
    """The class of that name and those it derives from, as far as they are Workbench's own."""
    if name in classes():
        yield classes()[name]
        for base in classes()[name].bases:
            yield from line_of(named(base))


def named(base: ast.expr) -> str:
    plain = base.value if isinstance(base, ast.Subscript) else base
    return plain.id if isinstance(plain, ast.Name) else getattr(plain, "attr", "")


def fills_in_another_library(cls: ast.ClassDef) -> bool:
    """Whether a base is a class of another library (not one of typing's forms), whose methods are documented there."""
    forms = {"ABC", "Protocol", "Generic", "NamedTuple", "TypedDict", "Enum", "Exception"}
    return any(named(b) not in forms | classes().keys() for b in cls.bases)


def documents(cls: ast.ClassDef, method: str) -> bool:
    return any(isinstance(m, Function) and m.name == method and ast.get_docstring(m) for m in cls.body)


def test_every_public_method_is_documented_or_overrides_one_that_is() -> None:
    public = [(c.name, m.name) for c in classes().values() for m in c.body if isinstance(m, Function)]
    public = [(c, m) for c, m in public if not c.startswith("_") and not m.startswith("_")]
    assert len(public) > 20
    ours = [(c, m) for c, m in public if not fills_in_another_library(classes()[c])]
    bare = {f"{c}.{m}" for c, m in ours if not any(documents(home, m) for home in line_of(c))}
    assert bare == set()


# ------------------------------------------------------- notebooks and commands


def test_there_is_a_tour() -> None:
    assert ROOT / "notebooks" / "00_tour.ipynb" in NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_stored_without_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"]] == [], (
        f"run: nbstripout --keep-id {path}"
    )
    assert "widgets" not in notebook["metadata"]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_commands_in_the_pages_exist(page: str) -> None:
    named = set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(code_blocks((ROOT / page).read_text()))))
    assert "test" in named
    assert named <= targets()


def code_blocks(text: str) -> list[str]:
    """What a page sets as code, in fenced blocks and between backticks."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return fenced + re.findall(r"`([^`\n]+)`", text)


def test_the_readme_opens_with_the_two_commands() -> None:
    first = re.findall(r"\bmake (lab|test)\b", (ROOT / "README.md").read_text())
    assert set(first[:2]) == {"lab", "test"}


def test_continuous_integration_runs_the_readmes_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, ".ci/run is not executable"
    assert re.search(r"^make test\b", script.read_text(), re.MULTILINE)


@pytest.mark.parametrize("target", ["test", "lab"])
def test_make_installs_before_it_runs_and_with_the_constraints(target: str) -> None:
    plan = subprocess.run(
        ["make", "-n", "VENV=absent", target], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    lines = plan.splitlines()
    installs = [i for i, line in enumerate(lines) if "pip install" in line]
    assert len(installs) == 1
    assert "-c constraints.txt" in lines[installs[0]]
    runs = [i for i, line in enumerate(lines) if re.search(r"-m pytest|jupyter lab", line)]
    assert runs
    assert min(runs) > installs[0]


@pytest.mark.parametrize(
    ("version", "fits"), [("3.10.4", False), ("3.11.0", True), ("3.13.9", True), ("3.14.0", False)]
)
def test_an_unsuitable_python_is_refused_with_words(version: str, fits: bool, tmp_path: Path) -> None:
    """A stand-in that answers as a Python of that version would: real ones are not on every machine."""
    python = tmp_path / "python"
    python.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} {tmp_path / "answer.py"} "$2"\n')
    python.chmod(0o755)
    (tmp_path / "answer.py").write_text(
        f"import platform, sys\nsys.version_info = ({version.replace('.', ', ')})\n"
        f"platform.python_version = lambda: {version!r}\nexec(sys.argv[1])\n"
    )
    asked = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}
    script = ROOT / "tools" / "python.sh"
    done = subprocess.run([script], env=asked, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is fits
    assert done.stdout.strip() == (str(python) if fits else "")
    assert fits or (version in done.stderr and "3.11, 3.12 or 3.13" in done.stderr)


# ------------------------------------------------------------- Debian packages


def machine(folder: Path, user: int, *programs: str) -> dict[str, str]:
    """An environment whose path holds only what is listed, an apt-get that notes its arguments, and a user's number."""
    folder.mkdir()
    for name in ("bash", "env", "grep", "ls", "printf"):
        (folder / name).symlink_to(str(shutil.which(name)))
    scripts = {"id": f"echo {user}", "sleep": ":", "apt-get": 'printf "%s\\n" "$*" >> "$NOTES"'}
    for name, does in (scripts | dict.fromkeys(programs, ":")).items():
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{does}\n")
        (folder / name).chmod(0o755)
    return {"PATH": str(folder), "HOME": str(folder), "NOTES": str(folder / "notes"), "PLAYWRIGHT": "/absent"}


def see_to_debian(environment: dict[str, str]) -> tuple[subprocess.CompletedProcess[str], str]:
    command = [shutil.which("bash"), str(ROOT / "tools" / "debian.sh"), "test"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    notes = Path(environment["NOTES"])
    return done, notes.read_text() if notes.exists() else ""


def test_missing_debian_packages_are_installed_by_root(tmp_path: Path) -> None:
    done, notes = see_to_debian(machine(tmp_path / "bin", 0, "chromium", "pdftotext"))
    assert done.returncode == 0
    assert "poppler-utils" in notes
    assert "chromium" not in notes, "what is there is not installed again"


def test_missing_debian_packages_are_named_where_they_cannot_be_installed(tmp_path: Path) -> None:
    done, notes = see_to_debian(machine(tmp_path / "bin", 1000))
    assert done.returncode == 0
    assert notes == ""
    assert re.search(r"apt-get install .*poppler-utils", done.stderr)
    assert "skipped" in done.stderr


def test_nothing_is_said_or_installed_where_nothing_is_missing(tmp_path: Path) -> None:
    programs = ("chromium", "pdftotext", "pdffonts", "fc-list")
    done, notes = see_to_debian(machine(tmp_path / "bin", 0, *programs))
    assert (done.returncode, notes) == (0, "") or "fonts-liberation" in notes
