"""The command line: quick, quiet about tracebacks, and every error a sentence with a hint."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

from engine.errors import HaloError
from provision import cli
from provision.render import CROSS, TICK, Screen
from tests.provision.conftest import CHECKOUT

HEAVY = ("numpy", "pyinfra", "gevent", "rich", "starlette", "msgspec", "tiktoken", "asyncio")


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "words", [["--help"], ["install", "--help"], ["doctor", "--help"], ["serve", "--help"]]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    program = (
        "import sys\nfrom provision.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        f"print('HEAVY', [n for n in {HEAVY!r} if n in sys.modules])"
    )
    assert "HEAVY []" in python(program).stdout


def test_install_needs_the_standard_library_alone() -> None:
    """Before the venv is made there is nothing else to import."""
    program = "import provision.install, provision.bundle, provision.report, checks.doctor; print('fine')"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); {program}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "fine\n", done.stderr


def test_error_is_a_sentence_and_debug_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_argv: object) -> int:
        raise HaloError("It is broken.", hint="mend it", exit_code=2)

    monkeypatch.setattr(cli, "dispatch", fail)
    assert cli.main(["status"]) == 2
    assert capsys.readouterr().err == "error: It is broken.\nhint: mend it\n"
    with pytest.raises(HaloError):
        cli.main(["status", "--debug"])


@pytest.mark.parametrize("raised", [RuntimeError("x"), OSError(5, "io"), ValueError("y"), ImportError("z")])
def test_no_traceback_for_anything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: Exception
) -> None:
    def fail(_argv: object) -> int:
        raise raised

    monkeypatch.setattr(cli, "dispatch", fail)
    assert cli.main([]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "hint: " in said and "Traceback" not in said


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_argv: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "dispatch", fail)
    assert cli.main([]) == 130


def test_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} -m provision.cli --help | true"],
        cwd=CHECKOUT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""


def test_a_wrong_flag_is_a_sentence_and_not_degraded(capsys: pytest.CaptureFixture[str]) -> None:
    """A script that reads 2 as "degraded" must not take a typing error for a sick box."""
    for words in (["status", "--frob"], ["frob"], ["plan", "--scope", "moon"]):
        assert cli.main(words) == 3
        told = capsys.readouterr().err
        assert told.startswith("error: ") and "\nhint: halo" in told


def test_version_and_status_of_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    prefix = str(tmp_path_factory.mktemp("none") / "halo")
    done = subprocess.run(
        [sys.executable, "-m", "provision.cli", "status", "--prefix", prefix, "--scope", "user", "--json"],
        cwd=CHECKOUT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert json.loads(done.stdout)["current"] is None


def test_screen_is_plain_without_a_terminal_and_ascii_where_it_must() -> None:
    plain = io.StringIO()
    screen = Screen(plain, terminal=False)
    screen.begin(1, 7, "preflight")
    screen.tick()
    screen.end(TICK, "done")
    assert plain.getvalue().startswith("(1/7) preflight ...\n(1/7) preflight \u2713 0.0 s  done\n")
    raw = io.BytesIO()
    narrow = Screen(io.TextIOWrapper(raw, encoding="ascii"), terminal=True)
    narrow.begin(2, 7, "engine")
    narrow.note("\u26a0", "na\u00efve", "h")
    narrow.end(CROSS)
    assert b"warning: na?ve" in raw.getvalue() and b"FAILED" in raw.getvalue()
