"""`halo serve` as a process of its own, on the bundled demo model and this checkout's library."""

from __future__ import annotations

import lzma
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.bench_stream import Server, free_port, get, halo_command, running
from tests.engine.ops_fixtures import samples
from tests.engine.server_fixtures import wait_until

DEMO = Path(__file__).parents[3] / "engine" / "models" / "demo"


@dataclass
class Loaded:
    """The process, and what it says and takes."""

    server: Server

    @property
    def port(self) -> int:
        return self.server.port

    def samples(self) -> dict:
        """All of /metrics."""
        return samples(get(self.port, "/metrics", timeout=60)[1].decode())

    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        found = self.samples()
        return found["vllm:num_requests_running", ()] == found["vllm:num_requests_waiting", ()] == 0

    def settle(self) -> None:
        """Wait until it is idle and holds no connection of anybody else's."""
        wait_until(self.idle, 60)

    def descriptors(self) -> int:
        """Open descriptors that are sockets of connections or anything else."""
        return sum(1 for _ in Path(f"/proc/{self.server.process.pid}/fd").iterdir())

    def own_memory(self) -> int:
        """Bytes that are its own."""
        return self.server.memory()["anon"]


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as an installation has it."""
    from provision.prove import ensure_prepared

    folder = tmp_path_factory.mktemp("demo")
    for path in DEMO.iterdir():
        if path.suffix == ".xz":
            (folder / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
        else:
            shutil.copy(path, folder)
    ensure_prepared(folder)
    return folder


@pytest.fixture
def loaded(demo_model: Path, native_library: Path, tmp_path: Path, monkeypatch) -> Iterator[Loaded]:
    """A server that has loaded; its log is in the test's directory."""
    monkeypatch.setenv("HALO_LIB_DIR", str(native_library.parent))
    monkeypatch.delenv("HALO_GENERATION_DIR", raising=False)
    port = free_port()
    argv = [*halo_command(), "serve", "--listen", f"127.0.0.1:{port}", "--model", str(demo_model)]
    with running("halo", argv, port, tmp_path / "server.log") as server:
        server.wait_health(loaded=True)
        yield Loaded(server)
