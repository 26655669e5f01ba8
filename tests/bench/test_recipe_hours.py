"""The table of the recipes' hours on eight cards."""

import pytest

from mocov3_ds.bench.recipe_hours import RecipeHours, tabulate_hours


def test_rows_have_the_hours_of_each_schedule() -> None:
    options = RecipeHours(
        recipes=("vit_s16",), cards=("V100-32GB", "H200"), schedules=("off", "4x")
    )
    head, line, *rows = tabulate_hours(options)
    assert head == (
        "| recipe | eight | off: hours | card hours | cores | 4x: hours | card hours | cores |"
    )
    assert line.count("---") == 8
    for row, card in zip(rows, options.cards, strict=True):
        name, eight, *cells = row.strip("| ").split(" | ")
        assert (name, eight) == ("vit_s16", card)
        (whole, whole_cards, whole_cores), (short, short_cards, short_cores) = cells[:3], cells[3:]
        hours = [float(text.partition(" (")[0]) for text in (whole, short)]
        assert hours[0] / hours[1] == pytest.approx(4, rel=0.15)
        assert float(whole_cards) == pytest.approx(8 * hours[0], rel=0.05)
        assert float(short_cards) == pytest.approx(8 * hours[1], rel=0.05)
        assert int(short_cores) > 4 * int(whole_cores)
