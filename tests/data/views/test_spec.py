"""The distribution of views, and the numbers that Python shares with the C++ code."""

import pytest

from mocov3_ds.data.views.spec import (
    ATTEMPTS,
    ORDERS,
    PARAMETERS,
    PLAIN_PARAMS,
    Column,
    Purpose,
    ViewSpec,
)


def test_the_columns_of_a_row_follow_each_other_without_gaps():
    assert [*Column] == [*range(PARAMETERS)]
    assert len(PLAIN_PARAMS) == PARAMETERS


def test_orders_are_those_of_the_first_four_columns():
    assert len(set(ORDERS)) == 24
    assert {frozenset(order) for order in ORDERS} == {frozenset([*Column][:4])}


def test_no_two_drawn_quantities_share_a_place():
    """Each has a place of its own, the crop two for each attempt and the jitter four."""
    assert min(Purpose) >= 2 * ATTEMPTS
    assert max(Purpose) == Purpose.DRAW_FACTORS
    assert len(set(Purpose.__members__.values())) == len(Purpose.__members__)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_min": 0.0}, "0 < crop_min"),
        ({"crop_min": 0.9, "crop_max": 0.5}, "crops from 0.9 to 0.5"),
        ({"grey_p": 1.5}, r"must lie in \[0, 1\]"),
        ({"blur_p": (0.0, -0.1)}, r"must lie in \[0, 1\]"),
        ({"hue": 0.6}, "hue"),
        ({"blur_sigma": (2.0, 0.1)}, "blur sigma"),
        ({"aspect": (2.0, 1.0)}, "aspect"),
        ({"aspect": (0.01, 1.0)}, "aspect"),
        ({"solarise_threshold": 0}, "threshold 0"),
        ({"std": (0.2, 0.2)}, "3 means and 2 deviations"),
        ({"std": (0.2, 0.2, 0.0)}, "positive"),
        ({"mean": (0.5,), "std": (0.2,)}, "images of 1 channels have no colours"),
    ],
)
def test_impossible_specifications_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ViewSpec(**settings)
