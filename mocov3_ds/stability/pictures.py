"""What is a picture of a page? A title, a caption, and a function that draws it as PNG."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from matplotlib.figure import Figure

from mocov3_ds.stability.drawing import as_png

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Picture:
    """One picture of the page."""

    title: str
    caption: str
    data: bytes | None
    """a PNG; None where the runs give nothing to draw"""


@dataclass(frozen=True)
class PictureKind(Generic[Subject]):
    """A picture that a page has of each of its subjects, e.g. of each run."""

    name: str
    """stem of its file, or GROUP/NAME in a tracker"""
    title: str
    caption: str
    draw: Callable[[Subject], Figure | None]
    """None where there is nothing to draw"""

    def make(self, subject: Subject) -> Picture:
        """Draw the picture of a subject."""
        figure = self.draw(subject)
        return Picture(self.title, self.caption, None if figure is None else as_png(figure))
