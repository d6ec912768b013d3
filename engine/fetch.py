"""HTTPS GET with bounded redirects, waits and sizes. Neither what is fetched nor how it is resumed is here.

The standard library's http.client, on purpose: one kind of request needs no further dependency, and the
certificates are the system's (OpenSSL's default store), which an owner behind a company's CA has set already.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import random
import re
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from engine.errors import HaloError

CHUNK: Final = 1 << 18
MAX_JSON: Final = 32 << 20
MAX_REDIRECTS: Final = 5
LEAST_BYTES: Final = 4096  # fewer in two stall times: a server that dribbles holds us as one that is silent
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_ONLINE: Final = "look at the network and the endpoint, then run the same command again"
T = TypeVar("T")


class Transient(HaloError):
    """A failure that another try may mend. `wait`: seconds that the server asked for."""

    def __init__(self, message: str, *, wait: float | None = None, hint: str = _ONLINE) -> None:
        super().__init__(message, hint=hint)
        self.wait = wait


class Refused(HaloError):
    """An answer that no other try would change: its HTTP `status`, and the Hub's X-Error-Code."""

    def __init__(self, message: str, status: int, code: str) -> None:
        super().__init__(message, hint=_ONLINE)
        self.status = status
        self.code = code


@dataclass(frozen=True)
class Retry:
    """How long to go on: `tries` failures in a row, waits that double from `delay` seconds to `longest`."""

    tries: int = 6
    delay: float = 1.0
    longest: float = 120.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def run(self, action: Callable[[], T], note: Callable[[str], None], moved: Callable[[], bool]) -> T:
        """`action`, again after each Transient, until `tries` in a row brought nothing (`moved`)."""
        failures = 0
        while True:
            try:
                return action()
            except Transient as error:
                failures = 1 if moved() else failures + 1
                wait = self.delay * 2 ** (failures - 1) if error.wait is None else error.wait
                if failures >= self.tries or (error.wait or 0) > self.longest:
                    raise
                wait = min(wait, self.longest)
                note(f"{error.message} Trying again in {wait:.0f} s ({failures} of {self.tries - 1}).")
                self.sleep(wait * (1 + random.random() / 4))  # noqa: S311  # spreads clients, hides nothing


class Response:
    """One answer whose headers are read: `status`, final `url`, headers, and its body in chunks."""

    def __init__(self, raw: http.client.HTTPResponse, url: str, stall: float) -> None:
        self.status = raw.status
        self.url = url
        self._raw, self._stall = raw, stall

    def header(self, name: str) -> str:
        """A header's value, or an empty string."""
        return str(self._raw.headers.get(name) or "")

    @property
    def length(self) -> int | None:
        """Content-Length, None where it is absent or no number."""
        text = self.header("Content-Length")
        return int(text) if re.fullmatch("[0-9]{1,18}", text) else None

    def chunks(self) -> Iterator[bytes]:
        """The body as it comes, at most CHUNK bytes each. Raises Transient when it stalls or breaks."""
        since, held = time.monotonic(), 0
        while chunk := _broken(self.url, lambda: self._raw.read1(CHUNK)):
            yield chunk
            held += len(chunk)
            if time.monotonic() - since > 2 * self._stall:
                if held < LEAST_BYTES:
                    raise Transient(f"{shown(self.url)} sent {held} bytes in {2 * self._stall:.0f} s.")
                since, held = time.monotonic(), 0

    def body(self, most: int) -> bytes:
        """The whole body; HaloError beyond `most` bytes, Transient where it is shorter than announced."""
        data = bytearray()
        for chunk in self.chunks():
            data += chunk
            if len(data) > most:
                raise HaloError(f"{shown(self.url)} is longer than {most} bytes.", hint="check the endpoint")
        if self.length is not None and len(data) != self.length:
            raise Transient(f"{shown(self.url)} broke off after {len(data)} of {self.length} bytes.")
        return bytes(data)


class Client:
    """GET requests to one endpoint and to where it redirects; the token goes to the endpoint alone.

    `stall`: seconds without a byte after which a connection is given up. Plain http is for loopback only.
    """

    def __init__(
        self, endpoint: str, token: str = "", *, stall: float = 30.0, context: ssl.SSLContext | None = None
    ) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._origin = origin(self.endpoint)
        self._token, self._stall, self._context = token, stall, context

    @contextlib.contextmanager
    def get(self, url: str, headers: Mapping[str, str] | None = None) -> Iterator[Response]:
        """The answer to a GET after its redirects, if its status is 200, 206 or 416; else an error."""
        for _ in range(MAX_REDIRECTS + 1):
            with self._send(url, dict(headers or {})) as response:
                if response.status not in _REDIRECTS:
                    _check_status(response)
                    yield response
                    return
                url = _next(url, response.header("Location"))
        raise HaloError(f"{shown(url)}: more than {MAX_REDIRECTS} redirects.", hint="check the endpoint")

    def json(self, url: str) -> tuple[Any, Response]:
        """A JSON answer and its headers. Raises HaloError where it is none, or too long."""
        with self.get(url, {"Accept": "application/json"}) as response:
            body = response.body(MAX_JSON)
        try:
            return json.loads(body), response
        except (ValueError, RecursionError) as error:
            hint = "check the endpoint: is it a Hugging Face hub, and is no login page in between?"
            raise HaloError(f"{shown(url)} did not answer with JSON.", hint=hint) from error

    @contextlib.contextmanager
    def _send(self, url: str, headers: dict[str, str]) -> Iterator[Response]:
        parts = urllib.parse.urlsplit(url)
        headers |= {"User-Agent": "halo", "Accept-Encoding": "identity", "Connection": "close"}
        if self._token and origin(url) == self._origin:
            headers["Authorization"] = f"Bearer {self._token}"
        target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        connection = self._connection(url)
        try:
            raw = _broken(url, lambda: self._exchange(connection, target, headers))
            yield Response(raw, url, self._stall)
        finally:
            connection.close()

    def _exchange(
        self, connection: http.client.HTTPConnection, target: str, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        connection.request("GET", target, headers=headers)
        # Each header line may take `stall`; the timer bounds their sum. The raw shutdown leaves the TLS
        # object, which this thread reads from, alone.
        sock = connection.sock
        timer = threading.Timer(2 * self._stall, _shut, (sock,))
        timer.daemon = True
        timer.start()
        try:
            return connection.getresponse()
        finally:
            timer.cancel()

    def _connection(self, url: str) -> http.client.HTTPConnection:
        parts = urllib.parse.urlsplit(url)
        host, port = str(parts.hostname), parts.port
        if parts.scheme == "http":  # loopback: never through a proxy
            return http.client.HTTPConnection(host, port, timeout=self._stall)
        self._context = self._context or ssl.create_default_context()
        proxy = _proxy(host)
        if proxy is None:
            return http.client.HTTPSConnection(host, port, timeout=self._stall, context=self._context)
        through = http.client.HTTPSConnection(
            str(proxy.hostname), proxy.port or 3128, timeout=self._stall, context=self._context
        )
        login = {}
        if proxy.username:
            pair = f"{urllib.parse.unquote(proxy.username)}:{urllib.parse.unquote(proxy.password or '')}"
            login["Proxy-Authorization"] = "Basic " + _base64(pair)
        through.set_tunnel(host, port or 443, login)
        return through


def origin(url: str) -> tuple[str, str, int]:
    """(scheme, host, port) of a URL that may be fetched; HaloError for any other."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        parts, host, port = urllib.parse.SplitResult("", "", "", "", ""), "", None
    hint = "use an address like https://huggingface.co"
    if not host or parts.scheme not in ("http", "https") or re.search(r"[^\x21-\x7e]", url):
        raise HaloError(f"{shown(url)!r} is no address that halo fetches from.", hint=hint)
    if parts.username is not None:
        raise HaloError("An address with a user or a password in it is refused.", hint="use HF_TOKEN")
    if parts.scheme == "http" and host not in _LOOPBACK:
        raise HaloError(f"{shown(url)} is not encrypted; http is for this machine alone.", hint=hint)
    return parts.scheme, host, port or (443 if parts.scheme == "https" else 80)


def shown(url: str) -> str:
    """A URL for a person: without its query, which on a CDN is a signature, and printable."""
    plain = re.sub("//[^/@]*@", "//", url.split("?")[0].split("#")[0])
    return "".join(c if c.isprintable() else "?" for c in plain)[:300]


def _next(url: str, location: str) -> str:
    """Where a redirect leads; from https never to http."""
    if not location:
        raise Transient(f"{shown(url)} redirects to nowhere.")
    try:
        target = urllib.parse.urljoin(url, location)
    except ValueError:
        target = ""
    scheme, host, _ = origin(target)
    if scheme == "http" and origin(url)[0] == "https":
        raise HaloError(
            f"{shown(url)} redirects to {host} without encryption.", hint="check the endpoint: it is refused"
        )
    return target


def _check_status(response: Response) -> None:
    status, where = response.status, shown(response.url)
    encoding = response.header("Content-Encoding")
    if status in (200, 206, 416):
        if encoding not in ("", "identity"):
            raise Transient(f"{where} came encoded ({encoding[:20]!r}), which was not asked for.")
        return
    if status in (408, 425, 429) or status >= 500:
        raise Transient(f"{where} answered {status}.", wait=_retry_after(response.header("Retry-After")))
    code = response.header("X-Error-Code")[:40]
    raise Refused(f"{where} answered {status}{f' ({code})' if code.isalnum() else ''}.", status, code)


def _retry_after(text: str) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date."""
    if re.fullmatch("[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _broken(url: str, action: Callable[[], T]) -> T:
    """`action`, with what a connection can do to it as one error."""
    where = shown(url)
    try:
        return action()
    except ssl.SSLCertVerificationError as error:
        host = urllib.parse.urlsplit(url).hostname
        raise HaloError(
            f"The certificate of {host} is not trusted: {error.verify_message}.",
            hint="check the date, and that the CA is in the system's store (or name it in SSL_CERT_FILE)",
        ) from error
    except TimeoutError as error:
        raise Transient(f"{where} is silent.") from error
    except socket.gaierror as error:
        raise Transient(f"{urllib.parse.urlsplit(url).hostname} has no address: {error.strerror}.") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise Transient(f"{where} broke off: {why}.") from error


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _proxy(host: str) -> urllib.parse.SplitResult | None:
    """The proxy that the environment names for https to `host`."""
    address = urllib.request.getproxies().get("https")
    if not address or urllib.request.proxy_bypass(host):
        return None
    return urllib.parse.urlsplit(address if "://" in address else f"http://{address}")


def _base64(text: str) -> str:
    import base64

    return base64.b64encode(text.encode()).decode()
