"""Cards by name, by memory and by the name of their driver; what is no card, in a sentence."""

import pytest

from mocov3_ds.planning.cards import (
    GIB,
    PRESETS,
    describe_own_card,
    find_card,
    find_card_of_device,
    format_presets,
)


def test_a_memory_names_a_class_of_cards() -> None:
    card = find_card("24gb", PRESETS)
    assert card.name == "24GB (as RTX3090)"
    assert (card.memory_bytes, card.fp32_rate) == (24 * GIB, PRESETS["RTX3090"].fp32_rate)
    assert find_card("h100", PRESETS) == PRESETS["H100-80GB"]
    with pytest.raises(ValueError, match=r"no card '181GB' is known \(did you mean 180GB\?\)"):
        find_card("181GB", PRESETS)


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
        assert f"{card.reach.products:.2f}: " in row


def test_a_card_of_ones_own() -> None:
    card = describe_own_card("MyCard", memory=48, tflops=200, bandwidth=1000)
    assert card.memory_bytes == 48 * GIB and card.low_precision_rate == 200e12
    assert card.reach.spread > 1.5 and card.name == "MyCard"
    for wrong in ({"memory": 0}, {"tflops": -1}, {"bandwidth": float("nan")}):
        numbers = {"memory": 48.0, "tflops": 200.0, "bandwidth": 1000.0} | wrong
        with pytest.raises(ValueError, match=f"--{next(iter(wrong))}"):
            describe_own_card("MyCard", **numbers)
    with pytest.raises(ValueError, match="is the name of a preset"):
        describe_own_card("h200", memory=48, tflops=200, bandwidth=1000)
