"""The report: every section from runs on disk, nothing outside the page, honest comparisons."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mocov3_ds.config import parse
from mocov3_ds.model.layer_groups import group_names
from mocov3_ds.monitoring.signal_file import SIGNALS, SignalFile
from mocov3_ds.stability import run as runs
from mocov3_ds.stability import study_page as reports
from mocov3_ds.stability.figures import trailing_ratio
from mocov3_ds.stability.grid import Cell, lay_out, tomllib
from mocov3_ds.stability.study_page import paper_value, report

GRID = """
title = "Two optimizers & a twin"
about = "What is <asked>."
twins = ["AdamW"]
seeds = 2
[base]
"model.depth" = 3
epochs = 30
[[arms]]
name = "AdamW"
axes = { lr = [1e-3, 2e-3] }
[[arms]]
name = "LAMB"
optimizer = "Lamb"
"""
STEPS, EVERY = 480, 10  # drawn images: 16 steps an epoch


def write_run(
    folder: Path, flags: list[str], seed: int, *, spikes: list[int], trained: bool
) -> None:
    """A run folder with a falling loss, rising accuracy, and spikes of gradient, RMS and loss."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    tree = {**parse(flags).as_json(), "data_digest": "", "version": "0"}
    (folder / "config.json").write_text(json.dumps(tree))
    groups = group_names(3)
    t = np.arange(1, STEPS + 1)
    size = 1 + sum((12 * np.exp(-abs(t - peak) / 3) for peak in spikes), np.zeros(STEPS))
    noise = 1 + 0.002 * random.standard_normal(STEPS)
    loss = (3 + 3 * np.exp(-t / 100)) * noise * (1 + 0.02 * (size - 1))
    knn = 45 - 30 * np.exp(-t / 120) + 0.1 * random.standard_normal(STEPS)
    for peak in spikes[:1]:
        knn[(t > peak) & (t <= peak + 60)] -= 15
    rows: list[dict[str, Any]] = [{"step": 0, "knn_full": 12.0, "knn_chance": 10.0}]
    file = SignalFile(folder, groups, steps_done=0)
    for at, step in enumerate(t.tolist()):
        row = {"step": step, "epoch": step / 16, "loss": loss[at], "lr": 1e-3, "chance_loss": 4.4}
        watched = {"knn": float(knn[at])} if step % EVERY == 0 else {}
        rows.append({**row, **watched})
        values = {"step": step, "lr": 1e-3, "loss": loss[at], **watched}
        for group in groups:
            if trained or group != "patch_embed":
                tremble = float(np.exp(0.05 * random.standard_normal()))
                found = dict.fromkeys(SIGNALS, tremble)
                found["grad_linf"] = found["grad_l2"] = 1e-3 * tremble * size[at]
                found["rms"] = found["rms_before"] = 0.2 * tremble * size[at]
                values |= {f"{group}/{name}": value for name, value in found.items()}
        file.write(values)
    file.close()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid's folder: spikes in AdamW's trained runs alone, one cell not begun, one failed."""
    folder = tmp_path_factory.mktemp("grid")
    grid = lay_out(tomllib.loads(GRID), "mine", "tiny")
    runs.prepare(folder, grid, launcher="python", extra=[])
    for cell in grid.cells[:-1]:
        spikes = [200 + 3 * cell.seed, 330] if "AdamW" in cell.label and not cell.frozen else []
        flags, trained = cell.flags(), not cell.frozen
        write_run(folder / "cells" / cell.name, flags, cell.seed, spikes=spikes, trained=trained)
        outcome = runs.Outcome(cell.name, "done", 0, 1.0, "")
        (folder / "outcomes" / f"{cell.name}.json").write_text(json.dumps(vars(outcome)))
    failed = runs.Outcome(grid.cells[-1].name, "failed", 1, 1.0, "out of memory")
    (folder / "outcomes" / f"{failed.cell}.json").write_text(json.dumps(vars(failed)))
    return folder


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


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_section_of_a_grid(folder: Path, tmp_path: Path) -> None:
    page = report(folder, tmp_path / "out", command="mocov3 stability run mine.toml")
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


def test_the_tables_hold_what_the_detectors_found(folder: Path, tmp_path: Path) -> None:
    report(folder, tmp_path)
    found = {row["run"]: row for row in rows_of(tmp_path / "runs.csv")}
    assert len(found) == 9
    spiky = found["adamw_lr-0.001_seed-0"]
    assert int(spiky["jumps"]) == 2
    assert float(spiky["worst_excess"]) == pytest.approx(24, abs=2)
    assert spiky["verdict"] != "STABLE"
    frozen = found["adamw_lr-0.001_frozen_seed-0"]
    assert (frozen["verdict"], frozen["jumps"]) == ("STABLE", "0")
    assert float(spiky["T"]) == pytest.approx(
        float(frozen["knn_final"]) - float(spiky["knn_final"])
    )
    assert not frozen["T"]
    arms = {row["arm"]: row for row in rows_of(tmp_path / "arms.csv")}
    assert arms["AdamW, lr 0.001"]["seeds"] == "2"
    assert arms["LAMB"]["verdicts"] == "STABLE x1"
    events = rows_of(tmp_path / "events.csv")
    peaks = [int(e["peak"]) for e in events if e["run"].endswith("0.002_seed-1") and not e["group"]]
    assert sorted(p for p in peaks if p in (203, 330)) == [203, 330]


def test_only_ranges_that_do_not_touch_are_called_different(folder: Path) -> None:
    sentences = reports.findings(reports.look_at(folder).arms)
    twin = next(line for line in sentences if line.startswith("AdamW, lr 0.001, frozen against"))
    assert "loss jumps a run 0.0 against 2.0 (lower in every seed)" in twin
    same = next(line for line in sentences if line.startswith("AdamW, lr 0.002 against"))
    assert "loss jumps a run 2.0 against 2.0 (within the spread of the seeds)" in same
    one = next(line for line in sentences if line.startswith("LAMB against"))
    assert "one seed: no spread known" in one


def test_one_run_alone(folder: Path, tmp_path: Path) -> None:
    text = report(folder / "cells/lamb_seed-0", tmp_path).read_text()
    reader = Reader()
    reader.feed(text)
    assert "Stability: lamb_seed-0" in reader.text
    assert "Nothing to draw for: First against last layer" in reader.text
    assert "Trust ratios" in reader.text
    # by the run's own optimizer, which no grid names here
    assert (tmp_path / "trust.png").exists()
    report(folder / "cells/adamw_lr-0.001_seed-0", tmp_path)
    assert not (tmp_path / "trust.png").exists()
    for source, words in ((tmp_path, "neither a grid"), (tmp_path / "none", "neither a grid")):
        with pytest.raises(ValueError, match=words):
            report(source, tmp_path / "out")


def test_the_papers_values_stand_beside_the_papers_settings_alone() -> None:
    def value(**settings: Any) -> float | None:
        base = {"recipe": "vit_b16", "epochs": 100, "batch": 4096, "lr": 1e-4, "seed": 0}
        return paper_value(Cell("", "", {**base, **settings}, {}))

    assert value() == 72.2
    assert value(patch="frozen") == 72.8
    assert value(batch=6144) == 69.7
    assert value(optimizer="Lamb", lr=8e-4) == 66.5
    for other in ({"epochs": 300}, {"lr": 3e-4}, {"recipe": "vit_s16"}, {"beta2": 0.95}):
        assert value(**other) is None
    assert value(patch=0.2) is value(**{"views.fixed": True}) is None


def test_a_ratio_to_the_past_alone() -> None:
    random = np.random.default_rng(0)
    values_T = random.uniform(1, 2, 40)
    values_T[3] = np.nan
    ratio_T = trailing_ratio(values_T, 8)
    assert np.isnan(ratio_T[:8]).all()
    for t in range(8, 40):
        assert ratio_T[t] == values_T[t] / np.nanmedian(values_T[t - 8 : t])
    assert np.isnan(trailing_ratio(values_T, 40)).all()
    picture = reports.figures.png(reports.figures.Figure((2, 1)))
    assert Image.open(io.BytesIO(picture)).size == (280, 140)
