"""Panels, colours and files of pictures."""

import io
from pathlib import Path

import pytest
from matplotlib.cbook import is_math_text
from PIL import Image

from mocov3_ds.stability.drawing import (
    COLOURS,
    Figure,
    as_png,
    assign_colours,
    plain_text,
    set_title,
    stack_panels,
    write_png,
)


def test_a_picture_is_a_small_png() -> None:
    with Image.open(io.BytesIO(as_png(Figure((2, 1))))) as image:
        assert image.size == (280, 140)
        assert image.mode == "P"  # few colours


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    write_png(tmp_path / "picture.png", b"earlier")
    write_png(tmp_path / "picture.png", b"later")
    assert (tmp_path / "picture.png").read_bytes() == b"later"
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.parametrize(
    "name",
    [
        "price_a^b $\\frac{$",
        "$x$ and $y$",
        r"\$5$",
        "\ud800 & <b>",
        "two\nlines\x1b[31m",
        "=1+1",
        "日本$",
    ],
)
def test_a_name_is_drawn_as_it_is(name: str) -> None:
    figure, (axes,) = stack_panels(1, "y")
    set_title(axes, name)
    as_png(figure)  # mathematics that nobody meant would be refused, or drawn as mathematics
    title = axes.get_title(loc="left")
    assert not is_math_text(title)
    assert title.replace(r"\$", "$") == plain_text(name).replace(r"\$", "$")
    assert "\n" not in title and "\x1b" not in title


def test_lines_of_a_long_title_are_no_mathematics() -> None:
    _, (axes,) = stack_panels(1, "y")
    for count in range(40, 130):
        set_title(axes, "a" + "$" * count)
        lines = axes.get_title(loc="left").split("\n")
        assert not is_math_text("\n".join(lines))
        assert sum(line.count(r"\$") for line in lines) == sum(line.count("$") for line in lines)


def test_a_long_name_is_cut() -> None:
    assert plain_text("x" * 1000) == "x" * 109 + "…"
    assert plain_text("a$b") == r"a\$b"


def test_panels_grow_downwards() -> None:
    figure, panels = stack_panels(3, "y", height=2.0)
    assert len(panels) == 3
    assert figure.get_size_inches()[1] == 6.35
    assert panels[2].get_xlabel() == "step" and not panels[0].get_xlabel()
    set_title(panels[0], "x" * 70)
    set_title(panels[1], "x")
    sizes = [panels[index]._left_title.get_fontsize() for index in (0, 1)]  # type: ignore[attr-defined]
    assert sizes == [7.2, 8.5]


def test_colours_repeat() -> None:
    colours = assign_colours([str(number) for number in range(9)])
    assert colours["0"] == colours["8"] == COLOURS[0]
    assert len({*colours.values()}) == 8
