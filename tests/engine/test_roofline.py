"""What the GPU engine is expected to take, against counts made another way; the report for an issue."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.bench_report import add_expectations, chip_of, issue_text, shape_of
from engine.bench_synthetic import SHAPES
from engine.formats.prepared import prepare
from engine.roofline import GFX1151, Chip, Kernel, Packing, Shape, decode_step, prefill_steps
from tests.engine.test_bench import ROOT, bench

BIG = Shape(SHAPES["2b4t"])
NO_LAUNCHES = replace(GFX1151, launch=0.0)
WEIGHTS = 30 * (3840 * 2560 + 2560 * 2560 + 13824 * 2560 + 2560 * 6912)  # ternary ones of 2B-4T
GPU_FACTS = {
    "backend": "hip", "backend_reason": "", "device": "AMD Radeon 8060S", "arch": "gfx1151", "isa": "graph",
    "packing": "base_three", "kv": "int8", "slots": 1, "context": 4096, "kv_bytes": 4096 * 39600,
}  # fmt: skip


@pytest.mark.parametrize(("packing", "bits"), [("two_bits", 2.0), ("base_three", 1.6)])
def test_ternary_bytes_are_the_packings_bits(packing: Packing, bits: float) -> None:
    """Filled-up columns (6912 is no multiple of 256 or 320) and the rows' scales cost little."""
    size = Shape(SHAPES["2b4t"], packing).bytes_a_token()["ternary"]
    assert WEIGHTS * bits / 8 < size < WEIGHTS * bits / 8 * 1.015


def test_odd_shapes_are_filled_up_to_whole_tiles() -> None:
    assert Shape(BIG.config, "two_bits").matrix_bytes(9, 257) == 2 * 2 * 512 + 4 * 9
    assert Shape(BIG.config, "base_three").matrix_bytes(1, 1) == 512 + 4
    assert Shape(replace(BIG.config, vocab_size=17)).head_bytes() == 4 * 10 * 1536 + 16 * 32


def test_the_coarse_head_is_six_bits_a_weight_and_sixteen_bytes_a_row() -> None:
    assert BIG.head_bytes() == 128256 * 2560 * 6 // 8 + 16 * 128256


@pytest.mark.parametrize(("kv", "bits", "scales"), [("f16", 16, 0), ("int8", 8, 4), ("rotor3", 3, 4)])
def test_a_position_of_the_cache_is_keys_and_values_of_five_heads(kv: str, bits: int, scales: int) -> None:
    assert Shape(BIG.config, kv=kv).kv_bytes() == 2 * 5 * (128 * bits / 8 + scales)


def test_a_decode_step_has_the_launches_that_the_session_makes() -> None:
    """session.cpp: embed; qkv, attention, o, gate and up, down a layer; coarse and exact head; the result."""
    assert decode_step(BIG, 128).launches == 1 + 5 * 30 + 3
    assert decode_step(BIG, 128, 8).launches == 1 + 9 * 30 + 4


def test_a_step_takes_its_bytes_by_the_bandwidth_and_its_launches() -> None:
    step = decode_step(BIG, 128)
    assert step.seconds(NO_LAUNCHES) == pytest.approx(step.bytes / 212e9)
    assert step.seconds(GFX1151) - step.seconds(NO_LAUNCHES) == pytest.approx(154 * 3.85e-6)
    assert step.rate(Chip("twice", 424e9)) == pytest.approx(2 * step.rate(NO_LAUNCHES))
    weights = BIG.bytes_a_token()["total"]
    assert weights < step.bytes < 1.03 * weights, (
        "activations and 128 positions are little beside the weights"
    )


def test_what_computes_longer_than_it_moves_is_bound_by_the_rate() -> None:
    kernel = Kernel("product", 2, 1e6, 1e12)
    assert kernel.seconds(Chip("any", 1e9, 0.0, 1e12)) == pytest.approx(2.0)
    assert kernel.seconds(Chip("any", 1e9)) == pytest.approx(2e-3), "no known rate, no bound"


def test_more_context_costs_the_cache_and_nothing_else() -> None:
    short, long = decode_step(BIG, 1023), decode_step(BIG, 4095)
    blocks = 30 * 2 * 4 * (16 - 4) * 2560  # partial sums, written and read
    assert long.bytes - short.bytes == pytest.approx(30 * 3072 * BIG.kv_bytes() + blocks)
    assert long.seconds(GFX1151) < 1.25 * decode_step(BIG, 128).seconds(GFX1151)


def test_sequences_share_the_weights() -> None:
    one, eight = decode_step(BIG, 128), decode_step(BIG, 128, 8)
    assert eight.tokens == 8 and eight.bytes < 1.2 * one.bytes
    assert 4 < eight.rate(GFX1151) / one.rate(GFX1151) < 8


@pytest.mark.parametrize("tokens", [17, 512, 1024, 1030, 4096])
def test_prefill_computes_each_weight_for_each_token(tokens: int) -> None:
    step = prefill_steps(BIG, tokens)
    products = sum(
        k.launches * k.operations for k in step.kernels if k.name in ("qkv", "o", "gate and up", "down")
    )
    assert products == pytest.approx(2.0 * WEIGHTS * tokens)
    if tokens % 1024 == 0 or tokens <= 1024:  # the last few of 1,030 take the decode kernels
        seen = sum(k.launches * k.operations for k in step.kernels if k.name == "attention")
        assert seen == pytest.approx(4 * 2560 * 30 * tokens * (tokens + 1) / 2)


def test_prefill_is_bound_by_the_products_and_below_the_chips_rate() -> None:
    step = prefill_steps(BIG, 512)
    assert 0.6 * 43.2e12 < 2.0 * WEIGHTS * 512 / step.seconds(GFX1151) < 43.2e12


def test_the_bandwidth_that_is_stated_wins_and_an_unknown_chip_has_none() -> None:
    assert chip_of({"arch": "gfx1151"}) == GFX1151
    assert chip_of({"arch": "gfx1151"}, 100e9) == replace(GFX1151, bandwidth=100e9)
    assert chip_of({"arch": "sm_90"}).bandwidth == 0.0
    assert chip_of({}).bandwidth == 0.0


def result_of(facts: dict[str, Any], *lines: dict[str, Any]) -> dict[str, Any]:
    return {
        "machine": {"cpu": "A CPU", "cpus": 2, "kernel": "7.2", "one_minute": 0.25},
        "model": {"name": "m", "bytes_a_token": {"total": 6.7e8}},
        "engine": facts,
        "kv_bytes_a_position": 39600.0,
        "settings": {"tokens": 64},
        "lines": [{"threads": 1, "batch": 1, "bytes_a_token": 680_000_000, **line} for line in lines],
        "warnings": [],
    }


@pytest.fixture
def prepared(tmp_path: Path, tiny_model: Any) -> Path:
    path = tmp_path / "model.halo"
    prepare(tiny_model("wide"), path)
    return path


LINES = (
    {"kind": "prefill", "context": 512, "halo": {"median": 4000.0}},
    {"kind": "decode", "context": 128, "halo": {"median": 200.0}},
    {"kind": "decode", "context": 128, "batch": 8, "halo": {"median": 900.0}},
    {"kind": "decode", "context": 128, "batch": 32, "halo": {"median": 900.0}},
)


def test_an_issues_table_has_measured_beside_expected(prepared: Path) -> None:
    result = result_of(GPU_FACTS, *LINES)
    add_expectations(result, prepared, None, {1: 212e9})
    shape = shape_of(prepared, GPU_FACTS)
    wanted = decode_step(shape, 160).rate(GFX1151)
    text = issue_text(result)
    row = next(line for line in text if line.startswith("| decode at 128 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["200.0", "5.000", f"{wanted:.1f}"]
    assert cells[6] == f"{200 / wanted:.0%}" and cells[8] == str(decode_step(shape, 160).launches)
    tables = [line for line in text if line.startswith("| ")]
    assert len({line.count("|") for line in tables[:5]}) == 1, "every row has every column"
    assert "212.0 GB/s (as others measured)" in "\n".join(text) and "AMD Radeon 8060S gfx1151" in text[0]
    spent = [float(row.split("|")[4]) for row in result["kernels"]["rows"][2:]]
    assert sum(spent) == pytest.approx(1e3 * result["lines"][1]["expected"]["seconds"], abs=0.01)
    assert any(line.startswith("| gate and up |") for line in text)
    assert result["lines"][3]["expected"] is None, "more sequences than a step takes are not guessed at"


def test_a_chip_that_nobody_measured_gets_no_expectation(prepared: Path) -> None:
    result = result_of({**GPU_FACTS, "backend": "cuda", "arch": "sm_90"}, *LINES)
    add_expectations(result, prepared, 0.0, {1: 0.0})
    assert all(line["expected"] is None for line in result["lines"]) and "kernels" not in result
    assert "bandwidth not known" in "\n".join(issue_text(result))
    add_expectations(result, prepared, 2439e9, {1: 2439e9})
    assert result["lines"][1]["expected"]["launch_seconds"] == 0.0
    assert "2439.0 GB/s (stated)" in "\n".join(issue_text(result))


def test_of_the_cpu_the_bytes_by_the_measured_bandwidth_are_expected(prepared: Path) -> None:
    result = result_of({"backend": "cpu", "isa": "avx512", "backend_reason": "there is no GPU"}, *LINES[:3])
    add_expectations(result, prepared, None, {1: 34e9})
    prefill, one, eight = (line["expected"] for line in result["lines"])
    assert prefill is None and one["tokens_per_second"] == pytest.approx(50.0)
    assert eight["tokens_per_second"] == pytest.approx(50.0)
    text = issue_text(result)
    assert "backend cpu (there is no GPU)" in text[0] and "34.0 GB/s (measured)" in "\n".join(text)


def test_the_page_of_the_kernels_has_its_tables_from_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "engine.bench_expected"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in done.stdout.splitlines()
        if "|" in line
    ]
    first = rows[2]
    assert first[:2] == ["decode at 128", "1.6 bits"] and first[7] == "154"
    least, most = map(int, first[3].split(" to "))
    assert least < int(first[2]) < most and int(first[2]) == round(decode_step(BIG, 128).rate(GFX1151))


def test_the_command_prints_the_report(tmp_path: Path, native_library: Path) -> None:
    done: subprocess.CompletedProcess[str] = bench(tmp_path, native_library, "--report", "--rounds", "1")
    assert done.returncode in (0, 2), done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[1:]] == [
        "prefill 16", "decode at 8", "decode at 16", "decode at 8, 2 sequences",
    ]  # fmt: skip
    assert "backend cpu (there is no libhalo_hip.so here)" in done.stdout


@pytest.mark.parametrize("value", ["fast", "0", "-3", "nan", "1e9"])
def test_a_bandwidth_that_cannot_be_is_refused(tmp_path: Path, native_library: Path, value: str) -> None:
    done = bench(tmp_path, native_library, "--report", f"--bandwidth={value}")
    assert done.returncode != 0 and "GB a second" in done.stderr
