"""halo.toml and addresses: what is wrong is refused by name, what is right survives a round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import HaloError
from provision.desired import Desired, client_address, format_listen, is_loopback, load_desired, parse_listen


def test_round_trip_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "halo.toml"
    assert load_desired(path) == Desired()
    wanted = Desired().merged(profile="cpu", listen="[::1]:9000", units=False)
    path.write_text(wanted.text())
    assert load_desired(path) == wanted
    assert wanted.merged(profile=None, listen=None, units=None) == wanted


@pytest.mark.parametrize(
    "text", ["profile = 'gpu'", "units = 3", "listen = 1", "broken", "\x00", "units = 'no'"]
)
def test_wrong_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "halo.toml").write_text(text)
    with pytest.raises(HaloError, match=r"halo\.toml"):
        load_desired(tmp_path / "halo.toml")


@pytest.mark.parametrize(
    "text", ["", "8180", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", "host:1", "1.2.3:4"]
)
def test_wrong_address(text: str) -> None:
    with pytest.raises(HaloError, match="not an address"):
        parse_listen(text)


@given(st.one_of(st.text(max_size=30), st.ip_addresses().map(lambda a: format_listen(str(a), 8180))))
def test_any_address_is_parsed_or_refused(text: str) -> None:
    try:
        host, port = parse_listen(text)
    except HaloError:
        return
    assert parse_listen(format_listen(host, port)) == (host, port)


def test_loopback_and_client() -> None:
    assert is_loopback("localhost:1") and is_loopback("127.9.9.9:1") and is_loopback("[::1]:1")
    assert not is_loopback("0.0.0.0:1") and not is_loopback("[::]:1")
    assert client_address("0.0.0.0:5") == ("127.0.0.1", 5)
    assert client_address("[::]:5") == ("::1", 5)
