"""The page of one run: everything that was logged, nothing from outside, names as text."""

import json
import math
import re
import shutil
import threading
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mocov3_ds.stability import run_page, run_verdict
from mocov3_ds.stability.run_curves import read_curves
from mocov3_ds.stability.run_page import format_duration, report, write_in_time, write_run_page

RUN = "cells/adamw_lr-0.001_seed-0"
BAD = "$\\frac{$ <script>alert(1)<b> =\"' \n"


class Reader(HTMLParser):
    """Tags and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, _attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(study_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a name that is markup, an ancestor, alarms and a plan."""
    folder = tmp_path_factory.mktemp("page") / BAD
    shutil.copytree(study_folder / RUN, folder)
    tree = json.loads((folder / "config.json").read_text())
    tree["ancestry"] = [{"kind": "extend", "path": f"runs/{BAD}", "step": 7}]
    tree["config"]["name"] = BAD
    (folder / "config.json").write_text(json.dumps(tree))
    (folder / "plan.txt").write_text("plan: memory 1.00 GiB planned, <2> measured\n")
    log = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for row in rows[1:]:
        row |= {"images_per_s": 64.0, "data_wait_s": 0.1, "memory_gib": 1.5, "applied": True}
    rows[200]["alarms"] = ["rms_rise", "<i>"]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_everything_stands_on_it_as_text(run: Path, tmp_path: Path) -> None:
    pictures = write_run_page(run, tmp_path / "deep/page.html")
    html = (tmp_path / "deep/page.html").read_text()
    reader = Reader()
    reader.feed(html)
    for words in (
        f"Run {BAD}",
        "not finished",
        "480",  # steps
        "chance 10.0 %",
        "1.50 GiB",
        "rms_rise",
        "<i>",
        "memory 1.00 GiB planned, <2> measured",
        f"path runs/{BAD}",
        "deepspeed mocov3_ds/train.py --recipe tiny",
        "Those that differ from the recipe tiny",
        "epochs",
    ):
        assert words in reader.text, words
    assert set(pictures) == {
        "train/loss_curve", "knn/knn_curve", "layers/heat_map", "train/rates", "system/speed",
        "system/memory",
    }  # fmt: skip
    assert reader.tags.count("img") == len(pictures)
    assert not set(reader.tags) & {"script", "link", "iframe", "i"}
    assert not re.search(r"https?:|url\(|@import", html)
    assert 'name="viewport"' in html
    assert len(html) < 400_000


def test_a_run_in_work_has_a_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(run)
    assert (run / "report.html").exists()
    assert "open it in a browser" in capsys.readouterr().out


def text_of(run: Path, page: Path) -> str:
    write_run_page(run, page)
    reader = Reader()
    reader.feed(page.read_text())
    return reader.text


@pytest.fixture
def short_run(study_folder: Path, tmp_path: Path) -> Path:
    """A folder with the settings of a run, for a log of one's own."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(study_folder / RUN / "config.json", folder)
    return folder


def put_rows(run: Path, steps: Iterable[int], **values: object) -> None:
    lines = []
    for step in steps:
        row: dict[str, object] = {
            "step": step,
            "epoch": step / 100,
            "loss": 3 - step / 500,
            "lr": 0.1,
        }
        row |= {"chance_loss": 4.0, "images_per_s": 64.0} | values
        lines.append(json.dumps(row) + "\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(lines)


def test_a_run_that_stopped_at_a_bad_step_says_so(short_run: Path, tmp_path: Path) -> None:
    put_rows(short_run, range(1, 90))
    assert "Verdict" in text_of(short_run, tmp_path / "page.html")
    assert "DIVERGED" not in text_of(short_run, tmp_path / "page.html")
    (short_run / "trouble").mkdir()
    (short_run / "trouble/step-90.json").write_text('{"reason": "the loss is <nan>"}')
    text = text_of(short_run, tmp_path / "page.html")
    assert "DIVERGED: a value was not finite after step 89." in text
    assert "stopped at the bad step 90: the loss is <nan>, see trouble/step-90.json" in text


def test_losses_that_end_in_nan_are_said(short_run: Path, tmp_path: Path) -> None:
    put_rows(short_run, range(1, 61))
    put_rows(short_run, range(61, 81), loss=math.nan)
    text = text_of(short_run, tmp_path / "page.html")
    assert "DIVERGED: the loss was not finite from step 61 to the end." in text
    assert "lossnot finite2.88 at step 60, chance level 4" in text
    assert "the loss of 20 steps was not finite, the last is step 80" in text


def test_rows_of_a_resume_are_not_drawn_twice(short_run: Path, tmp_path: Path) -> None:
    put_rows(short_run, range(1, 61), alarms=["rms_rise"])
    put_rows(short_run, range(41, 101), loss=2.5)
    curves, rows = read_curves(short_run)
    assert curves.steps_T.tolist() == list(range(1, 101)) and len(rows) == 100
    assert (curves.values["loss"][40:] == 2.5).all() and len(curves.alarms["rms_rise"]) == 40
    assert "20 rows of steps logged again later did not count" in text_of(
        short_run, tmp_path / "page.html"
    )


def test_the_wait_for_the_first_batch_is_no_share_of_a_step(
    short_run: Path, tmp_path: Path
) -> None:
    put_rows(short_run, [1], data_wait_s=9.0)
    assert "of a step waits" not in text_of(short_run, tmp_path / "page.html")
    put_rows(short_run, range(2, 9), data_wait_s=0.001)
    assert "of a step waits for data" in text_of(short_run, tmp_path / "page.html")


def test_a_page_does_not_fail_for_its_verdict(
    short_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_rows(short_run, range(1, 9))

    def fail(_: Path) -> None:
        raise ZeroDivisionError("none <b>")

    monkeypatch.setattr(run_verdict, "read_series", fail)
    text = text_of(short_run, tmp_path / "page.html")
    assert "it cannot be judged: ZeroDivisionError: none <b>." in text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run.*mocov3 stability report"):
        report(tmp_path)
    log = tmp_path / "x.csv"
    with pytest.raises(ValueError, match=r"x\.csv does not exist\."):
        report(log)
    log.write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match=r"is no run folder\. .*mocov3 stability report .*x\.csv"):
        report(log)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no settings of a run"):
        report(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        report(tmp_path)


def test_a_run_does_not_fail_for_its_page(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert write_in_time(tmp_path) == {}
    assert "report.html cannot be written: ValueError" in caplog.text
    released = threading.Event()
    monkeypatch.setattr(run_page, "write_run_page", lambda *_: released.wait(30))
    assert write_in_time(tmp_path, limit_s=0.05) == {}
    assert "report.html takes longer than 0 s" in caplog.text
    released.set()
    monkeypatch.undo()
    pictures = write_in_time(run)
    assert pictures["train/loss_curve"].mode == "RGB"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(59, "59 s"), (150, "2.5 min"), (9000, "2.5 h"), (216_000, "2.5 days"), (float("nan"), "-")],
)
def test_durations(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words
