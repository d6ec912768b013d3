"""Finding the model: whoever starts halo in the wrong place is told what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import HaloError
from engine.locate import MODEL_FILES, SOURCE_GENERATION, locate, read_card


def make_model(path: Path, **card) -> Path:
    path.mkdir(parents=True)
    for name in MODEL_FILES:
        (path / name).write_bytes(b"")
    body = {"schema": 1, "name": "halo-demo", "chat_template": "bitnet", "context": 1024, **card}
    (path / "model.json").write_text(json.dumps(body))
    return path


def make_generation(path: Path) -> Path:
    make_model(path / "store")
    (path / "models").mkdir()
    (path / "models" / "default").symlink_to(path / "store")
    (path / "manifest.json").write_text(json.dumps({"id": "0.1.0-abc", "version": "0.1.0"}))
    return path


def test_a_generation_gives_its_model_and_identity(tmp_path):
    generation = make_generation(tmp_path / "g")
    home = locate(None, {"HALO_GENERATION_DIR": str(generation)})
    assert home.model_dir == generation / "models" / "default"
    assert (home.generation, home.version, home.generation_dir) == ("0.1.0-abc", "0.1.0", generation)


def test_the_flag_wins_over_the_environment_and_that_over_the_generation(tmp_path):
    flag, named = make_model(tmp_path / "flag"), make_model(tmp_path / "named")
    env = {"HALO_MODEL": str(named), "HALO_GENERATION_DIR": str(make_generation(tmp_path / "g"))}
    assert locate(flag, env).model_dir == flag
    assert locate(None, env).model_dir == named
    assert locate(None, {**env, "HALO_MODEL": ""}).model_dir.name == "default"


def test_a_source_checkout_has_no_generation(tmp_path):
    home = locate(make_model(tmp_path / "m"), {})
    assert home.generation == SOURCE_GENERATION and home.generation_dir is None and home.version[0].isdigit()


def test_nothing_at_all_is_a_hint_to_install():
    with pytest.raises(HaloError) as info:
        locate(None, {})
    assert "install.py" in info.value.hint and "HALO_MODEL" in info.value.message


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_missing_file_is_named(tmp_path, name):
    (make_model(tmp_path / "m") / name).unlink()
    with pytest.raises(HaloError, match=name):
        locate(tmp_path / "m", {})


def test_an_empty_directory_a_file_and_a_dangling_link_are_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("empty", "file", "link"):
        with pytest.raises(HaloError, match="There is no model"):
            locate(tmp_path / name, {})


@pytest.mark.parametrize("manifest", [None, "{", "[]"])
def test_a_half_made_generation_is_refused(tmp_path, manifest):
    generation = make_generation(tmp_path / "g")
    (generation / "manifest.json").unlink()
    if manifest is not None:
        (generation / "manifest.json").write_text(manifest)
    with pytest.raises(HaloError) as info:
        locate(None, {"HALO_GENERATION_DIR": str(generation)})
    assert "halo install" in info.value.hint


def test_a_card_is_read(tmp_path):
    card = read_card(make_model(tmp_path / "m", chat_template="halo-demo"))
    assert (card.name, card.chat_template, card.context) == ("halo-demo", "halo-demo", 1024)


@pytest.mark.parametrize(
    "change",
    [{"name": ""}, {"name": 3}, {"chat_template": "llama"}, {"chat_template": None}, {"context": "1k"},
     {"context": True}, {"context": 0}],
)  # fmt: skip
def test_a_card_that_describes_nothing_is_refused(tmp_path, change):
    with pytest.raises(HaloError, match=r"model\.json"):
        read_card(make_model(tmp_path / "m", **change))


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_a_card_that_is_no_json_object_is_refused(tmp_path, content):
    (make_model(tmp_path / "m") / "model.json").write_bytes(content)
    with pytest.raises(HaloError):
        read_card(tmp_path / "m")
