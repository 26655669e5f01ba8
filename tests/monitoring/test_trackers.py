"""Trackers of other makers: opened through accelerate, continued in the same run."""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
from accelerate import tracking
from PIL import Image

from mocov3_ds.config.parts import Logger
from mocov3_ds.monitoring import trackers
from mocov3_ds.monitoring.trackers import TrackerSink, check_loggers, sink_openers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside trackers


class FakeTracker:
    """Stands in for accelerate's class of a tracker."""

    opened: ClassVar[list["FakeTracker"]] = []

    def __init__(self, project: str, **arguments: Any) -> None:
        self.project, self.arguments = project, arguments
        self.calls: list[tuple[Any, ...]] = []

    def start(self) -> None:
        tracking.logger.debug("accelerate's own logger would ask for its process state")
        self.hash, self.writer, self.run = "chosen", self, self
        FakeTracker.opened.append(self)

    def define_metric(self, *names: str, step_metric: str) -> None:
        self.calls.append(("metric", *names, step_metric))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(("settings", values))

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.calls.append(("row", step, values))

    def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
        self.calls.append(("picture", step, *values))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.fixture(params=["wandb", "aim"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tracker whose run we name, and one that names its run itself."""
    monkeypatch.setattr(FakeTracker, "opened", [])
    monkeypatch.setattr(tracking, "logger", tracking.logger)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, request.param, FakeTracker)
    for kind in trackers._KINDS.values():
        monkeypatch.delenv(kind.project_variable, raising=False)
    return str(request.param)


def run_once(name: str, run: Path, steps_done: int = 0) -> FakeTracker:
    sink = TrackerSink(name, run, steps_done)
    sink.show_row(steps_done + 1, {"train/loss": 0.5})
    sink.show_picture(steps_done + 1, "train/views", Image.new("RGB", (2, 2)))
    sink.close()
    return FakeTracker.opened[-1]


def run_name(tracker: FakeTracker) -> str:
    return str(tracker.arguments.get("id") or tracker.hash)


def test_rows_settings_and_pictures_reach_the_tracker(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"config": {"batch": 8}, "deepspeed": {}}))
    tracker = run_once(name, tmp_path)
    assert tracker.project == "mocov3-ds"
    (settings,) = (call[1] for call in tracker.calls if call[0] == "settings")
    assert settings["batch"] == 8
    rows = [call[1:] for call in tracker.calls if call[0] == "row"]
    if name == "wandb":  # it wants ever larger steps, and a resumed run repeats some
        assert rows == [(None, {"step": 1, "train/loss": 0.5})]
        assert ("metric", "*", "step") in tracker.calls
    else:
        assert rows == [(1, {"train/loss": 0.5})]
    assert [call[2] for call in tracker.calls if call[0] == "picture"] == ["train/views"]
    assert tracker.calls[-1] == ("finish",)


def test_a_continued_run_goes_on_in_the_same_run(name: str, tmp_path: Path) -> None:
    first = run_once(name, tmp_path)
    kept = (tmp_path / "trackers" / name).read_text().strip()
    assert kept == run_name(first)
    second = run_once(name, tmp_path, steps_done=1)
    assert kept in (second.arguments.get("id"), second.arguments.get("run_hash"))
    assert "settings" not in [call[0] for call in second.calls]


def test_a_run_that_the_tracker_has_lost_begins_anew(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers" / name).write_text("of-old\n")

    class OneIsLost(FakeTracker):
        def start(self) -> None:
            if "of-old" in self.arguments.values():
                raise RuntimeError("there is no run of-old")
            super().start()

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, OneIsLost)
    with caplog.at_level(logging.WARNING):
        tracker = run_once(name, tmp_path)
    assert f"--log {name} cannot go on in its run of-old, so it begins another" in caplog.text
    assert (tmp_path / "trackers" / name).read_text().strip() == run_name(tracker) != "of-old"


def test_a_project_is_named_by_the_trackers_own_variable(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(trackers._KINDS[name].project_variable, "ours")
    assert run_once(name, tmp_path).project == "ours"


def test_each_logger_has_a_sink_and_each_tracker_is_accelerates() -> None:
    names = get_args(Logger)
    assert list(sink_openers(names)) == list(names)
    assert set(names) == {"tensorboard", "csv", *trackers._KINDS}
    assert set(trackers._KINDS) < set(tracking.LOGGER_TYPE_TO_CLASS)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    check_loggers(["tensorboard", "csv"])
    with pytest.raises(ValueError, match="--log comet_ml needs the package comet_ml, which is not"):
        check_loggers(["csv", "comet_ml"])
