"""Facts of a box, typed: gather.sh's stream in, one frozen `Facts` out. It judges nothing; checks do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from checks import hardware, host
from checks.stream import State, Stream, read_stream
from engine.errors import EXIT_COULD_NOT_RUN, HaloError

SCRIPT: Final = Path(__file__).with_name("gather.sh")
GATHER_SECONDS: Final = 30.0


@dataclass(frozen=True)
class Memory:
    """Bytes. `locked_limit` is the soft RLIMIT_MEMLOCK; -1 unlimited, 0 unknown."""

    total: int = 0
    available: int = 0
    locked_limit: int = 0


@dataclass(frozen=True)
class Facts:
    """What one pass saw of one box. `stream` keeps the raw records for checks that need a file's words."""

    os: host.OsRelease = field(default_factory=host.OsRelease)
    kernel: host.Kernel = field(default_factory=host.Kernel)
    memory: Memory = field(default_factory=Memory)
    user: host.User = field(default_factory=host.User)
    pci: tuple[hardware.PciDevice, ...] = ()
    kfd: tuple[hardware.KfdNode, ...] = ()
    tools: Mapping[str, host.Tool] = field(default_factory=dict)
    pythons: tuple[host.Python, ...] = ()
    rocm: tuple[host.RocmRoot, ...] = ()
    systemd: host.Systemd = field(default_factory=host.Systemd)
    disks: Mapping[str, host.Disk] = field(default_factory=dict)
    listeners: tuple[host.Listener, ...] = ()
    stream: Stream = field(default_factory=Stream, repr=False)
    raw: bytes = field(default=b"", repr=False, compare=False)

    @property
    def amd_gpus(self) -> tuple[hardware.PciDevice, ...]:
        return tuple(d for d in self.pci if d.vendor == hardware.AMD_GPU_VENDOR and d.pci_class >> 16 == 0x03)

    @property
    def strix_halo_gpu(self) -> hardware.PciDevice | None:
        """The Strix Halo GPU by its PCI id 1002:1586, whatever driver holds it."""
        return next((d for d in self.amd_gpus if d.device == hardware.STRIX_HALO_GPU), None)

    @property
    def gfx1151_node(self) -> hardware.KfdNode | None:
        """The KFD node that the driver made for a gfx1151 GPU."""
        return next((n for n in self.kfd if n.target_version == hardware.GFX1151), None)

    @property
    def npu(self) -> hardware.PciDevice | None:
        npus = [d for d in self.pci if d.vendor == hardware.AMD_CPU_VENDOR]
        return next((d for d in npus if d.device == hardware.STRIX_HALO_NPU), npus[0] if npus else None)

    def module_loaded(self, name: str) -> bool:
        return self.stream.place(f"/sys/module/{name}").state is not State.ABSENT

    def summary(self) -> dict[str, Any]:
        """The typed facts as plain data for --json; the raw stream is left out."""
        names = [name for name in self.__dataclass_fields__ if name not in ("stream", "raw")]
        return {name: _plain(getattr(self, name)) for name in names}


def _plain(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value


def parse(data: bytes) -> Facts:
    """Facts from gather.sh's output: any bytes give Facts or one HaloError. Pure."""
    stream = read_stream(data)
    user = host.read_user(stream)
    return Facts(
        os=host.read_os(stream),
        kernel=host.read_kernel(stream),
        memory=_memory(stream),
        user=user,
        pci=hardware.read_pci(stream),
        kfd=hardware.read_kfd(stream),
        tools=host.read_tools(stream),
        pythons=host.read_pythons(stream),
        rocm=host.read_rocm(stream),
        systemd=host.read_systemd(stream, user),
        disks=host.read_disks(stream),
        listeners=host.read_listeners(stream),
        stream=stream,
        raw=data,
    )


def _memory(stream: Stream) -> Memory:
    text = stream.text("/proc/meminfo")
    sizes = dict(re.findall(r"^(\w{1,40}):\s+([0-9]{1,15}) kB$", text, re.MULTILINE | re.ASCII))
    limits = stream.text("/proc/self/limits")
    locked = re.search(r"^Max locked memory\s+(unlimited|[0-9]{1,20})", limits, re.MULTILINE | re.ASCII)
    limit = 0 if locked is None else -1 if locked[1] == "unlimited" else int(locked[1])
    return Memory(int(sizes.get("MemTotal", 0)) * 1024, int(sizes.get("MemAvailable", 0)) * 1024, limit)


def gather(paths: Sequence[str | Path] = (), *, root: Path | None = None, shell: str = "sh") -> Facts:
    """Run gather.sh here and parse what it says. `paths` are places whose free space matters.

    `root` reads another tree instead and runs no command. HaloError with exit code 3 when the script fails.
    """
    argv = [shell, str(SCRIPT), *(("--root", str(root)) if root else ()), *map(str, paths)]
    return parse(_output_of(argv))


def _output_of(argv: Sequence[str]) -> bytes:
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise HaloError(
            f"The facts script could not be started: {error}.",
            hint=f"Run it by hand to see why: sh {SCRIPT}",
            exit_code=EXIT_COULD_NOT_RUN,
        ) from error
    try:
        return process.communicate(timeout=GATHER_SECONDS)[0]
    except subprocess.TimeoutExpired as error:
        raise HaloError(
            f"The facts script did not end within {GATHER_SECONDS:.0f} s.",
            hint=f"See where it waits: sh -x {SCRIPT}",
            exit_code=EXIT_COULD_NOT_RUN,
        ) from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
