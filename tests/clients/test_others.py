"""litellm, DSPy and lm-evaluation-harness, unmodified, in an environment of their own, against a live server.

They run with HALO_TEST_CLIENTS=1 (or HALO_TEST_SLOW=1): their environment is some 800 MB.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from engine.backend import NativeModel
from engine.generate import Engine
from engine.ppl import surprisal
from engine.sampling import SamplingParams
from engine.tokenizer import load_tokenizer

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    not (os.environ.get("HALO_TEST_CLIENTS") or os.environ.get("HALO_TEST_SLOW")),
    reason="installs 800 MB of clients; run with HALO_TEST_CLIENTS=1",
)


def said_by(*command: str | Path, folder: Path) -> str:
    """What a client's process prints; it has no network but the server, and a home of its own."""
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "HOME": str(folder)}
    env = {"PATH": os.environ["PATH"], "OPENAI_API_KEY": "none", **offline}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=env, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(("script", "checks"), [("litellm_calls", 11), ("dspy_calls", 2)])
def test_the_calls_of(script: str, checks: int, live: str, others_python: Path, tmp_path: Path) -> None:
    said = said_by(others_python, HERE / "others" / f"{script}.py", live, "halo-demo", folder=tmp_path)
    assert said.count("ok check_") == checks, said


# --- lm-evaluation-harness


def documents() -> list[dict[str, str]]:
    lines = (HERE / "lm_eval" / "data.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def evaluated(
    python: Path, folder: Path, model: str, arguments: str, tasks: str, *more: str
) -> dict[str, dict[str, float]]:
    """The results that lm-eval prints, by task; the tasks read their documents from a file."""
    place = folder / "tasks"
    shutil.copytree(HERE / "lm_eval", place)
    for task in place.glob("*.yaml"):
        files = json.dumps({"test": str(place / "data.jsonl")})
        task.write_text(f"{task.read_text('utf-8')}dataset_kwargs:\n  data_files: {files}\n")
    out = folder / "out"
    command = [python, "-m", "lm_eval", "run", "--model", model, "--model_args", arguments, "--tasks", tasks]
    said_by(*command, "--include_path", place, "--output_path", out, *more, folder=folder)
    (found,) = out.rglob("results_*.json")
    results: dict[str, dict[str, float]] = json.loads(found.read_text())["results"]
    return results


def test_lm_eval_scores_what_the_model_itself_says(
    live: str, others_python: Path, demo: Path, native_library: Path, tmp_path: Path
) -> None:
    """Its sums come through echo and log probabilities over HTTP; ours from the logits, by the definition."""
    arguments = f"model=halo-demo,base_url={live}/v1/completions,num_concurrent=2,max_retries=1"
    results = evaluated(
        others_python, tmp_path, "local-completions", arguments, "halo_continuation,halo_choice"
    )
    sums = {name: [] for name in ("rest", "other")}
    greedy = []
    encode = load_tokenizer(demo).encode
    model = NativeModel.open(demo / "model.halo", native_library)
    with model, model.session(context=64) as session:
        for document in documents():
            for name in sums:
                context, whole = encode(document["text"]), encode(document["text"] + document[name])
                n = len(whole) - 1
                rows = session.run(whole[:-1], [0] * n, range(n), [True] * n)
                scored = range(len(context) - 1, n)
                sums[name].append(-math.fsum(surprisal(rows[i], whole[i + 1]) for i in scored))
                if name == "rest":
                    greedy.append(all(int(rows[i].argmax()) == whole[i + 1] for i in scored))
    mean = math.fsum(sums["rest"]) / len(sums["rest"])
    found = results["halo_continuation"]
    assert found["perplexity,none"] == pytest.approx(math.exp(-mean), rel=1e-5)
    assert found["acc,none"] == pytest.approx(sum(greedy) / len(greedy))
    right = sum(a > b for a, b in zip(sums["rest"], sums["other"], strict=True))
    assert results["halo_choice"]["acc,none"] == pytest.approx(right / len(documents()))
    assert right > len(documents()) / 2, "the demo model knows simple sentences"


@pytest.mark.parametrize("model", ["local-completions", "local-chat-completions"])
def test_lm_eval_generates(
    model: str, live: str, others_python: Path, demo: Path, native_library: Path, tmp_path: Path
) -> None:
    chat = model == "local-chat-completions"
    path = "chat/completions" if chat else "completions"
    arguments = f"model=halo-demo,base_url={live}/v1/{path},num_concurrent=2,max_retries=1"
    more = ["--apply_chat_template"] if chat else []
    results = evaluated(others_python, tmp_path, model, arguments, "halo_generate", *more)
    found = results["halo_generate"]["exact_match,none"]
    if chat:
        assert 0.0 <= found <= 1.0
        return
    params = SamplingParams(max_tokens=24, stop=(".",))
    with Engine.open(demo, native_library) as engine:
        encode = engine.tokenizer.encode
        said = [engine.complete(encode(document["text"]), params).text for document in documents()]
    same = [a.lower() == b["rest"].lower() for a, b in zip(said, documents(), strict=True)]
    assert found == pytest.approx(sum(same) / len(same))
