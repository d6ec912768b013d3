"""Where the server listens, and what it tells systemd: addresses, socket activation, notification."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import EXIT_COULD_NOT_RUN, HaloError

DEFAULT_LISTEN = "127.0.0.1:8180"
FIRST_FD = 3  # sd_listen_fds(3)
SEND_BUFFER = 128 << 10  # bytes; the kernel doubles it


def parse_listen(text: str) -> tuple[str, int]:
    """("127.0.0.1", 8180) from "127.0.0.1:8180" or "[::1]:8180"; raises HaloError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else -1
    if not colon or not host or not 0 <= number <= 65535:
        raise HaloError(
            f"{text!r} is no address to listen on.",
            hint="write ADDRESS:PORT, as 127.0.0.1:8180 or [::1]:8180.",
        )
    return host, number


def bind(host: str, port: int) -> list[socket.socket]:
    """Listening TCP sockets, one for each address of `host` (localhost may have two) that this machine has.

    Raises HaloError where an address is taken, none is ours, or it is not allowed.
    """
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise HaloError(f"There is no address {host!r} to listen on.", hint="ip address show") from error
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    for family, address in dict.fromkeys((info[0], info[4]) for info in infos):
        try:
            sockets.append(_listener(family, address))
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                absent = error
                continue
            for sock in sockets:
                sock.close()
            raise _bind_error(host, port, error) from error
    if not sockets:
        raise _bind_error(host, port, absent or OSError(errno.EADDRNOTAVAIL, "no address")) from absent
    return sockets


def _listener(family: int, address: Any) -> socket.socket:  # noqa: ANN401  (as the socket module types it)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound_buffer(sock)
        sock.bind(address)
        sock.listen(128)
    except OSError:
        sock.close()
        raise
    return sock


def bound_buffer(sock: socket.socket) -> None:
    """Connections of this listener hold little that their client has not read, so that it is seen to be slow.

    The kernel would let one hold megabytes: answers of many thousand tokens.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)


def activated_sockets(environ: Mapping[str, str] | None = None) -> list[socket.socket]:
    """The stream sockets that systemd passed to this process, or none; source: sd_listen_fds(3)."""
    env = os.environ if environ is None else environ
    if env.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = env.get("LISTEN_FDS", "")
    if not count.isdigit():
        return []
    sockets = []
    for fd in range(FIRST_FD, FIRST_FD + int(count)):
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        if sock.type != socket.SOCK_STREAM:
            raise HaloError(
                f"systemd passed file descriptor {fd}, which is no stream socket.",
                hint="use ListenStream= in the .socket unit.",
                exit_code=EXIT_COULD_NOT_RUN,
            )
        bound_buffer(sock)
        sockets.append(sock)
    return sockets


def refuse_open_address(sockets: Sequence[socket.socket]) -> None:
    """Raise HaloError when a socket can be reached from beyond this machine."""
    for sock in sockets:
        if is_local(sock):
            continue
        raise HaloError(
            f"Refusing to listen on {describe(sock)} without API keys: other machines can reach it.",
            hint="give --api-keys FILE (one sha256 of a key a line), or listen on 127.0.0.1.",
            exit_code=EXIT_COULD_NOT_RUN,
        )


def is_local(sock: socket.socket) -> bool:
    """Whether only this machine reaches a socket, by the address that it is really bound to."""
    if sock.family == socket.AF_UNIX:
        return True
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    address = ipaddress.ip_address(sock.getsockname()[0].partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def describe(sock: socket.socket) -> str:
    """The address of a socket as a person writes it."""
    name = sock.getsockname()
    if sock.family == socket.AF_INET6:
        return f"[{name[0]}]:{name[1]}"
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else f"unix:{name}"


def notify(state: str, environ: Mapping[str, str] | None = None) -> None:
    """Tell systemd, where it listens, e.g. READY=1; source: sd_notify(3). Never fails."""
    address = (os.environ if environ is None else environ).get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect(address)
            sock.sendall(state.encode())
    except OSError:
        return  # a supervisor that went away is no reason to stop serving


def _bind_error(host: str, port: int, error: OSError) -> HaloError:
    if error.errno == errno.EADDRINUSE:
        return HaloError(
            f"Port {port} on {host} is taken by another process.",
            hint=f"find it with: ss -ltnp 'sport = :{port}', or choose another with --port.",
            exit_code=EXIT_COULD_NOT_RUN,
        )
    if error.errno == errno.EACCES:
        hint = "ports below 1024 need root; choose another with --port."
    else:
        hint = "see the addresses of this machine with: ip address show"
    return HaloError(
        f"Cannot listen on {host} port {port}: {error.strerror}.", hint=hint, exit_code=EXIT_COULD_NOT_RUN
    )
