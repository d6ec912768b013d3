"""What a web page may do to the server: nothing by a name of its own, nothing from an origin not allowed."""

from __future__ import annotations

import hashlib

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import HaloError
from engine.server.browsers import is_own_name, parse_origin
from engine.server.keys import new_key, read_keys
from tests.engine.ops_fixtures import operated
from tests.engine.server_fixtures import HashSession, make_engine

PAGE = "http://localhost:3000"
BODY = {"model": "halo-test", "prompt": "a", "max_tokens": 1}
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    "Access-Control-Request-Private-Network": "true",
}


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    with operated(make_engine(HashSession()), tmp_path_factory.mktemp("closed")) as server:
        yield server


@pytest.fixture(scope="module")
def allowing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("allowing")
    with operated(make_engine(HashSession()), folder, origins=(PAGE, "app://obsidian.md")) as server:
        yield server


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8180", "127.0.0.1.evil.example", "localhost.evil.example",
             "192.168.1.7", "", "[::2]:80", "a b", "[::1", "0.0.0.0"],
)  # fmt: skip
def test_a_page_that_points_its_own_name_here_reads_nothing(closed, host):
    for path in ("/v1/models", "/health", "/metrics"):
        answer = httpx.get(f"{closed.url}{path}", headers={"Host": host})
        assert answer.status_code in (400, 403), answer.text
    if host and " " not in host:
        assert answer.json()["error"]["code"] in ("forbidden", None)


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:5", "127.3.2.1", "halo.localhost."]
)
def test_the_server_s_own_names_are_answered(closed, host):
    assert httpx.get(f"{closed.url}/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:3000", "http://127.0.0.1:1", ""]
)
def test_a_page_of_another_origin_decodes_nothing(closed, origin):
    """A form or a fetch without CORS sends its request all the same: it is refused, not only unreadable."""
    before = closed.service.runner.scheduler.observer.read().requests_total
    headers = {"Origin": origin, "Content-Type": "text/plain"}
    answer = httpx.post(f"{closed.url}/v1/completions", json=BODY, headers=headers)
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    assert closed.service.runner.scheduler.observer.read().requests_total == before


def test_a_page_of_the_server_s_own_origin_is_answered(closed):
    answer = httpx.post(f"{closed.url}/v1/completions", json=BODY, headers={"Origin": closed.url})
    assert answer.status_code == 200


def test_no_header_of_cors_is_sent_unless_an_origin_is_allowed(closed):
    answer = httpx.options(f"{closed.url}/v1/completions", headers=PREFLIGHT)
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_an_allowed_page_asks_first_and_reads_the_answer(allowing):
    url = f"{allowing.url}/v1/completions"
    asked = httpx.options(url, headers=PREFLIGHT)
    assert asked.status_code == 204 and asked.content == b""
    assert asked.headers["access-control-allow-origin"] == PAGE
    assert asked.headers["access-control-allow-headers"] == PREFLIGHT["Access-Control-Request-Headers"]
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert asked.headers["access-control-allow-private-network"] == "true"
    for origin in (PAGE, "app://obsidian.md"):
        answer = httpx.post(url, json=BODY, headers={"Origin": origin})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
        assert answer.headers["vary"] == "origin" and "x-request-id" in answer.headers
    with httpx.stream("POST", url, json=BODY | {"stream": True}, headers={"Origin": PAGE}) as stream:
        assert stream.headers["access-control-allow-origin"] == PAGE
        stream.read()


@pytest.mark.parametrize(
    "origin", ["http://localhost:3001", "https://localhost:3000", "http://localhost", "null"]
)
def test_an_origin_that_is_nearly_an_allowed_one_is_not(allowing, origin):
    answer = httpx.post(f"{allowing.url}/v1/completions", json=BODY, headers={"Origin": origin})
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers


def test_credentials_are_never_allowed(allowing):
    answer = httpx.options(f"{allowing.url}/v1/completions", headers=PREFLIGHT)
    assert "access-control-allow-credentials" not in answer.headers


def test_with_keys_any_name_is_answered_and_a_preflight_needs_none(tmp_path):
    digest = hashlib.sha256(b"secret").digest()
    with operated(make_engine(HashSession()), tmp_path, digests=[digest], origins=(PAGE,)) as server:
        url = f"{server.url}/v1/models"
        for headers in ({"Authorization": "Bearer secret"}, {"x-api-key": "secret"}):
            answer = httpx.get(
                url, headers=headers | {"Host": "box.example", "Origin": "https://else.example"}
            )
            assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
        assert httpx.options(url, headers=PREFLIGHT).status_code == 204
        refused = httpx.get(url, headers={"Origin": PAGE})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == PAGE
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(url, headers={"x-api-key": "wrong"}).status_code == 401
        both = {"x-api-key": "wrong", "Authorization": "Bearer secret"}
        assert httpx.get(url, headers=both).status_code == 200
        lines = server.lines(7)
        assert {line["client"] for line in lines if line["status"] == 200} == {f"key:{digest.hex()[:8]}"}
        assert "secret" not in server.log.read_text()


# --- what may be said of origins


@pytest.mark.parametrize(
    ("text", "origin"),
    [("http://localhost:3000", "http://localhost:3000"), ("HTTPS://Chat.Example/", "https://chat.example"),
     ("http://a:80", "http://a"), ("https://a:443", "https://a"), ("http://[::1]:5", "http://[::1]:5"),
     ("app://obsidian.md", "app://obsidian.md")],
)  # fmt: skip
def test_origins_are_read_as_browsers_send_them(text, origin):
    assert parse_origin(text) == origin


@pytest.mark.parametrize(
    "text", ["*", "", "null", "localhost:3000", "http://a/b", "http://a b", "http://*.a", "http://"]
)
def test_what_is_no_exact_origin_is_refused_with_the_way_to_write_one(text):
    with pytest.raises(HaloError) as info:
        parse_origin(text)
    assert "--cors-origin" in info.value.hint and info.value.exit_code == 3


@given(st.text(max_size=40))
def test_a_host_header_of_any_letters_is_judged(text):
    assert is_own_name(text) in (True, False)


# --- new keys


def test_a_new_key_opens_the_server_and_only_its_hash_is_kept(tmp_path):
    path = tmp_path / "keys"
    first = new_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text(path.read_text() + "# mine")  # a line without an end
    second = new_key(path)
    assert read_keys(path) == [hashlib.sha256(key.encode()).digest() for key in (first, second)]
    assert first not in path.read_text() and first != second


def test_a_file_that_cannot_be_written_is_a_sentence(tmp_path):
    with pytest.raises(HaloError) as info:
        new_key(tmp_path / "absent" / "keys")
    assert "absent" in info.value.message
