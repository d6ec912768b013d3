"""halo in a test host: carry the source or the bundle in, install, ask. The harness below knows no halo."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
import tarfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hosts.hosts import Host
from tests.hosts.shell import Result, run

CHECKOUT = Path(__file__).resolve().parents[2]
SOURCE = "halo"  # relative to the home directory of whoever installs
MODEL = "/var/tmp/demo-model"
PORT = 8180
STEPS = ("preflight", "packages", "engine", "model", "units", "activate", "verify")
# Where an install may write, and what the running system itself changes there.
WATCHED = "/etc /opt /usr /var/lib /root /home /srv"
UNWATCHED = (
    "__pycache__|/var/lib/(systemd|private|dbus|apt|dpkg)|/root/halo|/home/[a-z]+/halo|bundle|[.]cache"
)


@dataclass(frozen=True)
class Owner:
    """Who installs, and where that scope keeps things."""

    user: str
    scope: str
    prefix: str

    def halo(self, *words: str) -> str:
        """A shell line that runs the installed `halo`."""
        return shlex.join([f"{self.prefix}/current/bin/halo", *words])


SYSTEM = Owner("root", "system", "/opt/halo")
USER = Owner("ada", "user", "/home/ada/.local/share/halo")


def source_archive() -> bytes:
    """The checkout as a clean clone has it: tracked files, and new ones that git would not ignore."""
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=CHECKOUT).out
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in filter(None, listed.split("\0")):
            if (CHECKOUT / name).exists():
                archive.add(CHECKOUT / name, f"{SOURCE}/{name}", recursive=False)
    return buffer.getvalue()


def demo_model() -> Path | None:
    """The model that stands in for the bundled one, where the environment names one."""
    chosen = os.environ.get("HALO_DEMO_MODEL_DIR", "")
    return Path(chosen) if chosen else None


def findings(result: Result) -> list[str]:
    """The ids of the findings for which an install refused."""
    return re.findall(r"\u2717 .*\[([a-z0-9.-]+)\]$", result.out, re.MULTILINE)


def has_words(text: str) -> bool:
    """Whether the model has said something: a few words of the bundled model, anything of a stand-in."""
    return len(text.split()) >= (3 if demo_model() is None else 1)


def carry_source(host: Host, user: str = "root") -> None:
    """Put a clean clone at ~/halo of `user`, and the stand-in model where there is one."""
    host.run("tar --no-same-owner -xf -", user=user, stdin=source_archive())
    _carry_model(host)


def _carry_model(host: Host) -> None:
    if (model := demo_model()) is not None:
        host.run(f"mkdir -p {MODEL}")
        for file in model.iterdir():
            host.put(file, f"{MODEL}/{file.name}")


def make_bundle(target: Path) -> Path:
    """Make the offline bundle on this machine, with its compiler and package index."""
    run([sys.executable, "-m", "provision.cli", "bundle", "--python", "3.11", "-o", target], cwd=CHECKOUT)
    return target


def carry_bundle(host: Host, bundle: Path, user: str = "root") -> None:
    """Put install.py and the bundle at ~/halo of `user`: all that a host without a network is given."""
    host.run(f"mkdir -p {SOURCE}", user=user)
    host.put(CHECKOUT / "install.py", f"{SOURCE}/install.py", user=user)
    host.put(bundle, f"{SOURCE}/bundle", user=user)
    _carry_model(host)


def install_line(*options: str) -> str:
    """The README's first command with options, as a shell line in the user's home directory."""
    model = f"HALO_DEMO_MODEL_DIR={MODEL} " if demo_model() is not None else ""
    return f"cd {SOURCE} && {model}python3 install.py {shlex.join(options)} < /dev/null"


def install(host: Host, *options: str, user: str = "root", check: bool = True) -> Result:
    """Run it; its output goes to pytest's captured stdout, so that a failure shows it."""
    result = host.run(install_line(*options), user=user, check=check)
    print(result)
    return result


def install_from_bundle(host: Host, *options: str, user: str = "root", check: bool = True) -> Result:
    """The same from the bundle that `carry_bundle` brought."""
    return install(host, "--bundle", "bundle", *options, user=user, check=check)


def step_seconds(output: str) -> dict[str, float]:
    """The seconds that an install's output gives for each step."""
    shown = re.findall(r"^\((\d)/7\) (\w+) .*?(\d+\.\d) s", output, re.MULTILINE)
    return {name: float(seconds) for _, name, seconds in shown}


def decoded(output: str) -> str:
    """The sentence that an install says it decoded."""
    found = re.search(r"^decoded: (.+)$", output, re.MULTILINE)
    return found[1] if found else ""


def snapshot(host: Host) -> set[str]:
    """Every file, link and directory where an install may write: path, kind, size, time, link target."""
    shown = host.run(
        f"find {WATCHED} -xdev \\( -type d -printf '%p d\\n' \\) -o -printf '%p %y %s %T@ %l\\n'"
        f" | grep -vE {shlex.quote(UNWATCHED)} || true"
    )
    return set(shown.out.splitlines())


def manifest(host: Host, owner: Owner) -> dict[str, Any]:
    """The manifest of what is current."""
    loaded: dict[str, Any] = json.loads(
        host.run(f"cat {owner.prefix}/current/manifest.json", user=owner.user).out
    )
    return loaded


def completion(host: Host, owner: Owner, prompt: str = "Once upon a time", port: int = PORT) -> str:
    """What the server answers, greedily, to a client on the host's loopback; an error status raises."""
    program = (
        "import json, sys, urllib.request\n"
        "body = json.dumps({'prompt': sys.argv[2], 'max_tokens': 16, 'temperature': 0}).encode()\n"
        "request = urllib.request.Request(sys.argv[1], body, {'Content-Type': 'application/json'})\n"
        "print(json.load(urllib.request.urlopen(request, timeout=60))['choices'][0]['text'])"
    )
    address = f"http://127.0.0.1:{port}/v1/completions"
    return host.run(["python3", "-c", program, address, prompt], user=owner.user).out


def health(address: str) -> dict[str, Any] | None:
    """What /health says to this machine, or None when nobody answers."""
    try:
        with urllib.request.urlopen(f"http://{address}/health", timeout=30) as answer:
            loaded: dict[str, Any] = json.load(answer)
            return loaded
    except (urllib.error.URLError, OSError):
        return None


def exposure(host: Host, owner: Owner) -> float:
    """The overall exposure that systemd-analyze gives the server's unit (0 safe, 10 not)."""
    manager = "--user " if owner.scope == "user" else ""
    line = f"systemd-analyze {manager}security --no-pager halo-server.service | tail -1"
    shown = host.run(line, user=owner.user).out
    found = re.search(r"(\d+\.\d)", shown)
    assert found, shown
    return float(found[1])


def check_current(host: Host, owner: Owner) -> str:
    """The id of the generation that is current, or an empty string; an incomplete one fails here."""
    program = (
        "import hashlib, json, os, pathlib, sys\n"
        "current = pathlib.Path(sys.argv[1], 'current')\n"
        "if not os.path.lexists(current): sys.exit()\n"
        "manifest = json.loads((current / 'manifest.json').read_text())\n"
        "for name, digest in manifest['files'].items():\n"
        "    assert hashlib.sha256((current / name).read_bytes()).hexdigest() == digest, name\n"
        "assert (current / 'models/default/model.halo').is_file()\n"
        "assert manifest['id'] == current.resolve().name\n"
        "print(manifest['id'])"
    )
    return host.run(["python3", "-c", program, owner.prefix], user=owner.user).out.strip()


def kill_server(host: Host, owner: Owner) -> int:
    """SIGKILL the server's main process; the pid that it had."""
    manager = "--user " if owner.scope == "user" else ""
    line = f"systemctl {manager}show --property=MainPID --value halo-server.service"
    pid = int(host.run(line, user=owner.user).out)
    assert pid > 0, "the server does not run"
    host.run(f"kill -9 {pid}", user=owner.user)
    return pid


def unit_property(host: Host, owner: Owner, name: str) -> str:
    """What systemd says of the server's unit."""
    manager = "--user " if owner.scope == "user" else ""
    line = f"systemctl {manager}show --property={name} --value halo-server.service"
    return host.run(line, user=owner.user).out.strip()


def hang_server(host: Host, owner: Owner, setting: str) -> str:
    """Give the unit `setting` until the next boot, restart it, stop its main process; the pid."""
    manager = "--user " if owner.scope == "user" else ""
    folder = "$XDG_RUNTIME_DIR/systemd/user" if owner.scope == "user" else "/run/systemd/system"
    place = f"{folder}/halo-server.service.d"
    host.run(
        f"mkdir -p {place} && printf '[Service]\\n{setting}\\n' > {place}/test.conf && "
        f"systemctl {manager}daemon-reload && systemctl {manager}restart halo-server.service",
        user=owner.user,
    )
    pid = unit_property(host, owner, "MainPID")
    host.run(f"kill -STOP {pid}", user=owner.user)
    return pid
