"""Seeds in names: the word tells, a lone s may, and sizes of networks are none."""

import pytest

from mocov3_ds.stability.named_seeds import read_named_seeds
from mocov3_ds.stability.ordinary_runs import group_runs


@pytest.mark.parametrize(
    ("names", "seeds"),
    [
        ("hot_s0 hot_s1", {"hot_s0": 0, "hot_s1": 1}),
        ("a-s42 a-s43 a-s44", {"a-s42": 42, "a-s43": 43, "a-s44": 44}),
        ("a-s1 a-s77 b-s1 b-s77", {"a-s1": 1, "a-s77": 77, "b-s1": 1, "b-s77": 77}),
        ("a-s1 a-s77", {}),
        ("vit-s16 vit-s32 vit-s8", {}),
        ("vit-s16 vit-s32 deit-s16 deit-s32", {}),
        ("my_vit_s1 my_vit_s2", {}),
        ("dino-s8 dino-s16 mae-s8 mae-s16", {}),
        ("vit-s16_seed1 vit-s16_seed2", {"vit-s16_seed1": 1, "vit-s16_seed2": 2}),
        ("vit-s16-s1 vit-s16-s2", {"vit-s16-s1": 1, "vit-s16-s2": 2}),
    ],
)
def test_which_names_tell_a_seed(names: str, seeds: dict[str, int]) -> None:
    named = read_named_seeds(names.split())
    assert named.seeds == seeds
    assert {*named.refused} == {*names.split()} - {*seeds}


def test_sizes_of_networks_are_arms_and_guesses_are_told() -> None:
    cells, notes = group_runs({name: {} for name in ("vit-s16", "vit-s32", "vit-s8")})
    assert [cell.label for cell in cells] == ["vit-s16", "vit-s32", "vit-s8"]
    assert notes[0].startswith("vit-s16, vit-s32, vit-s8: the s and its number count as part of")
    assert "3 runs name no seed, so nothing is paired" in notes[1]
    _, notes = group_runs({"hot_s0": {}, "hot_s1": {}, "cool": {"seed": 1}})
    assert notes == [
        "The seeds of 2 runs are those in their names: hot_s0 is seed 0 of hot. Where that is "
        "wrong, a config.json with a seed beside a log decides"
    ]
