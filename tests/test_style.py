"""Rules that the layout promises, checked on the tree itself: imports, sizes, names, documented commands.

Only what ruff and mypy cannot say.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("provision", "checks", "engine", "units")
MAY_IMPORT = {
    "provision": ("provision", "checks", "engine", "units"),
    "checks": ("checks", "engine"),
    "units": ("units", "engine.errors"),
    "engine": ("engine",),
}
# Run in the finished environment, in a process of their own: these alone may need it to be imported.
NEEDS_VENV = {"provision.worker"}
BEFORE_VENV = ("provision", "checks", "units")
BEFORE_VENV_OF_ENGINE = ("engine.errors", "engine.model", "engine.formats.store", "engine.locate")
MAX_LINES = 450

# Written in pieces, so that this file does not contain what it looks for.
REGISTRIES = [
    f"{name}.{top}"
    for name, top in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("deb.debian", "org"),
        ("security.debian", "org"),
        ("snapshot.debian", "org"),
        ("npmjs", "org"),
        ("crates", "io"),
        ("anaconda", "org"),
        ("archive.ubuntu", "com"),
    )
]
MACHINE_PATHS = [
    f"/{top}/{name}" for top, name in (("work", "main"), ("work", "tmp"), ("work", "shared"), ("opt", "pypi"))
]


@cache
def tracked() -> list[Path]:
    """Every text file that git follows here."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    paths = [ROOT / name for name in listed.decode().split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:8192]]


def python_files(*rooms: str) -> list[Path]:
    """The tracked Python files of these rooms, without the training program, which is not imported."""
    files = [path for path in tracked() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in rooms]
    return [path for path in files if "train" not in path.relative_to(ROOT).parts]


def module_name(path: Path) -> str:
    """The dotted name under which `path` is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Every module that `path` names in an import, at any depth of the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("words", [REGISTRIES, MACHINE_PATHS], ids=["registries", "machine-paths"])
def test_no_file_names_a_registry_or_this_machine(words: list[str]) -> None:
    """A box behind a mirror, or without a network, would try an address that somebody else once used."""
    pattern = re.compile("|".join(re.escape(word) for word in words))
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_imports_point_one_way() -> None:
    """The engine must be usable without the installer; an arrow back would tie the rooms into one knot."""
    wrong = []
    for path in python_files(*ROOMS):
        room = path.relative_to(ROOT).parts[0]
        allowed = tuple(f"{name}." for name in MAY_IMPORT[room])
        for name in sorted(imported(path)):
            if name.split(".")[0] in ROOMS and not f"{name}.".startswith(allowed):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_what_runs_before_the_venv_needs_only_the_standard_library() -> None:
    """On a bare box these run on Debian's python3 alone; one third-party import there ends the install."""
    modules = sorted({module_name(path) for path in python_files(*BEFORE_VENV)} - NEEDS_VENV)
    code = (
        "import importlib, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"for name in {[*modules, *BEFORE_VENV_OF_ENGINE]!r}: importlib.import_module(name)\n"
        "outside = [n for n in ('numpy', 'msgspec', 'rich', 'pyinfra', 'tiktoken') if n in sys.modules]\n"
        "sys.exit(f'imported {outside}' if outside else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_modules_stay_readable() -> None:
    """A file that has grown past this is two ideas."""
    long = {
        str(path.relative_to(ROOT)): count
        for path in tracked()
        if path.suffix in (".py", ".sh")
        and path.relative_to(ROOT).parts[0] != "tests"
        and (count := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long


def test_install_py_reads_on_an_old_python() -> None:
    """An old Python must get install.py's sentence about its version, not a SyntaxError."""
    tree = ast.parse((ROOT / "install.py").read_text(), feature_version=(3, 6))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    future = {alias.name for node in imports if node.module == "__future__" for alias in node.names}
    assert "annotations" not in future


def documented_commands() -> dict[str, str]:
    """Each `halo WORD` that the README and docs/ tell a person to run, and the file that does."""
    pages = [path for path in tracked() if path.suffix == ".md"]
    pattern = re.compile(r"(?:`|^\$ |^)halo ([a-z][a-z-]+)", re.MULTILINE)
    return {name: page.name for page in pages for name in pattern.findall(_code(page.read_text()))}


def _code(text: str) -> str:
    """The code of a Markdown page: fenced blocks, and inline code with its opening tick, a line each."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`[^`\n]+", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return "\n".join([*fenced, *inline])


def test_every_documented_command_exists() -> None:
    """A newcomer types what the README says; an unknown command there costs the trust of the whole page."""
    done = subprocess.run(
        [sys.executable, "-m", "provision.cli", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    offered = set(re.findall(r"[a-z][a-z-]+", done.stdout))
    missing = {name: page for name, page in documented_commands().items() if name not in offered}
    assert not missing, f"named in the documentation, absent from `halo --help`: {missing}"


def test_readme_names_the_two_commands() -> None:
    """The install and the test command are what a newcomer looks for; CI runs the second one too."""
    readme = (ROOT / "README.md").read_text()
    assert "python3 install.py" in readme
    assert "python3 tests/run.py" in readme
    assert "python3 tests/run.py" in (ROOT / ".ci" / "run").read_text()
