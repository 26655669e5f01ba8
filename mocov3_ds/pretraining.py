"""Pretraining from Python: `mocov3_ds.pretrain`, over the same function as the command line.

    run = mocov3_ds.pretrain("tiny", epochs=4, backbone=my_network, data=my_dataset)
    run.knn(), run.encoder(), run.metrics(), run.report()

Each keyword is a flag of `train.py` and is read by the same parser: `model={"depth": 2}` is
`--model.depth 2`. A call leaves the process as it was: process group, heartbeat, signals, variables
of the environment and random numbers.
"""

import contextlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn

from mocov3_ds import train as training_command
from mocov3_ds.checkpoints import run_status
from mocov3_ds.checkpoints.checkpoint import list_checkpoints
from mocov3_ds.config.run_config import Config
from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.own_images import MapStyle, OwnImages, hold_set
from mocov3_ds.distributed import heartbeat, ranks
from mocov3_ds.distributed.engine import release_engine
from mocov3_ds.encoders.choices import EncoderRole
from mocov3_ds.encoders.load import load_encoder
from mocov3_ds.evaluation.commands import evaluate_knn
from mocov3_ds.evaluation.flags import KnnOptions
from mocov3_ds.evaluation.results import read_results
from mocov3_ds.faults import exit_status
from mocov3_ds.model.loss import PairLoss
from mocov3_ds.model.own_backbones import register_backbone
from mocov3_ds.monitoring.metrics_file import read_rows
from mocov3_ds.monitoring.run_review import RunReview
from mocov3_ds.recipes import parse
from mocov3_ds.settings.spelling import did_you_mean
from mocov3_ds.training.run import Run

Watcher = Callable[[Run, Mapping[str, Any]], object]
"""gets the run at work and the row of the log, on every rank; what it returns does not count"""
Images = str | Path | OwnImages | MapStyle
"""shards or a folder of images, or a dataset in memory"""


@dataclass(frozen=True)
class PretrainedRun:
    """A run in its folder, seen from Python; nothing of it is held in memory but a given dataset.

    Args:
        folder: the run folder.
        sets: datasets in memory that the run was given.
    """

    folder: Path
    sets: tuple[Manifest, ...] = ()

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end."""
        return run_status.describe_status(self.folder, 0.0)[0] == run_status.FINISHED_STATUS

    def encoder(self, which: EncoderRole = "base", *, image_size: int = 0) -> nn.Module:
        """The trained backbone, fp32, in eval mode; see `mocov3_ds.load_encoder`.

        Args:
            which: base or momentum encoder.
            image_size: side of an image, pixels; 0 = as trained.
        """
        return load_encoder(self.folder, which, image_size=image_size)

    def knn(self, which: EncoderRole = "base", *, k: int = 200, temperature: float = 0.07) -> float:
        """Top-1 of the weighted k-NN classifier in percent, as `mocov3 knn` measures it.

        Args:
            which: base or momentum encoder.
            k: number of neighbours that vote.
            temperature: a neighbour of cosine s votes with exp(s / temperature).

        Raises:
            ValueError: the run has no labelled held-out images.
        """
        options = KnnOptions(run=self.folder, which=which, k=k, temperature=temperature)
        with _own_group():
            evaluate_knn(options)
            ranks.barrier()
        return float(read_results(self.folder)[f"knn {which}"]["top1"])

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of `metrics.jsonl`, one for each step; see mocov3_ds/monitoring/README.md."""
        return read_rows(self.folder / "metrics.jsonl")

    def report(self) -> str:
        """How far the run came, its loss and k-NN accuracies, and what is wrong with it."""
        rows = self.metrics()
        last = next((row for row in reversed(rows) if "loss" in row), {"step": 0})
        review = RunReview(last["step"])
        for row in rows:
            review.push(row)
        saved = list_checkpoints(self.folder)
        state = "finished" if self.is_finished else "not finished"
        lines = [f"{self.folder}: {state}, {last['step']} steps, {last.get('epoch', 0):g} epochs"]
        if "loss" in last:
            lines.append(f"loss:     {last['loss']:.4g} (chance {last['chance_loss']:.4g})")
        if accuracies := [row["knn_full"] for row in rows if "knn_full" in row]:
            lines.append("k-NN:     " + " % -> ".join(f"{a:.2f}" for a in accuracies) + " %")
        lines += [f"saved:    {saved[-1]}"] if saved else []
        return "\n".join([*lines, *(f"warning:  {line}" for line in review.summarise())])


def pretrain(
    recipe: str | None = None,
    *,
    backbone: str | nn.Module | Callable[[], nn.Module] | None = None,
    data: Images | None = None,
    probes: Images | None = None,
    data_settings: Mapping[str, Any] | None = None,
    loss: PairLoss | None = None,
    on_step: Watcher | None = None,
    on_epoch: Watcher | None = None,
    **settings: Any,
) -> PretrainedRun:
    """Pretrain an encoder, or go on with the run in its folder; each rank of a launcher must call.

    Args:
        recipe: named starting point; None = "tiny", or with `extend` the other run's.
        backbone: name for `--model.backbone`, a module (B, C, H, W) -> (B, D) whose copies are
            trained from its weights, or a function that makes one.
        data: training images: a folder or URL of shards, a folder of images, an `OwnImages`, or any
            map-style dataset of images (see `OwnImages`).
        probes: labelled held-out images for the k-NN monitor: shards, a folder of class folders, or
            a dataset.
        data_settings: the flags of the group `data`, such as `{"threads": 8}`.
        loss: loss to train with; None = the paper's.
        on_step: called after each step.
        on_epoch: called after the last step of each epoch.
        settings: flags by name; groups as dicts (`views={"image_size": 32}`), DeepSpeed's settings
            as `ds={"zero_optimization": {"stage": 2}}`, views of one's own as `views={"function":
            my_view}`.

    Returns:
        the run, whether it came to its end or was told to stop after some steps.

    Raises:
        ValueError: a setting that cannot be, or anything else that a user can have wrong.
    """
    sets: list[Manifest] = []
    settings = {**settings, "data": dict(data_settings or {})}
    if backbone is not None:
        name = backbone if isinstance(backbone, str) else register_backbone(backbone)
        settings = _with_setting(settings, "model", "backbone", name)
    for images, key in ((data, "shards"), (probes, "probe_shards")):
        if images is not None:
            key, address = _find_address(images, key, sets)
            settings = _with_setting(settings, "data", key, address)
    flags = [] if recipe is None else ["--recipe", recipe]
    parsed = _parse_quietly([*flags, *flags_of(settings)])
    with _own_group(), _own_random_numbers():
        try:
            run = training_command.train(parsed, loss, on_step=_watch(on_step, on_epoch))
        except BaseException as error:
            if ranks.world_size() > 1:  # the others learn why, and end
                ending = exit_status.describe_ending(error)
                heartbeat.report_failure(ending.status, ending.sentence)
            raise
        finally:
            heartbeat.stop()
        release_engine(run.engine)
        ranks.barrier()
    return PretrainedRun(parsed.config.folder, tuple(sets))


def _watch(on_step: Watcher | None, on_epoch: Watcher | None) -> Watcher | None:
    """One function that calls both when it is their time."""
    if on_step is None and on_epoch is None:
        return None

    def watch(run: Run, row: Mapping[str, Any]) -> None:
        if on_step is not None:
            on_step(run, row)
        if on_epoch is not None and run.step % run.loader.order.batches_per_epoch == 0:
            on_epoch(run, row)

    return watch


def _find_address(images: Images, key: str, sets: list[Manifest]) -> tuple[str, str]:
    """Setting and address of images; a dataset in memory is kept in `sets`."""
    if isinstance(images, str | Path):
        is_folder = "://" not in str(images) and not (Path(images) / manifests.NAME).exists()
        return ("images" if is_folder and key == "shards" else key), str(images)
    dataset = images if isinstance(images, OwnImages) else OwnImages(images)
    sets.append(dataset.describe_set())
    return key, hold_set(sets[-1])


def _with_setting(settings: Mapping[str, Any], group: str, name: str, value: str) -> dict[str, Any]:
    in_group = settings.get(group, {})
    if name in in_group:
        raise ValueError(f"{group}.{name} is given twice; leave it out of {group}={{...}}.")
    return {**settings, group: {**in_group, name: value}}


# --------------------------------------------------------------------------- keywords into flags


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """Keywords as the words of a command line.

    Args:
        settings: values by the names of `config.Config`; groups are mappings, and None is left out.

    Raises:
        ValueError: there is no such setting.
    """
    settings = dict(settings)
    overrides = settings.pop("ds", ())
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={json.dumps(value)}" for key, value in _flatten(overrides)]
    flags = [word for override in overrides for word in ("--ds", override)]
    return [*_flags_of_group(settings, Config(), ""), *flags]


def _flags_of_group(settings: Mapping[str, Any], defaults: Any, prefix: str) -> Iterator[str]:
    names = [field.name for field in fields(defaults)]
    for name, value in settings.items():
        if name not in names:
            hint = did_you_mean(name, names)
            raise ValueError(f"there is no setting {prefix}{name}{hint}.")
        default = getattr(defaults, name)
        if is_dataclass(default):
            if not isinstance(value, Mapping):
                raise ValueError(f"{prefix}{name} takes a dict of settings, not {value!r}.")
            yield from _flags_of_group(value, default, f"{prefix}{name}.")
        elif isinstance(value, bool):
            yield f"--{prefix}{'' if value else 'no-'}{name}"
        elif isinstance(value, list | tuple) and name == "group_lr":
            yield from (word for item in value for word in (f"--{prefix}{name}", str(item)))
        elif isinstance(value, list | tuple):
            yield from (f"--{prefix}{name}", *map(_as_word, value))
        elif value is not None:
            yield from (f"--{prefix}{name}", _as_word(value))


def _as_word(value: object) -> str:
    """A value on a command line; of a function, such as one that makes views, where it is found."""
    if not isinstance(value, FunctionType):
        return str(value)
    if "<" in value.__qualname__:
        raise ValueError(
            f"{value.__qualname__} is defined inside of another function, where threads and a "
            "resumed run do not find it; define it in a module."
        )
    return f"{value.__module__}:{value.__qualname__}"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings of a DeepSpeed JSON by their paths; a block that names its type is one of them."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and "type" not in value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parse_quietly(flags: list[str]) -> Any:
    """Settings of a command line; what the parser prints and its exit become a ValueError."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return parse(flags)
    except SystemExit:
        message = " ".join(re.sub(r"[─-╿]", " ", printed.getvalue()).split())
        raise ValueError(f"settings that cannot be: {message}") from None


# ------------------------------------------------------------------------- the process as it was


@contextlib.contextmanager
def _own_group() -> Iterator[None]:
    """Within, there may be a process group; it is left at the end unless it was there before."""
    was_there, environment = ranks.has_group(), dict(os.environ)
    try:
        yield
    finally:
        if not was_there:
            ranks.stop()
        for name in {*os.environ} - {*environment}:
            del os.environ[name]
        os.environ.update(environment)


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Within, torch may be seeded, deterministic, or use TF32; afterwards it is as before."""
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic)
        torch.set_float32_matmul_precision(tf32[0])
        torch.backends.cudnn.allow_tf32 = tf32[1]
