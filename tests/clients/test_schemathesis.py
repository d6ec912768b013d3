"""schemathesis against the OpenAPI document: no 5xx, no answer that breaks its schema, no bad body taken."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.engine.server_fixtures import EOT, ScriptedSession, byte_tokens, make_engine, running

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "response_headers_conformance,negative_data_rejection,unsupported_method,allow_header_conformance"
)


def cases(url: str, *more: str) -> int:
    """Run it against a live server, where it must find nothing; how many cases it made."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--no-color"]
    command += ["--checks", CHECKS, "--continue-on-failure", "--request-timeout", "120", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    found = re.search(r"([0-9,]+) generated", done.stdout)
    assert found, done.stdout
    return int(found[1].replace(",", ""))


def test_some_hundred_cases_find_nothing() -> None:
    """Over a script in the place of the weights; /ppl needs weights."""
    with running(make_engine(ScriptedSession([*byte_tokens(b"hello"), EOT]), context=128)) as server:
        more = ("--phases", "fuzzing", "--max-examples", "18", "--exclude-path-regex", "^/(ppl|api/v0)")
        assert cases(server.url, *more) >= 200


@pytest.mark.slow
def test_five_thousand_cases_find_nothing(live: str) -> None:
    """Over the native engine and the bundled model."""
    more = ("--phases", "examples,coverage,fuzzing", "--max-examples", "120")
    assert cases(live, *more) >= 5000
