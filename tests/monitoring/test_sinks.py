"""Sinks of a run's rows: what TensorBoard and a CSV reader find."""

import csv
import json
import shutil
import threading
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from mocov3_ds.monitoring.sinks import CsvSink, TensorBoardSink, group_of, grouped_numbers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside tensorboard


def read_events(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def test_curves_of_a_resumed_run_are_those_of_an_unbroken_one(tmp_path: Path) -> None:
    for steps_done, last in ((0, 4), (2, 5)):  # killed after step 4, the checkpoint was at step 2
        sink = TensorBoardSink(tmp_path, steps_done)
        for step in range(steps_done + 1, last + 1):
            sink.show_row(step, {"train/loss": 10.0 * steps_done + step, "train/lr": 0.5})
        sink.close()
    events = read_events(tmp_path)
    assert events.Tags()["scalars"] == ["train/loss", "train/lr"]
    points = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0), (5, 25.0)]


def test_curves_of_a_rewound_run_have_its_steps_once(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, 0)
    for step in (1, 2, 3):
        sink.show_row(step, {"train/loss": 1.0})
    sink.drop_steps_after(1)
    sink.show_row(2, {"train/loss": 2.0})
    sink.close()
    points = [(event.step, event.value) for event in read_events(tmp_path).Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 2.0)]


def test_tensorboard_has_the_settings_and_pictures(tmp_path: Path) -> None:
    settings = {"config": {"batch": 8, "data": {"shards": "s3://me:pw@there/x"}}, "deepspeed": {}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    sink = TensorBoardSink(tmp_path, 0)
    sink.show_picture(3, "train/views", Image.new("RGB", (6, 4), "red"))
    sink.close()
    events = read_events(tmp_path)
    (picture,) = events.Images("train/views")
    assert (picture.step, picture.width, picture.height) == (3, 6, 4)
    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    found = plugin_data_pb2.HParamsPluginData.FromString(start).session_start_info.hparams
    assert found["batch"].number_value == 8
    assert found["data.shards"].string_value == "s3://there/x"
    assert found["run.folder"].string_value == str(tmp_path)


def test_a_folder_that_is_moved_away_costs_the_curves_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's thread dies of it; the sink's next row says so, where it is caught."""
    shown: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    sink = TensorBoardSink(tmp_path / "run", 0)
    (tmp_path / "run").rename(tmp_path / "moved")  # at once; a removal would race with the thread
    with pytest.raises(FileNotFoundError):
        for step in range(100_000):
            sink.show_row(step, {"loss": 1.0})
            sink._writer.flush()
    assert shown == []
    failing = threading.Thread(target=shutil.rmtree, args=(tmp_path / "nothing",))
    failing.start()
    failing.join()
    assert len(shown) == 1


def read_csv(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def write_log(run: Path, rows: list[dict[str, object]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_table_has_the_numbers_of_the_log_and_grows_columns(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"step": 0, "knn_full": 12.5},
        {"step": 1, "loss": 0.1 + 0.2, "applied": True},
        {"step": 2, "loss": 1e-300, "applied": False, "alarms": ["a", "b"], "trouble": "text"},
        {"step": 3, "loss": None},
    ]
    sink = CsvSink(tmp_path, 0)
    for last, row in enumerate(rows):
        write_log(tmp_path, rows[: last + 1])
        figures = {"system/machine_cpu_percent": 5.0, "layers/rms/block_0": 1.0}
        sink.show_row(last, grouped_numbers(row) | figures)
    sink.close()
    table = read_csv(tmp_path)
    assert list(table[0]) == ["step", "knn_full", "loss", "applied", "alarms"]
    assert [line["step"] for line in table] == ["0", "1", "2", "3"]
    assert [line["loss"] for line in table] == ["", repr(0.1 + 0.2), "1e-300", ""]
    assert [line["applied"] for line in table] == ["", "1", "0", ""]
    assert table[2]["alarms"] == "2"


def test_a_table_goes_on_where_the_log_does(tmp_path: Path) -> None:
    write_log(tmp_path, [{"step": step, "loss": float(step)} for step in (1, 2, 3)])
    sink = CsvSink(tmp_path, 2)
    assert [line["step"] for line in read_csv(tmp_path)] == ["1", "2"]
    sink.show_row(3, {"train/loss": 30.0})
    sink.drop_steps_after(1)
    sink.show_row(2, {"train/loss": 20.0})
    sink.close()
    assert [line["loss"] for line in read_csv(tmp_path)] == ["1.0", "20.0"]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("loss", "train"),
        ("knn_momentum", "knn"),
        ("images_per_s", "system"),
        ("store_bytes", "system"),
        ("spread", "train"),
    ],
)
def test_values_are_shown_in_groups(name: str, group: str) -> None:
    assert group_of(name) == group
