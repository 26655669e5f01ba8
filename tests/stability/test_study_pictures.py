"""The files of a page's pictures: written where there is something to draw, else removed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.text import Text

from mocov3_ds.monitoring.signal_file import SIGNALS, SignalTable, column_names
from mocov3_ds.stability import curve_figures, study_pictures
from mocov3_ds.stability.drawing import plain_text
from mocov3_ds.stability.grid import Cell
from mocov3_ds.stability.study import Arms, JudgedRun
from mocov3_ds.stability.study_pictures import PICTURES, write_pictures
from mocov3_ds.stability.verdict import judge
from tests.stability import synthetic
from tests.stability.judged_runs import judged_run


def arms_called(name: str) -> Arms:
    """Two arms whose labels, and whose layers, have a name: with events, rates and trust ratios."""
    planted = synthetic.with_spikes(0).series
    groups = tuple(f"{name}.{index}" for index in range(len(planted.groups)))
    series = replace(planted, groups=groups, epochs_per_step=0.01)
    judgement = judge(series)
    columns = column_names(groups)
    values_TC = np.ones((len(series.steps_T), len(columns)), np.float32)
    values_TC[:, 0] = series.steps_T
    scalars = columns[: len(columns) - len(groups) * len(SIGNALS)]
    table = SignalTable(groups, tuple(SIGNALS), scalars, values_TC, columns)
    arms = {}
    for lr in (0.1, 0.2):
        cell = Cell(f"{name}_{lr}", f"{name}, lr {lr}", {"lr": lr, "seed": 0}, {})
        arms[cell.label] = [JudgedRun(cell, series, judgement, table, "LAMB")]
    return arms


def texts_of(figure: Figure) -> list[str]:
    """Texts of a picture but numbers beside its axes, of which logarithmic ones are formulas."""
    artists: list[Text] = figure.findobj(Text)
    artists += [tick for axes in figure.axes for tick in axes.get_yticklabels()]
    return [artist.get_text() for artist in artists if "mathdefault" not in artist.get_text()]


@pytest.mark.parametrize("name", ["_x$^$ \\frac{$\r\t\ud800", "a" + "$" * 130])
def test_names_are_text_in_every_picture(name: str) -> None:
    arms, named = arms_called(name), []
    for kind in PICTURES:
        figure = kind.draw(arms)
        assert figure is not None, kind.name
        texts = texts_of(figure)
        assert not [text for text in texts if is_math_text(text)], kind.name
        assert not [text for text in texts if {"\r", "\t", "\ud800"} & {*text}], kind.name
        begin = plain_text(name).strip()[:4]
        named += [kind.name] * any(begin in text for text in texts)
    # the test of spikes is of all arms
    assert [kind.name for kind in PICTURES if kind.name not in named] == ["after_spikes"]


def test_a_curve_whose_name_begins_with_an_underscore_is_in_the_legend() -> None:
    figure = curve_figures.draw_knn_over_epochs(arms_called("_x"))
    assert figure is not None
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [" _x, lr 0.1", " _x, lr 0.2"]


def test_names_are_files_of_their_own() -> None:
    assert len({kind.name for kind in PICTURES}) == len(PICTURES)


def test_pictures_are_written_and_stale_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [kind for kind in PICTURES if kind.name in ("paired", "trust")]  # quickly drawn
    monkeypatch.setattr(study_pictures, "PICTURES", kinds)
    arms = {"a": [judged_run("a", 0, 40.0)], "b": [judged_run("b", 0, 42.0)]}
    (tmp_path / "trust.png").write_bytes(b"of an earlier page")
    (tmp_path / "own.txt").write_text("not a picture")
    pictures = write_pictures(arms, tmp_path)
    assert [picture.title for picture in pictures] == [kind.title for kind in kinds]
    paired, trust = pictures
    assert paired.data is not None and trust.data is None  # no run has trust ratios
    assert (tmp_path / "paired.png").read_bytes() == paired.data
    assert {path.name for path in tmp_path.iterdir()} == {"paired.png", "own.txt"}
