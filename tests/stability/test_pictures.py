"""A picture of a page is drawn as PNG, or is none."""

from matplotlib.figure import Figure

from mocov3_ds.stability.pictures import PictureKind


def draw_a_line(values: list[float]) -> Figure | None:
    if not values:
        return None
    figure = Figure((2, 1))
    figure.subplots().plot(values)
    return figure


def test_a_picture_is_made_of_what_it_is_given() -> None:
    kind: PictureKind[list[float]] = PictureKind("line", "A line", "As drawn.", draw_a_line)
    picture, other = kind.make([1.0, 2.0]), kind.make([2.0, 1.0])
    assert (picture.title, picture.caption) == ("A line", "As drawn.")
    assert picture.data is not None and picture.data.startswith(b"\x89PNG")
    assert picture.data != other.data
    assert kind.make([]).data is None
