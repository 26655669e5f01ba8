"""A balance closes or says where it does not."""

import pytest

from data_prep.balance import (
    HIDDEN,
    Balance,
    check_balance,
    ending_reason,
)


def test_files_add_up_by_reason():
    balance, other = Balance(), Balance()
    balance.see(3)
    balance.images, balance.side_files = 1, 1
    balance.leave_out("b.txt", ending_reason("b.txt"))
    other.see(3)
    other.images = 1
    for name in (".x", "a.txt"):
        other.leave_out(name, HIDDEN if name == ".x" else ending_reason(name))
    balance.add(other)
    assert balance.as_json(1) == {
        "seen": 6,
        "kept": 1,
        "rejected": 1,
        "side_files": 1,
        "left_out": {"ends in .txt, so no image by its name": 2, HIDDEN: 1},
    }
    assert balance.lines(1) == [
        "balance: 6 files seen = 1 images kept + 1 rejected + 1 label and side files + 3 left out",
        "  left out: 2 x ends in .txt, so no image by its name, e.g. a.txt",
        f"  left out: 1 x {HIDDEN}, e.g. .x",
    ]
    balance.see()
    with pytest.raises(AssertionError, match="a file was lost"):
        balance.as_json(0)


def test_reasons_name_the_ending_but_not_a_stranger_s_text():
    assert ending_reason("x/a.JXL") == "image format that is not read (.jxl)"
    assert ending_reason("README") == ending_reason(".jpg") == "no ending, so no image by its name"
    assert ending_reason("a.\x1b[8m") == "ends in ...., so no image by its name"


def test_what_is_wrong_with_a_stored_balance_is_said():
    good = {"seen": 6, "kept": 2, "rejected": 1, "side_files": 1, "left_out": {"x": 2}}
    assert check_balance(good, 2, 1) == ""
    for change, samples, rejected, words in (
        ({"seen": 7}, 2, 1, "does not close: 7 files seen, 6 accounted for"),
        ({}, 3, 1, "says 2 images kept, the manifest holds 3 samples"),
        ({}, 2, 0, "says 1 rejected, the manifest 0"),
        ({"left_out": 5}, 2, 1, "cannot be read"),
        ({"kept": "many"}, 2, 1, "cannot be read"),
    ):
        assert words in check_balance({**good, **change}, samples, rejected)
    assert "cannot be read" in check_balance({}, 0, 0)
