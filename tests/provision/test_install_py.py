"""install.py before anything of halo runs: old Pythons, pipes, and bundles that are damaged or hostile."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from tests.provision.conftest import CHECKOUT

SCRIPT = CHECKOUT / "install.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("halo_install_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_bundle(path: Path, members: dict[str, bytes], files: dict[str, str] | None = None) -> Path:
    hashes = files if files is not None else {n: hashlib.sha256(d).hexdigest() for n, d in members.items()}
    manifest = json.dumps({"schema": 1, "files": hashes}).encode()
    with tarfile.open(path, "w") as tar:
        for name, data in {"bundle.json": manifest, **members}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_old_pythons_can_parse_it() -> None:
    """A SyntaxError is no sentence: the file keeps to Python 3.6."""
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))
    assert "from __future__" not in SCRIPT.read_text()


def test_old_python_is_told_what_to_do(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 6, 8))
    monkeypatch.setattr(script, "other_python", lambda: "")
    with pytest.raises(script.Refusal) as caught:
        script.require_python([])
    assert "3.11 to 3.14" in caught.value.message and caught.value.hint


def test_old_python_starts_a_newer_one(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    monkeypatch.setattr(script, "other_python", lambda: "/usr/bin/python3.13")
    monkeypatch.setattr(script.os, "execv", lambda _path, argv: started.append(argv))
    monkeypatch.delenv("HALO_REEXEC", raising=False)
    script.require_python(["--yes"])
    monkeypatch.delenv("HALO_REEXEC")
    assert started == [["/usr/bin/python3.13", str(SCRIPT), "--yes"]]


def piped(cwd: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-", *options],
        input=SCRIPT.read_text(),
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_piped_in_a_clone_plans(clone: Path, tmp_path: Path) -> None:
    options = (
        "--dry-run",
        "--scope",
        "user",
        "--prefix",
        str(tmp_path / "halo"),
        "--profile",
        "cpu",
        "--no-units",
    )
    done = piped(clone, *options)
    assert done.returncode == 0, done.stderr
    assert "nothing was changed" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_piped_elsewhere_is_a_sentence(tmp_path: Path) -> None:
    done = piped(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: There is no halo source here.\nhint: ")


def test_whole_bundle_is_unpacked(script: ModuleType, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", {"provision/cli.py": b"x", "wheels/a.whl": b"y"})
    script.unpack(str(bundle), str(tmp_path / "out"))
    assert (tmp_path / "out/provision/cli.py").read_bytes() == b"x"


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "./a", "a//b"])
def test_member_that_leaves_the_directory(script: ModuleType, tmp_path: Path, name: str) -> None:
    bundle = make_bundle(tmp_path / "b", {name: b"x"})
    with pytest.raises(script.Refusal, match="not allowed"):
        script.unpack(str(bundle), str(tmp_path / "out"))
    assert not (tmp_path / "evil").exists()


def test_link_member(script: ModuleType, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", {})
    with tarfile.open(bundle, "a") as tar:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(script.Refusal, match="not allowed"):
        script.unpack(str(bundle), str(tmp_path / "out"))


@pytest.mark.parametrize("files", [{"a": "0" * 64}, {}, {"a": hashlib.sha256(b"x").hexdigest(), "b": "1"}])
def test_wrong_unlisted_or_missing_member(script: ModuleType, tmp_path: Path, files: dict[str, str]) -> None:
    bundle = make_bundle(tmp_path / "b", {"a": b"x"}, files)
    with pytest.raises(script.Refusal):
        script.unpack(str(bundle), str(tmp_path / "out"))


def test_a_manifest_that_claims_gigabytes_is_refused_unread(script: ModuleType, tmp_path: Path) -> None:
    """Found by fuzzing: its size is believed by whoever reads it in one piece."""
    header = tarfile.TarInfo("bundle.json")
    header.size = 7 << 30
    (tmp_path / "bundle.tar").write_bytes(header.tobuf() + b"{}" + bytes(510))
    with pytest.raises(script.Refusal, match="is not a halo bundle"):
        script.unpack(str(tmp_path / "bundle.tar"), str(tmp_path / "out"))


def test_a_torn_sparse_header_is_a_sentence(script: ModuleType, tmp_path: Path) -> None:
    """Found by fuzzing: tarfile ends with an IndexError there."""
    header = tarfile.TarInfo("bundle.json")
    header.type = tarfile.GNUTYPE_SPARSE
    raw = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    raw[482] = 1  # more of the table follows, in a block that is cut short
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    (tmp_path / "bundle.tar").write_bytes(bytes(raw[:512]) + b"0")
    with pytest.raises(script.Refusal, match="is not a halo bundle"):
        script.unpack(str(tmp_path / "bundle.tar"), str(tmp_path / "out"))


def test_damage_anywhere_is_a_sentence(tmp_path: Path) -> None:
    """A bundle that came over a bad line never runs: whatever byte is wrong, however short it is."""
    bundle = make_bundle(tmp_path / "b", {f"provision/{n}.py": bytes([n]) * 9000 for n in range(4)})
    data = bundle.read_bytes()
    chance = random.Random(5)
    program = (
        "import importlib.util, sys, tempfile\n"
        f"spec = importlib.util.spec_from_file_location('s', {str(SCRIPT)!r})\n"
        "s = importlib.util.module_from_spec(spec); spec.loader.exec_module(s)\n"
        "s.hand_over = lambda *_: 42\n"
        "for path in sys.argv[1:]: print(s.main(['--bundle', path]))\n"
    )
    paths = []
    for number in range(60):
        wrong = bytearray(data)
        if number % 3 == 0:
            wrong = wrong[: chance.randrange(38000)]
        else:
            wrong[chance.randrange(600, 38000)] ^= 1 << chance.randrange(8)
        path = tmp_path / f"wrong{number}"
        path.write_bytes(bytes(wrong))
        paths.append(str(path))
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
    codes = done.stdout.split()
    # A flipped bit in a tar's padding or in a time that nobody reads is no damage.
    assert len(codes) == 60 and set(codes) <= {"1", "42"} and codes.count("1") > 35
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == codes.count("1")


def test_absent_bundle(tmp_path: Path) -> None:
    argv = [sys.executable, str(SCRIPT), "--bundle", str(tmp_path / "none")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "There is no bundle" in done.stderr


def test_sigterm_leaves_no_unpacked_bundle(tmp_path: Path) -> None:
    """An installer that is stopped early must not fill /tmp with a copy of the bundle."""
    waits = b"import time\n\n\ndef main(argv):\n    print('here', flush=True)\n    time.sleep(60)\n"
    members = {"provision/__init__.py": b"", "provision/cli.py": waits, "engine/errors.py": b""}
    bundle = make_bundle(tmp_path / "bundle", members)
    place = tmp_path / "tmp"
    place.mkdir()
    argv = [sys.executable, str(SCRIPT), "--bundle", str(bundle)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(place)}) as process:
        assert process.stdout is not None and process.stdout.readline() == b"here\n"
        assert len(list(place.iterdir())) == 1
        process.terminate()
        assert process.wait(timeout=30) == 143
    assert list(place.iterdir()) == []
