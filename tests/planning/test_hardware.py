"""Cards by name, machines and links of a cluster, and the sentences for what is no cluster."""

from pathlib import Path

import pytest

from mocov3_ds.planning.hardware import (
    GB,
    GIB,
    PRESETS,
    find_card,
    find_card_of_device,
    format_presets,
    read_cluster,
    read_rates,
)


def test_link_and_machines() -> None:
    one, two = read_cluster("8xA100"), read_cluster("16xA100", network=100)
    assert (one.nodes, two.nodes) == (1, 2)
    assert one.link_bandwidth == PRESETS["A100-80GB"].link_bandwidth
    assert two.link_bandwidth == 100 / 8 * GB
    assert read_cluster("8xA100", nodes=4).per_node == 2
    assert read_cluster("4xV100", interconnect=20).link_bandwidth == 20 * GB
    assert (one.title, two.title) == ("8 x A100-80GB", "16 x A100-80GB on 2 machines")


def test_every_machine_has_as_many_cards() -> None:
    for cards in (1, 7, 8, 9, 12, 13, 24, 30, 1001, 1024):
        cluster = read_cluster(f"{cards}xH100")
        assert cluster.nodes * cluster.per_node == cards
        assert cluster.per_node <= 8
    assert read_cluster("16xH100", nodes=1).per_node == 16


def test_a_memory_names_a_class_of_cards() -> None:
    card = find_card("24gb", PRESETS)
    assert card.name == "24GB (as RTX3090)"
    assert (card.memory_bytes, card.fp32_rate) == (24 * GIB, PRESETS["RTX3090"].fp32_rate)
    assert find_card("h100", PRESETS) == PRESETS["H100-80GB"]
    with pytest.raises(ValueError, match=r"no card '180GB' is known \(did you mean 80GB\?\)"):
        find_card("180GB", PRESETS)


@pytest.mark.parametrize(
    ("device", "preset"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 3090", "RTX3090"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A100 80GB PCIe", ""),
        ("NVIDIA GeForce GTX 1080", ""),
    ],
)
def test_cards_by_the_names_of_their_drivers(device: str, preset: str) -> None:
    card = find_card_of_device(device)
    assert (card.name if card else "") == preset


def test_the_table_has_the_source_of_every_number() -> None:
    table = format_presets()
    for card in PRESETS.values():
        [row] = [line for line in table.splitlines() if line.startswith(f"| {card.name} |")]
        assert card.source in row
        assert f"{card.reachable_share:.2f}: " in row


def test_a_file_without_rates_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    for text in ("", "[]", '{"memory_bytes": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="is no file of measured rates"):
            read_rates(path)
