"""Panels, colours and files of pictures."""

import io
from pathlib import Path

from PIL import Image

from mocov3_ds.stability.drawing import (
    COLOURS,
    Figure,
    as_png,
    assign_colours,
    save_png,
    set_title,
    stack_panels,
)


def test_a_picture_is_a_small_png() -> None:
    with Image.open(io.BytesIO(as_png(Figure((2, 1))))) as image:
        assert image.size == (280, 140)
        assert image.mode == "P"  # few colours


def test_a_file_has_the_bytes_that_are_returned(tmp_path: Path) -> None:
    figure, _ = stack_panels(1, "y")
    data = save_png(figure, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


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
