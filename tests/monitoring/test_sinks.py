"""Sinks of a run's rows: the curves that TensorBoard reads."""

import shutil
import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mocov3_ds.monitoring.sinks import TensorBoardSink

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside tensorboard


def test_curves_of_a_resumed_run_are_those_of_an_unbroken_one(tmp_path: Path) -> None:
    for steps_done, last in ((0, 4), (2, 5)):  # killed after step 4, the checkpoint was at step 2
        sink = TensorBoardSink(tmp_path, steps_done)
        for step in range(steps_done + 1, last + 1):
            sink.row(step, {"loss": 10.0 * steps_done + step, "lr": 0.5})
        sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss", "lr"]
    points = [(event.step, event.value) for event in events.Scalars("loss")]
    assert points == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0), (5, 25.0)]


def test_a_folder_that_is_moved_away_costs_the_curves_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's thread dies of it; the sink's next row says so, where it is caught."""
    shown: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    sink = TensorBoardSink(tmp_path / "run", 0)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        for step in range(100_000):
            sink.row(step, {"loss": 1.0})
            sink._writer.flush()
    assert shown == []
    failing = threading.Thread(target=shutil.rmtree, args=(tmp_path / "nothing",))
    failing.start()
    failing.join()
    assert len(shown) == 1
