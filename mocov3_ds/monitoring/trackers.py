"""Trackers of other makers as sinks, through accelerate: Weights & Biases, MLflow, Trackio, ...

Accelerate knows how each is started and fed. What it leaves open stands in `_KINDS`: where a
tracker's files go, how a continued run comes to the same run of the tracker, how a picture is
shown. The tracker's name of the run is kept in RUN/trackers/NAME.

Servers, keys and offline modes are what the trackers' own variables say (WANDB_MODE=offline,
MLFLOW_TRACKING_URI, TRACKIO_DIR, COMET_START_ONLINE=0, SWANLAB_MODE=offline, ...); no key passes
through here.
"""

import importlib.util
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mocov3_ds.data.storage import atomic
from mocov3_ds.monitoring.run_facts import read_facts
from mocov3_ds.monitoring.sinks import CsvSink, SinkOpener, TensorBoardSink

PROJECT = "mocov3-ds"
"""project of a run's trackers, where no variable of theirs names another"""

_OWN: Mapping[str, SinkOpener] = {"tensorboard": TensorBoardSink, "csv": CsvSink}

Tracker = Any
"""a `GeneralTracker` of accelerate, which has no types"""


@dataclass(frozen=True)
class Place:
    """Which run a tracker shows."""

    run: Path
    """run folder"""
    run_id: str
    """the tracker's own name of its run; empty = it chooses one"""

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.run.absolute().name


@dataclass(frozen=True)
class _Kind:
    """What accelerate does not know of a tracker."""

    package: str
    """name in the package index"""
    project_variable: str
    arguments: Callable[[Place], dict[str, Any]]
    """keywords of accelerate's class"""
    show: Callable[[Tracker, str, Image.Image, int], object]
    """shows a picture, given its name and the step"""
    find_id: Callable[[Tracker], str] | None = None
    """the tracker's own name of its run; None = we choose it"""
    prepare: Callable[[Tracker, Place], object] = lambda *_: None
    """called once the tracker is open"""
    counts_steps: bool = True
    """whether steps may come again, as they do after a resume; else they are an ordinary value"""


def _show_list(tracker: Tracker, name: str, picture: Image.Image, step: int | None) -> None:
    tracker.log_images({name: [picture]}, step=step)


def _show_in_mlflow(tracker: Tracker, name: str, picture: Image.Image, step: int) -> None:
    import mlflow

    mlflow.log_image(picture, f"{name}-{step}.png")


def _show_in_trackio(tracker: Tracker, name: str, picture: Image.Image, step: int) -> None:
    import trackio

    tracker.log({name: trackio.Image(picture)}, step=step)


_CLEARML_HOOKS = (
    "matplotlib", "tensorflow", "tensorboard", "pytorch", "xgboost", "scikit", "fastai", "lightgbm",
    "hydra", "tfdefines", "joblib", "megengine", "catboost", "gradio", "jsonargparse",
    "detect_repository",
)  # fmt: skip
"""what ClearML would change in libraries, and a look at all imports that takes minutes"""


_KINDS: Mapping[str, _Kind] = {
    "wandb": _Kind(
        package="wandb",
        project_variable="WANDB_PROJECT",
        arguments=lambda place: {
            "name": place.name,
            "id": place.run_id,
            "resume": "allow",
            "dir": os.environ.get("WANDB_DIR", str(place.run)),
            "settings": {"console": "off"},
        },
        prepare=lambda tracker, _: tracker.run.define_metric("*", step_metric="step"),
        show=lambda tracker, name, picture, _: _show_list(tracker, name, picture, None),
        counts_steps=False,
    ),
    "mlflow": _Kind(
        package="mlflow",
        project_variable="MLFLOW_EXPERIMENT_NAME",
        arguments=lambda place: {"run_id": place.run_id or None, "run_name": place.name},
        find_id=lambda tracker: tracker.active_run.info.run_id,
        show=_show_in_mlflow,
    ),
    "trackio": _Kind(
        package="trackio",
        project_variable="TRACKIO_PROJECT",
        arguments=lambda place: {"name": f"{place.name}-{place.run_id}", "resume": "allow"},
        show=_show_in_trackio,
    ),
    "comet_ml": _Kind(
        package="comet_ml",
        project_variable="COMET_PROJECT_NAME",
        arguments=lambda place: {"experiment_key": place.run_id, "mode": "get_or_create"},
        prepare=lambda tracker, place: tracker.writer.set_name(place.name),
        show=lambda tracker, name, picture, step: tracker.writer.log_image(
            picture, name=name, step=step
        ),
    ),
    "swanlab": _Kind(
        package="swanlab",
        project_variable="SWANLAB_PROJ_NAME",
        arguments=lambda place: {
            "experiment_name": place.name,
            "id": place.run_id,
            "resume": "allow",
            "logdir": os.environ.get("SWANLAB_LOG_DIR", str(place.run / "swanlab")),
        },
        show=_show_list,
    ),
    "clearml": _Kind(
        package="clearml",
        project_variable="CLEARML_PROJECT",
        arguments=lambda place: {
            "task_name": place.name,
            "reuse_last_task_id": place.run_id or False,
            "continue_last_task": 0 if place.run_id else False,  # steps are counted by us
            "auto_connect_frameworks": dict.fromkeys(_CLEARML_HOOKS, False),
            "auto_connect_arg_parser": False,
            "auto_connect_streams": False,
        },
        find_id=lambda tracker: tracker.task.id,
        show=lambda tracker, name, picture, step: tracker.log_images(
            {name: np.asarray(picture)}, step=step
        ),
    ),
    "aim": _Kind(
        package="aim",
        project_variable="AIM_PROJECT",
        arguments=lambda place: {
            "logging_dir": os.environ.get("AIM_REPO", str(place.run.absolute().parent)),
            "run_hash": place.run_id or None,
        },
        find_id=lambda tracker: tracker.writer.hash,
        show=lambda tracker, name, picture, step: tracker.log_images({name: picture}, step=step),
    ),
    "dvclive": _Kind(
        package="dvclive",
        project_variable="DVCLIVE_PROJECT",
        arguments=lambda place: {
            "dir": str(place.run / "dvclive"),
            "resume": True,
            "save_dvc_exp": False,
            "report": None,
            "dvcyaml": None,
        },
        show=lambda tracker, name, picture, step: tracker.live.log_image(
            f"{name}-{step}.png", picture
        ),
    ),
}


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers whose package is not installed here.

    Args:
        names: Names as `--log` takes them.

    Raises:
        ValueError: A package is missing; the sentence says which.
    """
    for name in names:
        if name not in _OWN and importlib.util.find_spec(name) is None:
            package = _KINDS[name].package
            raise ValueError(
                f"--log {name} needs the package {package}, which is not installed; "
                f"pip install {package}, or leave it out."
            )


def sink_openers(names: Sequence[str]) -> dict[str, SinkOpener]:
    """Return what opens the sink of each logger.

    Args:
        names: Names as `--log` takes them.
    """
    return {name: _OWN.get(name, partial(TrackerSink, name)) for name in names}


class TrackerSink:
    """Feeds a tracker of another maker.

    A continued run goes on in the tracker's run of before, where the tracker can do that and still
    has it, and in a new one otherwise.

    Args:
        name: Name of the tracker, a key of accelerate's `LOGGER_TYPE_TO_CLASS`.
        run: The run folder.
        steps_done: Number of optimizer steps done.
    """

    def __init__(self, name: str, run: Path, steps_done: int) -> None:
        self._kind = _KINDS[name]
        path = run / "trackers" / name
        earlier_id = path.read_text().strip() if path.exists() else ""
        self._tracker, run_id = _open_tracker(name, run, earlier_id)
        if run_id != earlier_id:
            self._tracker.store_init_configuration(read_facts(run))
            path.parent.mkdir(exist_ok=True)
            atomic.write_text(path, run_id + "\n")

    def show_row(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step.

        Args:
            step: Number of optimizer steps done.
            values: GROUP/NAME -> number, as the run log groups them.
        """
        if self._kind.counts_steps:
            self._tracker.log(dict(values), step=step)
        else:
            self._tracker.log({"step": step, **values})

    def show_picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Log a picture.

        Args:
            step: Number of optimizer steps done.
            name: GROUP/NAME of the picture.
            picture: What is shown, in RGB.
        """
        self._kind.show(self._tracker, name, picture, step)

    def drop_steps_after(self, step: int) -> None:
        """Do nothing: trackers do not forget; steps that come again are logged again."""

    def close(self) -> None:
        """Finish the tracker's run."""
        self._tracker.finish()


def _open_tracker(name: str, run: Path, earlier_id: str) -> tuple[Tracker, str]:
    """Start a tracker; returns it with its name of the run, the earlier one where it goes on."""
    from accelerate import tracking  # takes a while, and is needed for trackers alone

    tracking.logger = _PlainLogger(logging.getLogger(tracking.__name__), {})
    kind = _KINDS[name]
    project = os.environ.get(kind.project_variable, PROJECT)

    def start(run_id: str) -> tuple[Tracker, str]:
        shown_run = Place(run, run_id)
        tracker = tracking.LOGGER_TYPE_TO_CLASS[name](project, **kind.arguments(shown_run))
        # else accelerate takes hold of the device and of the launcher's variables, to learn that
        # this is the first rank
        tracker.main_process_only = False
        tracker.start()
        kind.prepare(tracker, shown_run)
        return tracker, kind.find_id(tracker) if kind.find_id else run_id

    new_id = "" if kind.find_id else uuid.uuid4().hex
    if not earlier_id:
        return start(new_id)
    try:
        return start(earlier_id)
    except Exception as error:
        logging.getLogger("mocov3_ds").warning(
            "--log %s cannot go on in its run %s, so it begins another: %s", name, earlier_id, error
        )
        return start(new_id)


class _PlainLogger(logging.LoggerAdapter[logging.Logger]):
    """Stands in for accelerate's logger, which asks for accelerate's own process state."""

    def warning_once(self, *arguments: Any) -> None:
        """Warn, as accelerate's trackers do of a value that they leave out."""
        self.debug(*arguments)
