"""May a new run go on from a finished one, and where in its own count of steps does it begin?

Data, batch, rates, schedule and precision may change. Architecture, what is trained, loss and
optimizer may not, since weights and moments are carried over. Nothing is ever written to the
other run, called the parent.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mocov3_ds.checkpoints import checkpoint, run_status
from mocov3_ds.checkpoints.checkpoint import Checkpoint
from mocov3_ds.config.run_config import Config, Settings
from mocov3_ds.config.stored import from_json
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.optim.build import base_rate
from mocov3_ds.optim.gradient_clip import read_clip
from mocov3_ds.recipes import read_json
from mocov3_ds.settings.comparison import differences
from mocov3_ds.training.schedule import scaled_rate

_MAY_CHANGE = ("drop_path", "patch_lr", "group_lr")
"""settings of the model that change no tensor, as long as the same tensors are trained"""

_MUONS_TENSORS = ("last_layer", "convolutions")
"""params of Muon that decide which tensors it moves, and so which have a second moment"""


@dataclass(frozen=True)
class Parent:
    """A finished run that a new one goes on from."""

    saved: Checkpoint
    """its last checkpoint"""
    step: int
    """steps of the new run's batch that the parent's samples make: where the new run begins"""
    position: int
    """the same for global batches gone through"""
    has_same_samples: bool
    """whether the new run trains on the same samples"""
    line: str
    """what is carried over and what changes"""
    record: dict[str, Any]
    """the parent as ancestry tells it"""


def read_parent(settings: Settings, train: Manifest, trained: Collection[str]) -> Parent:
    """Find the parent of `--extend` and check that the run may go on from it.

    Args:
        settings: resolved command line of the new run.
        train: manifest of its training shards.
        trained: names of the tensors that it trains.

    Raises:
        ValueError: the parent is not finished or damaged, what may not change has changed, or
            there is nothing left to train.
    """
    config, folder = settings.config, Path(settings.config.extend)
    status, sentence = run_status.describe_status(folder, 0.0)
    if status != run_status.FINISHED_STATUS:
        raise ValueError(
            f"--extend {folder} needs a finished run: {sentence}. Let its own command end it; with "
            "--init its weights alone start another one."
        )
    tree = read_json(folder / "config.json")
    parent_config, engine = from_json(tree), tree["deepspeed"]
    saved = checkpoint.find_newest(folder)
    if saved is None:
        raise ValueError(f"--extend {folder} holds no whole checkpoint.")
    _check_same_network(folder, parent_config, config)
    _check_same_optimizer(folder, engine, settings.engine)
    _check_same_tensors(folder, saved, trained)
    is_same_data = tree.get("data_digest") == train.digest
    epochs, steps_per_epoch = parent_config.epochs, train.samples // config.batch
    step, position = saved.step, saved.position
    if not is_same_data or parent_config.batch != config.batch:
        step = round(epochs * steps_per_epoch)
        position = round(saved.position * step / saved.step)
    if config.epochs <= epochs or round(config.epochs * steps_per_epoch) <= step:
        raise ValueError(
            f"--extend {folder}: it has done {epochs:g} epochs, and --epochs {config.epochs:g} "
            "counts from its start; give more."
        )
    if config.extend_schedule == "new" and config.warmup_epochs > config.epochs - epochs:
        raise ValueError(
            f"--warmup_epochs {config.warmup_epochs:g} are more than the "
            f"{config.epochs - epochs:g} epochs that --extend_schedule new has from {epochs:g} to "
            f"{config.epochs:g}; give fewer."
        )
    record = {
        "kind": "extend",
        "path": str(folder.resolve()),
        "checkpoint": saved.folder.name,
        "digest": str(saved.state.get("digest", "")),
        "epochs": epochs,
        "batch": parent_config.batch,
        "begins_at": step,
    }
    changes = _describe_changes(settings, parent_config, engine, saved, step)
    if not is_same_data:
        changes.append("other training samples, whose epochs are counted on")
    line = f"start: goes on from {saved.folder} with weights, momentum encoder and moments; "
    return Parent(saved, step, position, is_same_data, line + "; ".join(changes), record)


def _describe_changes(
    settings: Settings, parent: Config, engine: Mapping[str, Any], saved: Checkpoint, step: int
) -> list[str]:
    """What lies behind the new run, and what is otherwise in it: batch and rate."""
    config = settings.config
    changes = [f"{parent.epochs:g} epochs before ({saved.step} steps of {parent.batch} images)"]
    if parent.batch != config.batch:
        changes.append(f"counted as {step} steps of {config.batch}")
    base_then, base_now = (base_rate(tree["optimizer"]) for tree in (engine, settings.engine))
    peak_then = scaled_rate(base_then, parent.batch, parent.rate_rule)
    peak_now = scaled_rate(base_now, config.batch, config.rate_rule)
    if (peak_then, base_then) != (peak_now, base_now):
        rules = " -> ".join(dict.fromkeys((parent.rate_rule, config.rate_rule)))
        changes.append(
            f"batch {parent.batch} -> {config.batch}, peak rate {peak_then:.4g} -> {peak_now:.4g} "
            f"(base rate {base_then:.4g} -> {base_now:.4g} per 256 images, {rules} rule)"
        )
    for flag, then, now in (
        ("--compress", parent.compress, config.compress),
        ("--moco.momentum_batch", parent.moco.momentum_batch, config.moco.momentum_batch),
    ):
        if then != now:
            changes.append(f"{flag} {then} -> {now}")
    blocks = [tree.get("optimizer") or {} for tree in (engine, settings.engine)]
    clips = [read_clip(block.get("clip")) for block in blocks]
    if clips[0] != clips[1]:
        then, now = (f"{clip or 'none'}" for clip in clips)
        is_new = clips[1] is not None and type(clips[0]) is not type(clips[1])
        changes.append(f"optimizer.clip {then} -> {now}{', which begins anew' * is_new}")
    return changes


def _check_same_network(folder: Path, before: Config, config: Config) -> None:
    parent_value, own_value = (
        {name: value for name, value in asdict(c.model).items() if name not in _MAY_CHANGE}
        | {"image size": c.backbone.size, "channels": c.backbone.channels}
        for c in (before, config)
    )
    if wrong := list(differences(parent_value, own_value)):
        raise ValueError(
            f"--extend {folder} has another network: {'; '.join(wrong[:4])}. It goes on with "
            "weights and moments as they are; --init takes weights alone."
        )


def _check_same_tensors(folder: Path, saved: Checkpoint, trained: Collection[str]) -> None:
    names = {key.partition("/")[2] for key in saved.tensor_names("optimizer")}
    if names and (wrong := sorted(names ^ {*trained})):
        kind = "trained there, frozen here" if wrong[0] in names else "frozen there, trained here"
        raise ValueError(
            f"--extend {folder}: {wrong[0]} is {kind} ({len(wrong)} such tensors), so its moments "
            "do not go on; --init takes weights alone."
        )


def _check_same_optimizer(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    blocks = [engine.get("optimizer") or {} for engine in (then, now)]
    kinds = [str(block.get("type")) for block in blocks]
    if kinds[0].lower() != kinds[1].lower():
        raise ValueError(
            f"--extend {folder} was trained by {kinds[0]}, whose moments {kinds[1]} cannot take "
            "over; --init takes weights alone."
        )
    for key in _MUONS_TENSORS if kinds[0].lower() == "muon" else ():
        before, after = ((block.get("params") or {}).get(key, "adamw") for block in blocks)
        if before != after:
            raise ValueError(
                f"--extend {folder} was trained by Muon with {key} {before!r}, here it is "
                f"{after!r}, so tensors would change hands without the moments for it; "
                "--init takes weights alone."
            )
