"""halo bench: figures are what was measured, a peer that misbehaves ends as a sentence, nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engine import bench_synthetic
from engine.bench import (
    OURS,
    Case,
    Readings,
    Settings,
    _check_guard,
    fitted,
    machine_facts,
    ratio,
    read_bytes,
)
from engine.bench_child import fingerprint, measure_bandwidth, peak_memory, prompt
from engine.bench_command import bar, markdown, plain
from engine.bench_peers import (
    Finished,
    Peer,
    parse_peer,
    read_batched,
    read_bench,
    run_batched,
    run_bench,
    run_child,
)
from engine.errors import HaloError
from engine.formats.prepared import prepare

ROOT = Path(__file__).parents[2]

# As printed by bitnet.cpp's llama-bench (microsoft/BitNet of January 2026) for
# `-m i2_s-f16.gguf -t 1 -p 16 -n 8 -r 1 -o json`, a Zen 4 EPYC; shortened only in what is not read.
BENCH_JSON = """[
  {
    "build_commit": "1876a3e", "build_number": 0, "blas": false, "cpu_info": "AMD EPYC",
    "model_filename": "i2_s-f16.gguf", "model_type": "bitnet-b1.58 ?B I2_S - 2 bpw ternary",
    "model_size": 1355200, "model_n_params": 1706752, "n_batch": 2048, "n_ubatch": 512, "n_threads": 1,
    "use_mmap": true, "embeddings": false,
    "n_prompt": 16,
    "n_gen": 0,
    "test_time": "2026-11-23T12:25:55Z",
    "avg_ns": 420586,
    "stddev_ns": 0,
    "avg_ts": 38042.160224,
    "stddev_ts": 0.000000,
    "samples_ns": [ 420586 ],
    "samples_ts": [ 38042.2 ]
  },
  {
    "build_commit": "1876a3e", "build_number": 0, "blas": false, "cpu_info": "AMD EPYC",
    "model_filename": "i2_s-f16.gguf", "model_type": "bitnet-b1.58 ?B I2_S - 2 bpw ternary",
    "model_size": 1355200, "model_n_params": 1706752, "n_batch": 2048, "n_ubatch": 512, "n_threads": 1,
    "use_mmap": true, "embeddings": false,
    "n_prompt": 0,
    "n_gen": 8,
    "test_time": "2026-11-23T12:25:55Z",
    "avg_ns": 889854,
    "stddev_ns": 0,
    "avg_ts": 8990.238848,
    "stddev_ts": 0.000000,
    "samples_ns": [ 889854 ],
    "samples_ts": [ 8990.24 ]
  }
]
"""
# As printed by the llama-batched-bench beside it for `-t 1 -tb 2 -c 256 -npl 1 -npp 16,64 -ntg 8`.
BATCHED_TABLE = """
main: n_kv_max = 256, n_batch = 2048, n_ubatch = 512, flash_attn = 0, n_threads = 1, n_threads_batch = 2

|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|    16 |      8 |    1 |     24 |    0.000 | 43243.24 |    0.001 |  8705.11 |    0.001 | 18619.08 |
|    64 |      8 |    1 |     72 |   15.128 |     4.23 |    0.001 |  7905.14 |   15.129 |     4.76 |

"""
# A llama-bench that prints such records for what it is asked, and a llama-batched-bench that does with rows.
BENCH_PROGRAM = """
import json, sys
words = sys.argv[1:]
asked = dict(zip(words, words[1:]))
print("warning: asserts enabled, performance may be affected")
prompt, tokens = int(asked["-p"]), int(asked["-n"])
base = {"build_commit": "1876a3e", "build_number": 0, "model_type": "bitnet-b1.58"}
rows = [dict(base, n_prompt=prompt, n_gen=0, avg_ts=100.5)]
rows += [dict(base, n_prompt=0, n_gen=tokens, avg_ts=20.25)]
print(json.dumps([row for row in rows if row["n_prompt"] or row["n_gen"]]))
"""
BATCHED_PROGRAM = """
import sys
words = sys.argv[1:]
asked = dict(zip(words, words[1:]))
print("|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |")
for context in asked["-npp"].split(","):
    tokens, batch = asked["-ntg"], int(asked["-npl"])
    print(f"|{context} | {tokens} | {batch} | 24 | 0.1 | 43.2 | 0.2 | {30 * batch}.5 | 1.0 | 1.0 |")
"""


def program(folder: Path, name: str, body: str) -> Path:
    """An executable of that name that runs `body`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def peer(tmp_path: Path, body: str, name: str = "other") -> Peer:
    """A peer whose llama-bench runs `body`."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    return Peer(name, (str(program(tmp_path / name, "llama-bench", body)),), model)


def bench(tmp_path: Path, library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`halo bench --synthetic tiny` with the least of work, in a home of its own."""
    return subprocess.run(
        [*command(), *arguments],
        cwd=ROOT,
        env=environment(tmp_path, library),
        capture_output=True,
        text=True,
        timeout=120,
    )


def command() -> list[str]:
    return [
        sys.executable, "-m", "provision.cli", "bench", "--synthetic", "tiny", "--prompt", "16",
        "--tokens", "4", "--context", "8,16", "--threads", "1", "--batch", "1,2", "--rounds", "2",
    ]  # fmt: skip


def environment(tmp_path: Path, library: Path) -> dict[str, str]:
    (tmp_path / "home").mkdir(exist_ok=True)
    temporary = tmp_path / "tmp"
    temporary.mkdir(exist_ok=True)
    return {
        **os.environ,
        "HOME": str(tmp_path / "home"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "TMPDIR": str(temporary),
        "HALO_LIB_DIR": str(library.parent),
    }


def test_the_whole_command_with_two_peers(tmp_path, native_library):
    """One file says it all: who ran, how fast, of how many bytes, in what memory; and nothing lies about."""
    batched, plain_one = tmp_path / "batched", tmp_path / "plain"
    program(batched, "llama-batched-bench", BATCHED_PROGRAM)
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    done = bench(
        tmp_path, native_library, "--json",
        "--peer", f"first=env FAST=1 {program(batched, 'llama-bench', BENCH_PROGRAM)}",
        "--peer", f"second={program(plain_one, 'llama-bench', BENCH_PROGRAM)}",
        "--peer-model", f"first={model}", "--peer-model", f"second={model}", "--peer-args", "second=-fa 1",
    )  # fmt: skip
    assert done.returncode in (0, 2), done.stderr
    result = json.loads(done.stdout)
    assert all("busy" in warning for warning in result["warnings"])
    lines = {(line["kind"], line["context"], line["batch"]): line for line in result["lines"]}
    assert sorted(lines) == [("decode", 8, 1), ("decode", 8, 2), ("decode", 16, 1), ("prefill", 16, 1)]
    deep = lines["decode", 16, 1]
    assert sorted(deep["peers"]) == ["first"], "llama-bench alone cannot decode at a context"
    assert deep["peers"]["first"]["median"] == 30.5
    assert deep["peers"]["first"]["ratio"] == pytest.approx(np.median(deep[OURS]["rounds"]) / 30.5)
    assert lines["decode", 8, 1]["peers"]["second"]["median"] == 20.25
    assert lines["decode", 8, 2]["peers"]["first"]["median"] == 60.5
    assert (
        lines["decode", 8, 2]["bytes_a_token"]
        < lines["decode", 8, 1]["bytes_a_token"]
        < deep["bytes_a_token"]
    )
    assert len(deep[OURS]["rounds"]) == 2
    assert result["peers"]["first"]["command"][:2] == ["env", "FAST=1"]
    assert result["peers"]["second"]["arguments"] == ["-fa", "1"]
    assert result["memory"][OURS]["peak_bytes"] > result["model"]["file_bytes"]
    assert result["memory"]["first"]["peak_bytes"] > 0
    assert len(result["greedy_ids"]) == 4
    assert not list((tmp_path / "tmp").iterdir()) and not list((tmp_path / "home").iterdir())
    again = bench(tmp_path, native_library, "--json")
    assert "making" in done.stderr and "making" not in again.stderr, "the model is made once"
    assert json.loads(again.stdout)["greedy_ids"] == result["greedy_ids"]


def test_a_peer_that_fails_half_way_is_left_out_and_the_rest_is_shown(tmp_path, native_library):
    """Forty minutes of measurements must not be lost because one engine crashes in the last round."""
    body = f"""
import os, pathlib
count = pathlib.Path({str(tmp_path / "count")!r})
runs = int(count.read_text()) if count.exists() else 0
count.write_text(str(runs + 1))
if runs >= 1:
    print("ggml_abort: out of luck", file=__import__("sys").stderr)
    os.abort()
{BENCH_PROGRAM}"""
    one = peer(tmp_path, body, "frail")
    arguments = ["--peer", f"frail={one.command[0]}", "--peer-model", f"frail={one.model}"]
    done = bench(tmp_path, native_library, *arguments)
    assert done.returncode == 2, done.stderr
    assert (
        "frail left out from round 2 on: frail did not give figures: it was killed by signal 6" in done.stderr
    )
    assert "ggml_abort: out of luck" in done.stderr
    row = next(line for line in done.stdout.splitlines() if "decode at 8 " in line)
    assert "20.2" in row and row.endswith("x"), "what the first round gave is shown"


def test_ctrl_c_leaves_no_process_and_no_file(tmp_path, native_library):
    """A benchmark that goes on after Ctrl-C spoils whatever is measured next."""
    mark = tmp_path / "pids"
    one = peer(
        tmp_path, f"import os, time\nopen({str(mark)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    )
    arguments = ["--peer", f"other={one.command[0]}", "--peer-model", f"other={one.model}"]
    process = subprocess.Popen(
        [*command(), *arguments], cwd=ROOT, env=environment(tmp_path, native_library),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peer", "x=/nowhere/llama-bench", "--peer-model", "x=/dev/null"], "cannot be executed"),
        (["--peer", "x=true"], "has no model"),
        (["--peer", "x=true", "--peer-model", "x=/nowhere.gguf"], "is no file"),
        (["--peer", "nameless"], "not NAME=EXECUTABLE"),
        (["--peer", "x='", "--peer-model", "x=a"], "open quote"),
        (["--peer-model", "y=model.gguf"], "There is no --peer y"),
        (["--peer-args", "nothing"], "--peer-args wants NAME=VALUE"),
        (["--prefix", "'"], "open quote"),
        (["--threads", "0"], "not a number from 1"),
        (["--context", "1,x"], "not a number from 1"),
        (["--prompt", "300"], "no room for a prompt of 300"),
        (["--tokens", "256"], "no room"),
        (["--json", "--markdown"], "not allowed with"),
    ],
)
def test_what_is_asked_wrongly_is_refused_before_anything_runs(tmp_path, native_library, arguments, said):
    """A wrong path in the fourth flag must not show after the third peer has run for ten minutes."""
    done = bench(tmp_path, native_library, *arguments)
    assert done.returncode == 3, done.stderr
    assert said in done.stderr and "hint:" in done.stderr and "Traceback" not in done.stderr
    assert "round" not in done.stderr


def test_the_tables_of_real_programs_are_read(tmp_path):
    """The golden output above, from a program, through a child process."""
    one = peer(tmp_path, f"print({BENCH_JSON!r})")
    program(
        Path(one.command[0]).parent,
        "llama-batched-bench",
        f"import sys; print({BATCHED_TABLE!r}, file=sys.stderr)",
    )
    rates = run_bench(one, threads=1, prompt=16, tokens=8, timeout=20)
    assert (rates.prefill, rates.decode) == (38042.160224, 8990.238848)
    assert rates.facts["build_commit"] == "1876a3e" and rates.peak_bytes > 1 << 20
    decoded = run_batched(one, threads=1, contexts=[16, 64], tokens=8, batch=1, timeout=20)
    assert decoded == {16: 8705.11, 64: 7905.14}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("print('all good')", "its output is not llama-bench's JSON"),
        ("print('[[1, 2]]')", "its output is not llama-bench's JSON"),
        ("print('[' * 100000 + ']')", "its output is not llama-bench's JSON"),
        ("print('[{}]')", "a record lacks n_prompt, n_gen or avg_ts"),
        ('print(\'[{"n_prompt": 16, "n_gen": 0, "avg_ts": 0}]\')', "a record lacks"),
        ('print(\'[{"n_prompt": 16, "n_gen": 0, "avg_ts": NaN}]\')', "a record lacks"),
        ("print('[{\"n_prompt\": 16, \"n_gen\": 0, \"avg_ts\": 1' + '0' * 400 + '}]')", "a record lacks"),
        ('print(\'[{"n_prompt": 16, "n_gen": 0, "avg_ts": 5.0}]\')', "it left out what it was asked for"),
        ("import sys; sys.exit('error: unable to load model')", "exit code 1 (error: unable to load model)"),
        ("import os; os.kill(os.getpid(), 11)", "it was killed by signal 11"),
    ],
)
def test_a_peer_that_prints_no_figures_is_a_sentence(tmp_path, body, said):
    """Its own last words and the command to run it alone; never a figure out of thin air."""
    with pytest.raises(HaloError, match=re.escape(said)) as caught:
        run_bench(peer(tmp_path, body), threads=1, prompt=16, tokens=8, timeout=20)
    assert "llama-bench -m" in caught.value.hint


def test_a_peer_that_hangs_is_ended_with_its_children(tmp_path):
    """Also one that starts helpers, and one that ignores a polite signal."""
    mark = tmp_path / "pid"
    body = f"""
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    open({str(mark)!r}, 'w').write(str(os.getpid()))
time.sleep(600)
"""
    with pytest.raises(HaloError, match="has not ended after 1 seconds"):
        run_bench(peer(tmp_path, body), threads=1, prompt=16, tokens=8, timeout=1)
    end = time.monotonic() + 10
    while Path(f"/proc/{mark.read_text()}").exists() and time.monotonic() < end:
        time.sleep(0.02)  # it is killed; whoever inherited it has to reap it
    assert not Path(f"/proc/{mark.read_text()}").exists()


def test_a_child_that_prints_without_end_does_not_fill_memory_or_disk(tmp_path):
    """Of `yes`, a few megabytes are enough."""
    with pytest.raises(HaloError, match="prints without end"):
        run_child(["yes"], timeout=60)
    with pytest.raises(HaloError, match="cannot be started"):
        run_child([str(tmp_path / "nothing")], timeout=5)


def test_damaged_output_is_refused_or_read_never_a_traceback():
    """Whatever a fork prints."""
    rng = random.Random(5)
    read = 0
    for _ in range(3000):
        text = bytearray((BENCH_JSON if rng.random() < 0.6 else BATCHED_TABLE).encode())
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(text))
            choice = rng.random()
            if choice < 0.5:
                text[at] = rng.choice(b'0123456789.|-{}[]",:eEnN \n\xff')
            elif choice < 0.8:
                del text[at : at + rng.randrange(1, 40)]
            else:
                text[at:at] = text[rng.randrange(len(text)) :][: rng.randrange(1, 60)]
        done = Finished(text.decode("utf-8", "replace"), "", 0, 1)
        try:
            rates = read_bench("x", ["x"], done)
            values = [rate for rate in (rates.prefill, rates.decode) if rate is not None]
        except HaloError:
            values = []
        with contextlib.suppress(HaloError):
            values += read_batched("x", ["x"], done, [16, 64], 8, 1).values()
        assert all(0 < value < float("inf") for value in values)
        read += len(values)
    assert read > 100


def test_runs_that_decode_different_tokens_end_the_bench():
    """An engine that is fast and wrong, or memory that flips bits, must not get into a table."""
    readings = Readings()
    _check_guard(readings, {"decode 8": fingerprint([1, 2]), "decode 16": fingerprint([3])})
    _check_guard(readings, {"decode 8": fingerprint([1, 2])})
    with pytest.raises(HaloError, match=r"\(decode 16\) decoded different tokens"):
        _check_guard(readings, {"decode 16": fingerprint([4])})


def test_the_ratio_is_of_rounds_not_of_medians():
    """On a shared machine that halves its speed in one round, the ratio of medians lies."""
    ours, theirs = {0: 20.0, 1: 10.0, 2: 21.0}, {0: 10.0, 1: 5.0, 2: 30.0}
    assert ratio(ours, theirs) == 2.0
    assert ratio(ours, {2: 7.0}) == 3.0, "only the rounds that both ran"


def test_contexts_fit_the_model():
    """4096 of a model with 4096 positions leaves no room to decode: the last ones that do are taken."""
    config = bench_synthetic.SHAPES["2b4t"]
    assert fitted(Settings(Path("m")), config).contexts == (128, 1024, 4032)
    assert fitted(Settings(Path("m"), contexts=(4096, 5000)), config).contexts == (4032,)


def test_the_bytes_of_a_token_are_those_of_the_file(tmp_path, tiny_model):
    """Percent of the bandwidth means nothing if the bytes are wished for."""
    model = tiny_model("wide")
    prepare(model, tmp_path / "m.halo")
    found = read_bytes(tmp_path / "m.halo")
    weights = sum(rows * cols for _, rows, cols in model.config.projections()) * model.config.num_layers
    assert weights / 5 <= found["ternary"] <= weights / 4 * 1.3
    assert found["head"] >= model.config.vocab_size * model.config.hidden_size // 2
    assert found["total"] == found["ternary"] + found["head"] + found["rest"]
    assert found["total"] < (tmp_path / "m.halo").stat().st_size


def test_synthetic_models_are_the_same_at_every_call_and_exact_in_16_bits():
    """Peers get the same tensors in their formats, of which some hold a scale as float16."""
    one, two = (bench_synthetic.stream("tiny") for _ in range(2))
    for first, second in zip(one.embedding(), two.embedding(), strict=True):
        assert (first == second).all() and not (first.view(np.uint32) & 0xFFFF).any()
    assert sum(len(block) for block in one.embedding()) == one.config.vocab_size
    for first, second in zip(one.layers(), two.layers(), strict=True):
        assert (first.down.packed == second.down.packed).all()
        assert len(set(first.down.scales.tolist())) == 1
        assert (first.down.scales.astype(np.float16).astype(np.float32) == first.down.scales).all()
        codes = np.stack([first.down.packed >> shift & 3 for shift in (0, 2, 4, 6)])
        assert set(np.unique(codes)) == {0, 1, 2}


def test_a_synthetic_model_is_refused_without_room_and_never_half_there(tmp_path, monkeypatch):
    """A cache on a full disk, and a Ctrl-C while the model is made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    usage = bench_synthetic.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(bench_synthetic.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
        with pytest.raises(HaloError, match=r"takes about 1\d\d\d MiB; .* has 1 MiB free"):
            bench_synthetic.synthetic_model("2b4t", lambda _: None)

    def interrupt(text: str) -> None:
        if text.startswith("layer 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench_synthetic.synthetic_model("tiny", interrupt)
    assert not list((tmp_path / "halo" / "bench").iterdir())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(HaloError, match="cannot be made"):
        bench_synthetic.synthetic_model("tiny", lambda _: None)


def test_a_peer_given_by_name_is_found_on_the_path(tmp_path, monkeypatch):
    """Children run in a directory of their own, so a relative path must be made to hold."""
    one = peer(tmp_path, "")
    monkeypatch.chdir(Path(one.command[0]).parent)
    found = parse_peer("x=./llama-bench", {"x": "../model.gguf"}, {}, {})
    assert Path(found.command[-1]).is_absolute() and found.model.is_absolute()
    assert found.batched is None


def test_the_machine_is_measured():
    """Figures without the machine that gave them compare with nothing."""
    assert measure_bandwidth(2, size=4 << 20, passes=2)["bytes_per_second"] > 1e6
    assert peak_memory() > 1 << 20
    facts = machine_facts()
    assert facts["cpus"] >= 1 and facts["cpu"]
    assert prompt(100, 8) == prompt(100, 16)[:8] != prompt(100, 8, 1)


def test_the_report_has_a_row_for_each_measurement_and_bars_only_where_asked():
    """A pipe gets no bars; a document gets a table that renders."""
    case = {"threads": 2, "batch": 1, OURS: {"median": 50.0}, "bytes_a_token": 8.5e8, "bandwidth_share": 0.8}
    other = {"median": 25.0, "ratio": 2.0}
    result = {
        "machine": {"cpu": "A CPU", "cpus": 2},
        "model": {
            "name": "m",
            "file_bytes": 1e9,
            "bytes_a_token": {"total": 8e8, "ternary": 5e8, "head": 3e8},
        },
        "engine": {"isa": "avx512"},
        "bandwidth": {"2": 5.0e10},
        "kv_bytes_a_position": 76800.0,
        "settings": {"rounds": 5},
        "lines": [
            {**case, "kind": "prefill", "context": 512, "peers": {}},
            {**case, "kind": "decode", "context": 128, "peers": {"other": other}},
        ],
        "memory": {
            OURS: {"peak_bytes": 9e8, "interpreter_bytes": 3e7, "kv_bytes": 1e7},
            "other": {"peak_bytes": 1e9},
        },
        "peers": {
            "other": {
                "sha256": "ab" * 32, "model": "/m.gguf", "model_bytes": 9e8, "arguments": ["-fa", "0"],
                "batched_arguments": [], "decode_by": "llama-bench", "build_commit": "abc", "build_number": 7,
            }
        },
    }  # fmt: skip
    text = plain(result, bars=False)
    assert any("decode at 128" in row and "2.00x" in row and "80%" in row for row in text)
    assert "█" not in "\n".join(text) and "█" in "\n".join(plain(result, bars=True))
    rows = [row for row in markdown(result) if row.startswith("|")]
    assert len(rows) == 4 and len({row.count("|") for row in rows}) == 1
    assert "build abc (7)" in "\n".join(text)
    assert [len(bar(share / 10)) for share in range(11)] == sorted(
        len(bar(share / 10)) for share in range(11)
    )
    assert bar(0) == "" and len(bar(1)) == len(bar(7))


def test_a_case_is_a_key():
    """Readings are kept by case."""
    readings = Readings()
    readings.add(Case("decode", 2, 128), OURS, 0, 1.0)
    readings.add(Case("decode", 2, 128, 1), "other", 0, 2.0)
    assert len(readings.rates) == 1
