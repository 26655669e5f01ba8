"""The page of a study: every section from runs on disk, nothing outside the page."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mocov3_ds.stability.study_page import write_study


class Reader(HTMLParser):
    """Tags, their attributes, and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_section_of_a_grid(study_folder: Path, tmp_path: Path) -> None:
    page = write_study(study_folder, tmp_path / "out", command="mocov3 stability run mine.toml")
    html = page.read_text()
    reader = Reader()
    reader.feed(html)
    for words in (
        "Stability: Two optimizers & a twin",
        "What is <asked>.",
        "mocov3 stability run mine.toml",
        "Verdicts",
        "What was found",
        "k-NN accuracy",
        "Loss spikes",
        "Which layer, when",
        "First against last layer",
        "RMS of the first trained layer",
        "Learning rate against accuracy",
        "Trust ratios",
        "What to try next",
        "Every run",
        "To keep in mind",
        "lamb_seed-1: failed: out of memory",
    ):
        assert words in reader.text, words
    # self-contained: no script, no link, no address; each picture is a PNG in the page
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "source"}
    assert not re.search(r"https?:|url\(|@import", html)
    pictures = [values["src"] or "" for tag, values in reader.tags if tag == "img"]
    assert len(pictures) == 7
    assert all(picture.startswith("data:image/png;base64,") for picture in pictures)
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    for name in ("knn", "loss", "layers", "order", "rms", "rate", "trust"):
        with Image.open(tmp_path / "out" / f"{name}.png") as image:
            assert image.width > 500
    assert len(html) < 400_000


def test_one_run_alone(study_folder: Path, tmp_path: Path) -> None:
    text = write_study(study_folder / "cells/lamb_seed-0", tmp_path).read_text()
    reader = Reader()
    reader.feed(text)
    assert "Stability: lamb_seed-0" in reader.text
    assert "Nothing to draw for: First against last layer" in reader.text
    assert "Trust ratios" in reader.text
    # by the run's own optimizer, which no grid names here
    assert (tmp_path / "trust.png").exists()
    write_study(study_folder / "cells/adamw_lr-0.001_seed-0", tmp_path)
    assert not (tmp_path / "trust.png").exists()
    for source, words in ((tmp_path, "neither a grid"), (tmp_path / "none", "neither a grid")):
        with pytest.raises(ValueError, match=words):
            write_study(source, tmp_path / "out")
