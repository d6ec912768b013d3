"""Pulling a model: whatever the line or the hub does, what gets a name has the bytes that were listed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import HaloError
from engine.fetch import Client, Retry, origin, shown
from engine.hub import choose, endpoint_of, listing, read_token, split_repo
from engine.pull import RECORD, Pulled, Wish, pull
from engine.pull_progress import progress_for
from tests.engine.hub_server import (
    COMMIT,
    REPO,
    Hub,
    cut,
    dribble,
    dribble_headers,
    entry,
    lie,
    stall,
    status,
)

ROOT = Path(__file__).parents[2]
WEIGHTS = np.random.default_rng(7).integers(0, 256, 30_000, dtype=np.uint8).tobytes()
FILES = {
    "config.json": b'{"model_type": "bitnet"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "LICENSE": b"MIT",
    "README.md": b"read me",
    "pytorch_model.bin": b"pickle",
    "original/consolidated.safetensors": b"twice",
    "evil.py": b"boom",
}
WANTED = {"config.json", "tokenizer.json", "model.safetensors", "LICENSE", "README.md"}
TOKEN = "hf_secretsecretsecret"


class Told:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.sum = 0
        self.held: dict[str, int] = {}

    def total(self, size: int) -> None:
        self.sum = size

    def at(self, name: str, held: int) -> None:
        self.held[name] = held

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub(FILES)
    yield made
    made.close()


def fetch(hub: Hub, place: Path, told: Told | None = None, token: str = "", **more) -> Pulled:
    wish = Wish(REPO, more.pop("revision", "main"), more.pop("file", None))
    retry = Retry(tries=more.pop("tries", 6), sleep=more.pop("sleep", lambda _: None))
    client = Client(hub.url, token, stall=more.pop("stall", 5.0))
    return pull(client, wish, place, told or Told(), retry, **more)


def assert_whole(place: Path, files: dict[str, bytes] = FILES, wanted: set[str] = WANTED) -> None:
    assert {path.name for path in place.iterdir()} - {RECORD} == wanted
    for name in wanted:
        assert (place / name).read_bytes() == files[name]


def assert_nothing_false(place: Path, files: dict[str, bytes] = FILES) -> None:
    """Whatever has its name has its bytes."""
    for path in place.iterdir():
        if path.name in files:
            assert path.read_bytes() == files[path.name]


def test_only_what_a_model_needs_is_fetched_and_recorded(hub, tmp_path):
    told = Told()
    pulled = fetch(hub, tmp_path / "m", told)
    assert_whole(tmp_path / "m")
    assert pulled.commit == COMMIT and told.sum == sum(told.held.values()) == sum(
        len(FILES[n]) for n in WANTED
    )
    record = json.loads((tmp_path / "m" / RECORD).read_text())
    assert (record["repo"], record["revision"], record["commit"]) == (REPO, "main", COMMIT)
    assert record["files"]["model.safetensors"]["hash"] == f"sha256:{hashlib.sha256(WEIGHTS).hexdigest()}"
    asked = [path for path, _ in hub.seen if "/resolve/" in path]
    assert len(asked) == len(WANTED) and all(COMMIT in path for path in asked)
    fetch(hub, tmp_path / "m")
    assert [path for path, _ in hub.seen if "/resolve/" in path] == asked, (
        "what is there is not fetched again"
    )


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, len(WEIGHTS)), max_size=5), name=st.sampled_from(sorted(WANTED)))
def test_a_line_that_is_cut_at_any_byte_goes_on_there(hub, tmp_path_factory, cuts, name):
    place = tmp_path_factory.mktemp("cut")
    hub.seen.clear()
    hub.faults[name] = [cut(after) for after in cuts]
    fetch(hub, place)
    assert_whole(place)
    for headers in hub.requests(name)[1:]:
        assert "Range" in headers or cuts.count(0)
        assert "Range" not in headers or headers["If-Range"].startswith('"')


def test_a_pull_that_was_killed_goes_on_in_the_next_process(hub, tmp_path):
    hub.faults["model.safetensors"] = [
        lambda answer, body: (answer.serve(body, cut=20_000), time.sleep(0))[0]
    ]
    code = (
        "import sys\nfrom pathlib import Path\nfrom engine.fetch import Client, Retry\n"
        "from engine.pull import Wish, pull\nfrom tests.engine.test_pull import Told\n"
        f"retry = Retry(sleep=lambda s: (print('cut', flush=True), __import__('time').sleep(60)))\n"
        f"pull(Client({hub.url!r}), Wish({REPO!r}, 'main'), Path(sys.argv[1]), Told(), retry)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "m")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "cut\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "m" / "model.safetensors").exists()
    hub.seen.clear()
    fetch(hub, tmp_path / "m")
    assert_whole(tmp_path / "m")
    assert hub.requests("model.safetensors")[0]["Range"] == "bytes=20000-"


def partial(place: Path, hub: Hub, after: int = 9000) -> None:
    """A directory in which the weights came as far as `after` bytes."""
    hub.faults["model.safetensors"] = [cut(after)]
    with pytest.raises(HaloError):
        fetch(hub, place, tries=1)
    assert (place / "model.safetensors.part").stat().st_size == after
    hub.seen.clear()


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(hub, tmp_path):
    """Half of the old and half of the new would be no model at all."""
    partial(tmp_path, hub)
    new = {**FILES, "model.safetensors": WEIGHTS[::-1]}
    hub.commits[COMMIT] = new
    fetch(hub, tmp_path)
    assert "Range" not in hub.requests("model.safetensors")[0]
    assert_whole(tmp_path, new)


def test_another_file_under_the_same_listing_is_seen_by_its_etag(hub, tmp_path):
    partial(tmp_path, hub)
    hub.faults["model.safetensors"] = [lambda answer, body: answer.serve(body[::-1], cut=9500)]
    fetch(hub, tmp_path)
    assert_whole(tmp_path)


def test_a_part_that_was_damaged_on_the_disk_is_found_by_its_hash(hub, tmp_path):
    partial(tmp_path, hub)
    part = tmp_path / "model.safetensors.part"
    part.write_bytes(b"x" + part.read_bytes()[1:])
    told = Told()
    fetch(hub, tmp_path, told)
    assert_whole(tmp_path)
    assert any("wrong bytes" in note for note in told.notes)


@pytest.mark.parametrize("state", [b"", b"{", b"[]", b'{"pin": 1, "bytes": 2}', b"\xff", b"null"])
def test_a_part_without_a_sound_note_starts_afresh(hub, tmp_path, state):
    partial(tmp_path, hub)
    (tmp_path / "model.safetensors.part.json").write_bytes(state)
    fetch(hub, tmp_path)
    assert_whole(tmp_path)
    assert "Range" not in hub.requests("model.safetensors")[0]


def test_a_part_that_is_too_long_starts_afresh(hub, tmp_path):
    partial(tmp_path, hub)
    with (tmp_path / "model.safetensors.part").open("ab") as stream:
        stream.write(WEIGHTS)
    fetch(hub, tmp_path)
    assert_whole(tmp_path)


def test_a_branch_that_moves_during_the_pull_changes_nothing(hub, tmp_path):
    partial(tmp_path, hub)
    hub.commits["2" * 40] = {**FILES, "model.safetensors": b"other"}
    hub.branches["main"] = "2" * 40
    assert fetch(hub, tmp_path).commit == COMMIT
    assert_whole(tmp_path)


def test_a_server_without_ranges_or_etags_still_gives_the_file(hub, tmp_path):
    partial(tmp_path, hub)
    hub.ranges = False
    fetch(hub, tmp_path)
    assert_whole(tmp_path)
    hub.ranges, hub.etag = True, False
    hub.faults["model.safetensors"] = [cut(11), cut(12_000)]
    fetch(hub, tmp_path / "second")
    assert_whole(tmp_path / "second")
    assert "If-Range" not in hub.requests("model.safetensors")[-1]


def other_range(answer, body):
    start, end = 5, len(body) - 1
    headers = {"Content-Range": f"bytes {start}-{end}/{len(body)}"}
    answer.reply(206, body[start:], headers)


RANGES = [
    other_range,
    lambda answer, body: answer.reply(206, body[9000:]),
    lambda answer, body: answer.reply(206, body[9000:], {"Content-Range": "bytes 9000-29999/31000"}),
    lambda answer, body: answer.reply(206, body[9000:9500], {"Content-Range": "bytes 9000-9499/30000"}),
    lambda answer, body: answer.reply(
        206, body[9000:], {"Content-Range": "bytes 9000-29999/9999" + "9" * 40}
    ),
    lambda answer, body: answer.reply(416, b"", {"Content-Range": "bytes */7"}),
]


@pytest.mark.parametrize("number", range(len(RANGES)))
def test_another_range_than_was_asked_for_is_not_believed(hub, tmp_path, number):
    partial(tmp_path, hub)
    hub.faults["model.safetensors"] = [RANGES[number]]
    fetch(hub, tmp_path)
    assert_whole(tmp_path)


def test_a_part_where_a_whole_file_was_asked_for_is_not_believed(hub, tmp_path):
    hub.faults["model.safetensors"] = [other_range]
    fetch(hub, tmp_path)
    assert_whole(tmp_path)


LIES = {
    "wrong bytes": lie(WEIGHTS[::-1]),
    "longer": lie(WEIGHTS + b"x"),
    "shorter": lie(WEIGHTS[:-1]),
    "empty": lie(b""),
    "says more than it sends": lambda answer, body: answer.reply(
        200, body, {"Content-Length": str(len(body) + 9)}
    ),
    "says less than it sends": lambda answer, body: answer.reply(200, body, {"Content-Length": "17"}),
    "says nonsense": lambda answer, body: answer.reply(200, body + b"x", {"Content-Length": "-4"}),
    "says nothing": lambda answer, body: answer.reply(200, body + b"x" * 99_999, {"Content-Length": "no"}),
    "broken chunks": lie(b"10\r\nonly this", Transfer_Encoding="chunked"),
    "compressed": lie(WEIGHTS, Content_Encoding="gzip"),
    "no http": lambda answer, _: answer.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "nothing at all": lambda answer, _: answer.hang_up(),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_once_is_overcome_and_a_lie_always_is_refused(hub, tmp_path, name):
    hub.faults["model.safetensors"] = [LIES[name]]
    fetch(hub, tmp_path / "once")
    assert_whole(tmp_path / "once")
    hub.faults["model.safetensors"] = [LIES[name]] * 100
    with pytest.raises(HaloError) as info:
        fetch(hub, tmp_path / "always")
    assert info.value.hint and not (tmp_path / "always" / "model.safetensors").exists()
    assert len(hub.faults["model.safetensors"]) >= 85, "it gives up"
    assert_nothing_false(tmp_path / "always")


@pytest.mark.parametrize("fault", [stall, dribble, dribble_headers])
def test_a_server_that_goes_silent_or_dribbles_is_left(hub, tmp_path, fault):
    hub.faults["model.safetensors"] = [fault]
    told = Told()
    fetch(hub, tmp_path, told, stall=0.25)
    assert_whole(tmp_path)
    assert len(told.notes) == 1


@pytest.mark.parametrize("file", ["main", COMMIT, "config.json", "model.safetensors"])
def test_busy_and_broken_servers_are_asked_again_as_they_wish(hub, tmp_path, file):
    waits: list[float] = []
    faults = [status(429, Retry_After="7"), status(503), status(500), status(408)]
    hub.faults[file] = faults
    fetch(hub, tmp_path, sleep=waits.append)
    assert_whole(tmp_path)
    assert 7 <= waits[0] < 9 and len(waits) == 4


def test_a_server_that_asks_for_too_long_a_wait_or_never_recovers_ends_the_pull(hub, tmp_path):
    hub.faults["config.json"] = [status(429, Retry_After="86400")] * 9
    with pytest.raises(HaloError, match="429"):
        fetch(hub, tmp_path)
    assert len(hub.faults["config.json"]) == 8
    hub.faults["config.json"] = [status(500, Retry_After="Fri, 31 Dec 1999 23:59:59 GMT")] * 20
    with pytest.raises(HaloError, match="500"):
        fetch(hub, tmp_path)
    assert len(hub.faults["config.json"]) == 14


REFUSALS = [
    (status(401, X_Error_Code="RepoNotFound"), "does not exist, or is private", "HF_TOKEN"),
    (status(403, X_Error_Code="GatedRepo"), "accepted its terms", "HF_TOKEN"),
    (status(403), "accepted its terms", "HF_TOKEN"),
    (status(404, X_Error_Code="RevisionNotFound"), "has no revision main", "branch"),
    (status(404), "not there", "name"),
    (status(410), "answered 410", "network"),
    (lie(b"<html>please log in</html>"), "did not answer with JSON", "login"),
    (lie(b"[]"), "which commit", "endpoint"),
    (lie(b'{"sha": "../../x"}'), "which commit", "endpoint"),
    (lie(b"[" * 100_000), "did not answer with JSON", "login"),
]


@pytest.mark.parametrize("number", range(len(REFUSALS)))
def test_a_refusal_says_what_a_person_can_do(hub, tmp_path, number):
    fault, words, hint = REFUSALS[number]
    hub.faults["main"] = [fault] * 9
    with pytest.raises(HaloError, match=words) as info:
        fetch(hub, tmp_path / "m", token=TOKEN)
    assert hint in info.value.hint and TOKEN not in str(info.value)
    assert len(hub.faults["main"]) == 8, "not asked twice"
    assert not list(tmp_path.iterdir()), "nothing was fetched, so nothing is left"


def test_a_commit_that_is_asked_for_is_the_one_that_comes(hub, tmp_path):
    assert fetch(hub, tmp_path / "a", revision=COMMIT).commit == COMMIT
    hub.faults[COMMIT] = [lie(json.dumps({"sha": "3" * 40}).encode())]
    with pytest.raises(HaloError, match="gave commit"):
        fetch(hub, tmp_path / "b", revision=COMMIT)


NAMES = [
    "../evil",
    "/etc/evil",
    "a/../../evil",
    "..",
    "",
    "a//b",
    "back\\slash",
    "nul\0",
    "new\nline",
    "x" * 300,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_out_is_refused(hub, tmp_path, name):
    hub.listing = [entry(path, data, False) for path, data in FILES.items()] + [entry(name, b"evil", False)]
    with pytest.raises(HaloError, match="with the name"):
        fetch(hub, tmp_path / "m")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["m", RECORD]


LISTINGS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["1" * 40, "2" * 64]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["type", "path", "size", "oid", "lfs", "x"]), inner, max_size=6)
    ),
    max_leaves=20,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answer=st.lists(LISTINGS, max_size=4) | LISTINGS)
def test_any_list_of_files_is_read_or_refused(hub, answer):
    hub.listing = answer
    with contextlib.suppress(HaloError):
        for file in listing(Client(hub.url), REPO, COMMIT):
            assert ".." not in file.path.split("/") and file.size >= 0


def test_a_list_of_many_pages_is_read_whole(hub, tmp_path):
    hub.page = 2
    fetch(hub, tmp_path)
    assert_whole(tmp_path)
    hub.faults[COMMIT] = [lie(b"[]", Link='<https://elsewhere.example/x>; rel="next"')]
    with pytest.raises(HaloError, match="another host"):
        fetch(hub, tmp_path / "b")
    loop = f'<{hub.url}/api/models/{REPO}/tree/{COMMIT}?recursive=true>; rel="next"'
    hub.faults[COMMIT] = [lie(b"[]", Link=loop)] * 200
    with pytest.raises(HaloError, match="pages"):
        fetch(hub, tmp_path / "c")


def test_shards_come_as_their_index_names_them(hub, tmp_path):
    def index(*names: str) -> bytes:
        return json.dumps({"weight_map": {f"t{at}": name for at, name in enumerate(names)}}).encode()

    parts = {"model-1-of-2.safetensors": b"one", "model-2-of-2.safetensors": b"two" * 99}
    files = {**FILES, **parts, "model.safetensors.index.json": index(*parts)}
    del files["model.safetensors"]
    hub.commits[COMMIT] = files
    fetch(hub, tmp_path / "m")
    assert_whole(
        tmp_path / "m", files, WANTED - {"model.safetensors"} | {*parts, "model.safetensors.index.json"}
    )
    for bad in (index("gone.safetensors"), index("config.json"), b"{", b'{"weight_map": 1}', index(), b"[]",
                b'{"weight_map": {"a": [1]}}', index("../x.safetensors")):  # fmt: skip
        hub.commits[COMMIT] = {**files, "model.safetensors.index.json": bad}
        with pytest.raises(HaloError, match="index"):
            fetch(hub, tmp_path / hashlib.sha256(bad).hexdigest())


def test_one_file_of_many_is_named(hub, tmp_path):
    hub.commits[COMMIT] = {"README.md": b"hi", "q/model.i2_s.gguf": b"GGUF" * 99, "weights.bin": b"pickle"}
    fetch(hub, tmp_path / "m", file="q/model.i2_s.gguf")
    assert (tmp_path / "m" / "model.i2_s.gguf").read_bytes() == b"GGUF" * 99
    for wrong in (None, "gone.gguf", "README.md", "../x.gguf"):
        with pytest.raises(HaloError) as info:
            fetch(hub, tmp_path / f"n{wrong}".replace("/", "_"), file=wrong)
        assert "--file FILE you can have: q/model.i2_s.gguf" in info.value.hint
    with pytest.raises(HaloError, match="pickled"):
        choose(listing(Client(hub.url), REPO, COMMIT), REPO, None)


def test_a_redirect_to_another_host_takes_the_bytes_and_not_the_token(hub, tmp_path):
    cdn = Hub(FILES)
    path = f"/{REPO}/resolve/{COMMIT}/model.safetensors"
    send = status(302, Location=f"{cdn.url}{path}?X-Signature={TOKEN}")
    hub.faults["model.safetensors"] = [send, send]
    cdn.faults["model.safetensors"] = [cut(700)]
    told = Told()
    fetch(hub, tmp_path, told, token=TOKEN)
    cdn.close()
    assert_whole(tmp_path)
    assert all(headers["Authorization"] == f"Bearer {TOKEN}" for _, headers in hub.seen)
    assert len(cdn.seen) == 2 and all("Authorization" not in headers for _, headers in cdn.seen)
    assert cdn.seen[1][1]["Range"] == "bytes=700-"
    assert told.notes and TOKEN not in "".join(told.notes), "a signature of the address is not shown"
    assert all(TOKEN not in path.read_bytes().decode("latin-1") for path in tmp_path.iterdir())


def test_a_redirect_at_the_same_host_keeps_the_token(hub, tmp_path):
    hub.faults["config.json"] = [status(307, Location=f"/{REPO}/resolve/{COMMIT}/config.json?cache=1")]
    fetch(hub, tmp_path, token=TOKEN)
    assert [headers["Authorization"] for headers in hub.requests("config.json")] == [f"Bearer {TOKEN}"] * 2


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("http://hub.example/x", "not encrypted"),
        ("ftp://127.0.0.1/x", "no address"),
        ("file:///etc/passwd", "no address"),
        ("https://user:pw@hub.example/", "user or a password"),
        ("https://[::1", "no address"),
        ("http://127.0.0.1:99999/", "no address"),
    ],
)
def test_a_redirect_to_a_bad_place_is_refused(hub, tmp_path, to, words):
    hub.faults["config.json"] = [status(302, Location=to)] * 9
    with pytest.raises(HaloError, match=words):
        fetch(hub, tmp_path)


def test_redirects_end(hub, tmp_path):
    hub.faults["config.json"] = [status(302, Location="config.json")] * 99
    with pytest.raises(HaloError, match="redirects"):
        fetch(hub, tmp_path)
    assert len(hub.faults["config.json"]) == 93


def test_a_disk_that_is_too_small_is_said_before_the_weights(hub, tmp_path):
    with pytest.raises(HaloError, match="are needed"):
        fetch(hub, tmp_path, look=lambda _directory, _weights: 1 << 60)
    assert not hub.requests("model.safetensors") and hub.requests("config.json")


def test_a_model_that_cannot_be_used_is_refused_before_its_weights(hub, tmp_path):
    def look(directory, weights):
        assert (directory / "config.json").read_bytes() == FILES["config.json"]
        assert weights.path == "model.safetensors"
        raise HaloError("no such model")

    with pytest.raises(HaloError, match="no such model"):
        fetch(hub, tmp_path, look=look)
    assert not hub.requests("model.safetensors")


def test_two_pulls_do_not_write_into_one_directory(hub, tmp_path):
    def look(directory, weights):
        with pytest.raises(HaloError, match="Another pull"):
            fetch(hub, directory)
        return 0

    fetch(hub, tmp_path, look=look)
    assert_whole(tmp_path)


def test_a_directory_with_other_things_in_it_is_left_alone(hub, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(HaloError, match="no pull put there"):
        fetch(hub, tmp_path)
    fetch(hub, tmp_path / "m")
    with pytest.raises(HaloError, match="at main in it"):
        fetch(hub, tmp_path / "m", revision=COMMIT)
    (tmp_path / "m" / RECORD).write_text("{")
    with pytest.raises(HaloError, match="damaged"):
        fetch(hub, tmp_path / "m")


def test_where_nothing_listens_the_pull_ends_with_a_sentence(hub, tmp_path):
    hub.close()
    with pytest.raises(HaloError, match="broke off"):
        fetch(hub, tmp_path)


def test_the_token_comes_from_where_the_hubs_own_client_keeps_it(tmp_path):
    kept = tmp_path / "token"
    kept.write_text(f" {TOKEN}\n")
    nowhere = {"HF_HOME": str(tmp_path / "gone")}
    assert read_token(None, {"HF_TOKEN": TOKEN}) == TOKEN
    assert read_token(None, {"HF_HOME": str(tmp_path)}) == TOKEN
    assert read_token(None, {"HF_TOKEN_PATH": str(kept)}) == TOKEN
    assert read_token(kept, {"HF_TOKEN": "other"}) == TOKEN
    assert read_token(None, nowhere) == ""
    with pytest.raises(HaloError, match="cannot be read"):
        read_token(tmp_path / "gone", nowhere)
    for bad in ("two words", "line\nHost: evil", "ünicode", "x" * 5000):
        kept.write_text(bad)
        with pytest.raises(HaloError, match="holds no token") as info:
            read_token(kept, {})
        assert bad not in str(info.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@main",
        "a/b/c",
        "../x",
        "a/..",
        "a b",
        "/a",
        "a/",
        "-x/y",
        "a/b@",
        "a/b.git",
        "https://x/y",
        "a/b@\n",
    ],
)
def test_what_is_no_repository_is_refused(text):
    with pytest.raises(HaloError) as info:
        split_repo(text)
    assert info.value.exit_code == 3


def test_repositories_endpoints_and_addresses():
    assert split_repo("microsoft/bitnet-b1.58-2B-4T") == ("microsoft/bitnet-b1.58-2B-4T", "main")
    assert split_repo("gpt2@refs/pr/1") == ("gpt2", "refs/pr/1")
    assert endpoint_of(None, {}) == "https://huggingface.co"
    assert endpoint_of(None, {"HF_ENDPOINT": "http://localhost:1/"}) == "http://localhost:1"
    for bad in ("hub.example", "http://hub.example", "https://", "https://a b"):
        with pytest.raises(HaloError):
            endpoint_of(bad, {})
    assert origin("https://Hub.example/x") == ("https", "hub.example", 443)
    assert shown("https://u:p@h/x?token=1#y") == "https://h/x"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A CA, and a certificate of it for localhost: what a company's own hub has."""
    place = tmp_path_factory.mktemp("ca")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=place, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test CA")
    openssl("req", *key[:-2], "-keyout", "key.pem", "-out", "csr.pem", "-subj", "/CN=localhost")
    (place / "ext").write_text("subjectAltName=DNS:localhost")
    openssl("x509", "-req", "-in", "csr.pem", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-days", "2", "-extfile", "ext", "-out", "cert.pem")  # fmt: skip
    return place


def test_https_is_checked_against_the_store_of_the_system(authority, tmp_path):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "cert.pem", authority / "key.pem")
    hub = Hub(FILES, context)
    port = hub.server.server_address[1]
    trusting = ssl.create_default_context(cafile=authority / "ca.pem")

    def over(host: str, place: str, trust: ssl.SSLContext | None = None) -> Pulled:
        client = Client(f"https://{host}:{port}", stall=5.0, context=trust)
        return pull(
            client, Wish(REPO, "main"), tmp_path / place, Told(), Retry(tries=3, sleep=lambda _: None)
        )

    hub.faults["model.safetensors"] = [cut(5)]
    over("localhost", "m", trusting)
    assert_whole(tmp_path / "m")
    for host, trust in (("localhost", None), ("127.0.0.1", trusting)):
        with pytest.raises(HaloError, match="is not trusted"):
            over(host, "n", trust)
    hub.faults["config.json"] = [status(302, Location=f"http://127.0.0.1:{port}/x")]
    with pytest.raises(HaloError, match="without encryption"):
        over("localhost", "o", trusting)
    hub.close()


class Proxy:
    """A CONNECT proxy that leads every tunnel to one port, and keeps what it was told in clear."""

    def __init__(self, port: int) -> None:
        self.heard: list[bytes] = []
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    head += client.recv(1)
                self.heard.append(head)
                client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
                server = socket.create_connection(("127.0.0.1", self._port))
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._pipe, args=(one, other), daemon=True).start()

    def _pipe(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.close()


def test_a_proxy_carries_https_and_sees_no_token(authority, tmp_path, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "cert.pem", authority / "key.pem")
    hub = Hub(FILES, context)
    proxy = Proxy(hub.server.server_address[1])
    monkeypatch.setenv("https_proxy", f"http://me:pw@127.0.0.1:{proxy.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    trusting = ssl.create_default_context(cafile=authority / "ca.pem")
    client = Client("https://localhost", TOKEN, stall=5.0, context=trusting)
    pull(client, Wish(REPO, "main"), tmp_path, Told(), Retry(tries=1))
    hub.close()
    proxy.close()
    assert_whole(tmp_path)
    assert all(headers["Authorization"] == f"Bearer {TOKEN}" for _, headers in hub.seen)
    assert all(head.startswith(b"CONNECT localhost:443 HTTP/1.") for head in proxy.heard)
    assert all(b"Proxy-Authorization: Basic bWU6cHc=" in head for head in proxy.heard)
    assert TOKEN.encode() not in b"".join(proxy.heard)


def test_loopback_needs_no_proxy_and_a_dead_proxy_is_a_sentence(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://me:pw@127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    fetch(hub, tmp_path / "m")
    assert_whole(tmp_path / "m")
    client = Client("https://hub.example", stall=1.0)
    with pytest.raises(HaloError) as info:
        pull(client, Wish(REPO, "main"), tmp_path / "n", Told(), Retry(tries=1))
    assert "Connection refused" in str(info.value) and "pw" not in str(info.value)


def test_a_disk_that_takes_no_more_ends_the_pull_and_the_part_is_gone_on_with(hub, tmp_path):
    """What the kernel says of a full disk and of a limit comes the same way: a write that fails."""
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom engine.errors import HaloError\n"
        "from engine.fetch import Client\nfrom engine.pull import Wish, pull\n"
        "from tests.engine.test_pull import Told\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        f"try: pull(Client({hub.url!r}), Wish({REPO!r}, 'main'), Path(sys.argv[1]), Told())\n"
        "except HaloError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, str(tmp_path / "m")], cwd=ROOT, capture_output=True, text=True
    )
    assert "cannot go on" in done.stdout and "File too large" in done.stdout, done.stderr
    assert not (tmp_path / "m" / "model.safetensors").exists()
    fetch(hub, tmp_path / "m")
    assert_whole(tmp_path / "m")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["log", "terminal"])
def test_the_progress_is_for_a_person(hub, tmp_path, stream):
    hub.faults["model.safetensors"] = [cut(100)]
    with progress_for(stream) as progress:
        wish, retry = Wish(REPO, "main"), Retry(sleep=lambda _: None)
        pull(Client(hub.url), wish, tmp_path, progress, retry)
    said = stream.getvalue()
    assert "broke off after 100 of 30,000 bytes" in said
    if isinstance(stream, Terminal):
        assert "100%" in said or "30.0/30.0" in said or "kB" in said
    else:
        assert "30,0" in said and "\x1b" not in said


def test_nothing_of_the_suite_leaves_this_machine():
    assert not os.environ.get("HF_TOKEN"), "the suite must not be run with a real token"
