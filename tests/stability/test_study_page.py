"""The page of a study: every section from runs on disk, nothing outside the page."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mocov3_ds.stability.study_page import write_study
from mocov3_ds.stability.study_pictures import PICTURES


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
        "Accuracy of all settings",
        "Seed by seed",
        "Loss of all settings",
        "Spikes and dips on one time axis",
        "What follows a spike",
        "k-NN accuracy, arm by arm",
        "Loss spikes",
        "Which layer, when",
        "First against last layer",
        "RMS of the first trained layer",
        "Learning rate against accuracy",
        "Trust ratios",
        "Curvature of the loss and noise of its gradient",
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
    assert len(pictures) == 13
    assert all(picture.startswith("data:image/png;base64,") for picture in pictures)
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    for name in [kind.name for kind in PICTURES]:
        with Image.open(tmp_path / "out" / f"{name}.png") as image:
            assert image.width > 500
    assert len(html) < 600_000


def test_one_run_alone(study_folder: Path, tmp_path: Path) -> None:
    text = write_study(study_folder / "cells/lamb_seed-0", tmp_path).read_text()
    reader = Reader()
    reader.feed(text)
    assert "Stability: lamb_seed-0" in reader.text
    assert (
        "Nothing to draw for: Seed by seed, What follows a spike, First against last layer"
        in reader.text
    )
    assert "Trust ratios" in reader.text
    # by the run's own optimizer, which no grid names here
    assert (tmp_path / "trust.png").exists()
    write_study(study_folder / "cells/adamw_lr-0.001_seed-0", tmp_path)
    assert not (tmp_path / "trust.png").exists()
    for source, words in ((tmp_path, "neither a grid"), (tmp_path / "none", "neither a grid")):
        with pytest.raises(ValueError, match=words):
            write_study(source, tmp_path / "out")


def test_hostile_names_in_a_page_of_other_programs_logs(tmp_path: Path) -> None:
    """Dollar signs, markup, formulas and half a letter, from the names of logs to the tables."""
    names = ["=1+1 $x^$", "<script>alert(1)<script>", "a 'b' \"c\"", "two\nlines"]
    rows = "".join(f"{step},{5 - step / 100},{step % 7}\n" for step in range(1, 200))
    for name in names:
        folder = tmp_path / "logs" / name
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("step,loss,knn\n" + rows)
    out = tmp_path / "out"
    page = write_study([tmp_path / "logs"], out, page_command="mocov3 stability report '<i>'")
    html = page.read_text()
    reader = Reader()
    reader.feed(html)
    assert "script" not in {tag for tag, _ in reader.tags}
    assert all(name in reader.text for name in names)
    assert "200 rows" not in reader.text and "199 rows; step = step" in reader.text
    table = (out / "runs.csv").read_text()
    assert "'=1+1 $x^$" in table and "\n=1+1" not in table
    # the page's own tables are no logs of a later page
    assert write_study([tmp_path], out).exists()


def test_files_of_somebody_else_stay(tmp_path: Path, study_folder: Path) -> None:
    (tmp_path / "index.html").write_text("<html>my thesis</html>")
    with pytest.raises(ValueError, match=r"is no page of this command; give --out"):
        write_study(study_folder, tmp_path)
    assert "thesis" in (tmp_path / "index.html").read_text()
    (tmp_path / "index.html").rename(tmp_path / "runs.csv")
    with pytest.raises(ValueError, match=r"holds runs.csv without a page beside it"):
        write_study(study_folder, tmp_path)
