"""Schedules of compression: what is read, what is refused, and what each step sees."""

from dataclasses import replace

import pytest

from mocov3_ds.config.compression import (
    LEVELS,
    READY,
    Patches,
    SequenceLength,
    check_last_step,
    check_patches,
    count_length,
    length_at,
    read_schedule,
    step_length,
)

PATCHES = Patches(network="net", image_size=(224, 224), count=196, side=16)


def shares(text: str, progress: float) -> tuple[float, float, float]:
    length = length_at(read_schedule(text), progress)
    return length.query_share, length.key_share, length.patch_scale


def test_a_schedule_goes_in_straight_lines_and_holds_its_patch_scale() -> None:
    text = "0:q0.25,k0.5,p2 0.4:0.5 0.4:p1 0.8:1"
    assert shares(text, 0.0) == (0.25, 0.5, 2)
    assert shares(text, 0.2) == (0.375, 0.5, 2)
    assert shares(text, 0.39999) == (0.5, 0.5, 2)
    assert shares(text, 0.4) == (0.5, 0.5, 1)
    assert shares(text, 0.6) == (0.75, 0.75, 1)
    assert shares(text, 0.8) == shares(text, 1.0) == (1, 1, 1)
    assert shares("0:0.5,p2 0.4:p1 0.8:1", 0.39) == (0.5, 0.5, 2)
    assert shares("0:0.5,q0.25 0.8:1", 0.0) == (0.25, 0.5, 1)


def test_few_lengths_occur() -> None:
    points = read_schedule("0:0.05 0.95:1")
    seen = {length_at(points, step / 10_000).query_share for step in range(10_000)}
    assert seen == {level / LEVELS for level in range(1, LEVELS + 1)}


@pytest.mark.parametrize("name", READY)
def test_ready_schedules_only_grow_and_end_whole(name: str) -> None:
    points = read_schedule(name)
    lengths = [length_at(points, step / 100) for step in range(100)]
    patches = [length.query_share / length.patch_scale**2 for length in lengths]
    assert patches == sorted(patches)
    assert lengths[-1] == SequenceLength()
    assert (lengths[0] == SequenceLength()) == (name == "off")


def test_patches_are_counted_and_never_none() -> None:
    length = SequenceLength(query_share=0.25, key_share=1 / 16, patch_scale=2)
    counted = count_length(length, 49)
    assert (counted.query_patches, counted.key_patches) == (12, 3)
    assert count_length(length, 4).key_patches == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3x", "is no schedule; there are off, 2x, 4x"),
        ("", "says nothing of the run's start"),
        ("0.1:0.5 0.9:1", "says nothing of the run's start"),
        ("0:0.5", "does not end at full length"),
        ("0:0.5 0.99:1", "does not end at full length"),
        ("0:0.5,p2 0.9:1", "does not end at full length"),
        ("0:q0.5 0.9:q0.75", "does not end at full length"),
        ("0:1", "has no effect: no step has fewer patches"),
        ("0:0.97,k1 0.9:1", "has no effect: no step has fewer patches"),
        ("0:0.25 0:1", "has no effect: no step has fewer patches"),
        ("0:0.25 0:1 0.9:1", "has no effect: no step has fewer patches"),
        ("0:p2 0:p1", "has no effect: no step has fewer patches"),
        ("0:0.5,0.25 0.9:1", "says twice how much is kept or how large patches are: '0:0.5,0.25'"),
        ("0:q0.5,1 0.9:1", "says twice"),
        ("0:0.5,p2,p1 0.9:1,p1", "says twice"),
        ("0:0.5 0.6:0.7 0.5:0.8 0.9:1", "goes back from the progress 0.6 to 0.5"),
        ("0:half 0.9:1", "'half' is no number from 0.03125 to 1"),
        ("0:0 0.9:1", "'0' is no number"),
        ("0:nan 0.9:1", "'nan' is no number"),
        ("0:0.5,p0.5 0.9:1,p1", "'0.5' is no number from 1 to 64"),
        ("0:1.5 0.9:1", "'1.5' is no number"),
        ("2:0.5 0.9:1", "'2' is no number from 0 to 1"),
    ],
)
def test_schedules_that_cannot_be_are_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match="--compress") as error:
        read_schedule(text)
    assert says in str(error.value)


@pytest.mark.parametrize("text", ["0:1 0.5:0.5 0.5:1", "0:p2 0.0001:p1", "0:0.25 0.5:1"])
def test_what_shortens_any_step_is_read(text: str) -> None:
    assert read_schedule(text)
    check_patches(text, PATCHES)


def test_a_scale_of_six_digits_is_that_of_whole_pixels() -> None:
    length = step_length("0:p1.14286 0.9:p1", 0.0, replace(PATCHES, side=14, count=256))
    assert length is not None
    assert (length.patches, length.patch_scale) == (196, 16 / 14)


@pytest.mark.parametrize(
    ("text", "patches", "says"),
    [
        ("2x", replace(PATCHES, count=1, side=224), "has no effect on net: of its 1 patches none"),
        ("0:0.9 0.9:1", replace(PATCHES, count=4, side=112), "has no effect on net: of its 4"),
        ("0:p1.00001 0.9:p1", PATCHES, "has no effect on net: of its 196 patches none"),
        (
            "0:p1.25 0.5:p1",
            replace(PATCHES, image_size=(40, 40), count=4),
            "of 16 pixels, do not divide an image of 40, so there can be no larger ones",
        ),
        ("0:p2 0.2:p3 0.5:p1", PATCHES, "possible scales are 1, 1.75, 2, 3.5"),
    ],
)
def test_what_a_network_cannot_do_is_refused(text: str, patches: Patches, says: str) -> None:
    with pytest.raises(ValueError, match="patches") as error:
        check_patches(text, patches)
    assert says in str(error.value)


def test_a_run_that_ends_before_full_length_is_refused() -> None:
    with pytest.raises(ValueError, match="come to full length in the 5 steps"):
        check_last_step("0:0.5 0.85:0.5 0.95:1", 5)
    check_last_step("4x", 84)
