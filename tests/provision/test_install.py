"""The install itself, for a user, from a bundle and a clone: what holds after it, and after its failures."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
from pathlib import Path

import pytest

from provision.generations import is_sound
from tests.provision.conftest import Box

SENTENCE = "error: "


def refused(box: Box, *options: str, words: str) -> None:
    """The install ends with 1, a sentence, a hint and no traceback, and the box is as it was."""
    before = box.snapshot()
    result = box.install(*options)
    assert result.code == 1, result.out + result.err
    assert words.lower() in result.err.lower(), result.err
    assert result.err.count(SENTENCE) == 1 and "hint: " in result.err
    assert "Traceback" not in result.out + result.err
    assert box.snapshot() == before


def current(box: Box) -> Path | None:
    """What is current; half-made things fail here."""
    link = box.prefix / "current"
    if not link.is_symlink():
        return None
    directory = (box.prefix / link.readlink()).resolve()
    assert is_sound(directory), f"{directory} is current and not whole"
    return directory


def bare_path(tmp_path: Path) -> str:
    """A PATH without compiler, CMake or package manager; everything else that is there stays."""
    away = (
        "c++",
        "g++",
        "gcc",
        "cc",
        "clang",
        "cmake",
        "ninja",
        "make",
        "apt",
        "dnf",
        "pacman",
        "zypper",
        "apk",
    )
    place = tmp_path / "bin"
    place.mkdir()
    for directory in ("/usr/bin", "/bin", "/usr/sbin", "/sbin"):
        for path in Path(directory).iterdir():
            if not path.name.startswith(away) and not (place / path.name).is_symlink():
                (place / path.name).symlink_to(path)
    return str(place)


def test_installed_box_decodes(installed: Box) -> None:
    directory = current(installed)
    assert directory is not None
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["id"] == directory.name and manifest["listen"] == "127.0.0.1:8180"
    assert {"bin/halo", "lib/libhalo_cpu.so", "units/halo-server.service"} <= set(manifest["files"])
    assert (installed.prefix / "state/receipts" / f"{directory.name}.json").is_file()
    said = installed.halo("generate", "--max-tokens", "4", "Once upon a time")
    assert said.code == 0 and said.out


def test_second_run_changes_nothing(installed: Box, bundle: Path) -> None:
    before = installed.snapshot()
    again = installed.install("--bundle", str(bundle))
    assert again.code == 0 and "no change" in again.out and "decoded: " in again.out
    changed = {line.split(" ")[0] for line in before ^ installed.snapshot()}
    assert all(
        path.startswith(("halo/state/journal", "halo/state/logs", "halo/state/lock")) for path in changed
    )
    from_inside = installed.halo("install")
    assert from_inside.code == 0 and "no change" in from_inside.out, from_inside.err


def test_dry_run_writes_nothing(box: Box, bundle: Path) -> None:
    planned = box.install("--dry-run")
    assert planned.code == 0 and "nothing was changed" in planned.out
    offline = box.install("--dry-run", "--bundle", str(bundle))
    assert offline.code == 0 and "copy the bundle's native library" in offline.out
    data = box.install("--dry-run", "--json")
    assert json.loads(data.out)["changes"] > 0
    assert box.snapshot() == set()


def test_plan_of_an_installed_box_is_empty(installed: Box) -> None:
    planned = installed.halo("plan", "--json")
    assert planned.code == 0, planned.err
    assert [
        a for s in json.loads(planned.out)["steps"] if s["step"] != "activate" for a in s["actions"]
    ] == []


def test_reports(installed: Box) -> None:
    status = json.loads(installed.halo("status", "--json").out)
    assert status["sound"] and status["blessed"]
    listed = json.loads(installed.halo("generations", "--json").out)["generations"]
    assert [entry["role"] for entry in listed if entry["role"]] == ["current"]
    assert installed.halo("--version").out.startswith("halo ")
    assert installed.halo("install", "--bundle", "x").code == 1


def test_upgrade_that_decodes_wrongly_leaves_what_ran(installed: Box, bundle: Path, tmp_path: Path) -> None:
    """Green means tokens: a model whose golden ids the engine does not give never becomes current."""
    bad = Path(shutil.copytree(installed.clone / "engine/models/demo", tmp_path / "bad"))
    description = json.loads((bad / "model.json").read_text())
    description["golden"][0]["ids"][2] ^= 1
    description["golden"][0]["ids"].append(5)
    (bad / "model.json").write_text(json.dumps(description))
    before = current(installed)
    wrong = Box(installed.home, installed.clone, {"HALO_DEMO_MODEL_DIR": str(bad)})
    result = wrong.install("--bundle", str(bundle), "--listen", "127.0.0.1:8191")
    assert result.code == 1 and "The decode is wrong" in result.err
    assert "what ran before is current" in result.out
    assert current(installed) == before
    assert len(list((installed.prefix / "generations").iterdir())) == 1


def test_damaged_library_is_mended_beside_the_running_one(installed: Box, bundle: Path) -> None:
    damaged = current(installed)
    assert damaged is not None
    (damaged / "lib/libhalo_cpu.so").write_bytes(b"damage")
    assert installed.install("--bundle", str(bundle)).code == 0
    mended = current(installed)
    assert mended is not None and mended != damaged
    assert "no change" in installed.install("--bundle", str(bundle)).out


def test_port_taken(box: Box, bundle: Path) -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        port = squatter.getsockname()[1]
        refused(box, "--bundle", str(bundle), "--listen", f"127.0.0.1:{port}", words=str(port))


def test_wrong_hash_in_the_bundle(box: Box, bundle: Path, tmp_path: Path) -> None:
    data = bytearray(bundle.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "damaged.tar").write_bytes(bytes(data))
    refused(box, "--bundle", str(tmp_path / "damaged.tar"), words="hash")
    assert list((tmp_path / "home-tmp").iterdir()) == []


def test_no_compiler_unknown_distribution_no_network(box: Box, tmp_path: Path) -> None:
    box.env |= {
        "PATH": bare_path(tmp_path),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": os.devnull,
    }
    refused(box, words="no compiler")


@pytest.mark.parametrize("name", ["model.h1b", "model.halo", "SHA256SUMS"])
def test_damaged_store_is_mended_and_then_left_alone(installed: Box, bundle: Path, name: str) -> None:
    """A flipped byte on the disk: the same size, other tokens."""
    generation = current(installed)
    assert generation is not None
    path = (generation / "models/default").resolve() / name
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    mended = installed.install("--bundle", str(bundle))
    assert mended.code == 0 and "whole again" in mended.out, mended.out + mended.err
    path = (generation / "models/default").resolve() / name
    assert path.read_bytes() == whole and current(installed) == generation
    again = installed.install("--bundle", str(bundle))
    assert again.code == 0 and "no change" in again.out


def test_damaged_model(box: Box, tmp_path: Path, bundle: Path) -> None:
    bad = Path(shutil.copytree(box.clone / "engine/models/demo", tmp_path / "bad"))
    (bad / "model.h1b.xz").write_bytes((bad / "model.h1b.xz").read_bytes()[:-40])
    box.env["HALO_DEMO_MODEL_DIR"] = str(bad)
    refused(box, "--bundle", str(bundle), words="damaged")


def test_prefix_that_is_a_file(box: Box, bundle: Path) -> None:
    (box.home / "halo").write_text("mine")
    refused(box, "--bundle", str(bundle), words="directory")


def test_prefix_with_a_blank(box: Box, bundle: Path) -> None:
    refused(box, "--bundle", str(bundle), "--prefix", str(box.home / "with blank"), words="letter")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
@pytest.mark.parametrize(("options", "words"), [("ro", "read-only"), ("size=40m", "free")])
def test_read_only_and_full_file_system(box: Box, bundle: Path, options: str, words: str) -> None:
    import subprocess

    place = box.home / "mount"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        refused(box, "--bundle", str(bundle), "--prefix", str(place / "halo"), words=words)
        assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_install_cleans_up(box: Box, bundle: Path, signum: int, code: int) -> None:
    result = box.install("--bundle", str(bundle), kill_after=2.5, signum=signum)
    assert result.code == code, result.out + result.err
    assert box.snapshot() == set()


def kill_at_random_moments(box: Box, bundle: Path, kills: int, whole: float) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    for _ in range(kills):
        box.install("--bundle", str(bundle), kill_after=chance.uniform(0.05, 0.95) * whole)
        current(box)
    result = box.install("--bundle", str(bundle))
    assert result.code == 0, f"seed {seed}: {result.out}{result.err}"
    assert current(box) is not None
    half = [path for path in (box.prefix / "generations").iterdir() if not (path / "manifest.json").is_file()]
    assert half == [] and list(box.prefix.glob(".*")) == []


def test_killed_install_is_completed_by_the_next(box: Box, bundle: Path) -> None:
    kill_at_random_moments(box, bundle, 2, 6.0)


@pytest.mark.slow
def test_ten_kills(box: Box, bundle: Path, tmp_path: Path) -> None:
    measured = Box(tmp_path / "measure", box.clone)
    measured.home.mkdir()
    kill_at_random_moments(box, bundle, 10, measured.install("--bundle", str(bundle)).seconds)


@pytest.mark.slow
def test_from_a_clone_with_the_compiler_of_this_machine(box: Box) -> None:
    result = box.install()
    assert result.code == 0, result.out + result.err
    assert current(box) is not None


@pytest.mark.slow
def test_from_a_clone_with_a_compiler_that_comes_as_wheels(box: Box, tmp_path: Path) -> None:
    box.env["PATH"] = bare_path(tmp_path)
    result = box.install()
    assert result.code == 0, result.out + result.err
    directory = current(box)
    assert directory is not None
    assert json.loads((directory / "manifest.json").read_text())["compiler"]["from_wheels"]
