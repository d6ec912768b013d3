"""How many slots a server takes by itself: what the memory has room for, and never none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engine.backend import KV_FORMS, NativeModel
from engine.capacity import MOST_SLOTS, available_bytes, default_slots, slot_bytes
from engine.formats.prepared import prepare
from engine.model import Model


@pytest.mark.parametrize("kv", KV_FORMS)
def test_a_slot_takes_about_what_the_session_says(
    kv: str, tiny_model: Callable[..., Model], native_library: Path, tmp_path: Path
) -> None:
    prepare(tiny_model("wide", seed=1, max_seq_len=512), tmp_path / "model.halo")
    with (
        NativeModel.open(tmp_path / "model.halo", native_library) as model,
        model.session(4, 512, kv=kv) as session,
    ):
        taken = session.facts["kv_bytes"] / 4
        assert 0.9 * taken < slot_bytes(model.config, 512, kv) < 1.2 * taken


def test_slots_are_as_many_as_a_quarter_of_the_memory_holds(
    tiny_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HALO_KV", raising=False)
    config = tiny_model("wide").config
    one = slot_bytes(config, 4096)
    assert default_slots(config, 4096, 4 * 3 * one) == 3
    assert default_slots(config, 4096, 4 * 3 * one - 1) == 2
    assert default_slots(config, 4096, 1000 * one) == MOST_SLOTS
    assert default_slots(config, 4096, 0) == 1  # a system that says nothing still serves
    assert default_slots(replace(config, num_layers=1000), 10**6, 1 << 30) == 1
    monkeypatch.setenv("HALO_KV", "f32")
    assert default_slots(config, 4096, 4 * 3 * one) == 1


@pytest.mark.parametrize("text", ["", "MemFree: 5 kB\n", "MemAvailable:\n", "MemAvailable: much kB\n"])
def test_a_meminfo_without_an_answer_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(text)
    assert available_bytes(tmp_path / "meminfo") == 0
    assert available_bytes(tmp_path / "none") == 0


def test_the_memory_of_this_machine_is_read() -> None:
    assert available_bytes() > 1 << 20
