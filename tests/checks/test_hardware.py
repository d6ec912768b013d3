"""A GPU that is named wrongly is refused or, worse, accepted: the decodings of KFD, with public vectors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks.hardware import gfx_name, location, parse_int, parse_properties
from tests.checks.boxes import KFD, NODE, strix_halo


@pytest.mark.parametrize(
    ("version", "name"),
    [
        (110501, "gfx1151"),
        (110500, "gfx1150"),
        (110003, "gfx1103"),
        (110000, "gfx1100"),
        (90010, "gfx90a"),
        (90402, "gfx942"),
        (100300, "gfx1030"),
        (0, ""),
        (-1, ""),
    ],
)
def test_gfx_names_are_spelt_as_the_compiler_spells_them(version: int, name: str) -> None:
    assert gfx_name(version) == name


@pytest.mark.parametrize(
    ("identity", "address"),
    [
        (49664, "0000:c2:00.0"),
        (50432, "0000:c5:00.0"),
        (50688, "0000:c6:00.0"),
        (49920, "0000:c3:00.0"),
        (49408, "0000:c1:00.0"),
        (25856, "0000:65:00.0"),
    ],
)
def test_location_ids_seen_in_public_logs_are_those_addresses(identity: int, address: str) -> None:
    assert location(identity) == address


@pytest.mark.parametrize(
    ("simds", "sku", "fixed", "unfixed"),
    [(80, "8060S", 19185664, 13942784), (64, "8050S", 15351808, 11157504), (32, "8040S", 7675904, 5578752)],
)
def test_each_sku_has_its_own_save_area(simds: int, sku: str, fixed: int, unfixed: int) -> None:
    text = KFD.replace("simd_count 80", f"simd_count {simds}")
    node = strix_halo().but(files={NODE: text}).facts().gfx1151_node
    assert node is not None
    assert node.sku == sku
    assert (node.cwsr_expected(fixed=True), node.cwsr_expected(fixed=False)) == (fixed, unfixed)


def test_the_cpu_node_is_no_gpu() -> None:
    cpu, gpu = strix_halo().facts().kfd
    assert (cpu.is_gpu, cpu.gfx, gpu.is_gpu, gpu.gfx) == (False, "", True, "gfx1151")


def test_a_device_is_found_by_id_wherever_it_sits_on_the_bus() -> None:
    facts = strix_halo().facts()
    assert facts.strix_halo_gpu is not None
    assert facts.strix_halo_gpu.pci_id == "1002:1586"
    assert facts.npu is not None
    assert (facts.npu.driver, facts.npu.revision) == ("amdxdna", 0x11)


@given(st.text())
def test_no_properties_file_breaks_the_reader(text: str) -> None:
    assert all(isinstance(value, int) for value in parse_properties(text).values())


@given(st.text(max_size=40))
def test_no_number_breaks_the_reader(text: str) -> None:
    assert isinstance(parse_int(text, -1), int)
