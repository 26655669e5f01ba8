"""Watch a run beside its loss: measure, write RUN/signals.f32, raise early alarms, answer them.

    lr = job.watch.begin(job.step, lr)                 what the coming step measures, its rate
    row |= job.watch.record(job, batch, x1_BCHW, row)  its signals and alarms

The optimizer's own pass measures each tensor (optim/), this file joins that with the spread of the
features, the attention and the k-NN accuracies into one row a step (monitor/signals.py). An alarm
on the first trained layer (monitor/alarm.py) writes the rows before it and the step's samples to
RUN/alarms, and may be answered for some steps by StableAdamW's update clip or by half the learning
rate.

Every number here is the same on all ranks, so all of them answer alike. The alarms' history is part
of each checkpoint: a resumed run raises and answers what an unbroken one does.

Shape suffixes: B = rank batch, C H W = image, C = columns.
"""

import json
import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from mocov3_ds.checkpoints.checkpoint import Checkpoint
from mocov3_ds.config import Config
from mocov3_ds.data.fetch import key_of
from mocov3_ds.data.loader import Batch
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.storage import atomic
from mocov3_ds.distributed import ranks
from mocov3_ds.model.layer_groups import group_names
from mocov3_ds.monitoring.alarms import Alarms
from mocov3_ds.monitoring.attention import attention_extremes, middle_and_ends
from mocov3_ds.monitoring.embedding_spread import feature_signals
from mocov3_ds.monitoring.signal_file import SCALARS, ByGroup, Floats, SignalFile

if TYPE_CHECKING:
    from mocov3_ds.training.run import Run

_log = logging.getLogger("mocov3_ds")

_IMAGES = 8  # whose attention is looked at
_ROWS = 50  # that an alarm keeps
_QUIET = 20  # steps after which a new alarm is a new episode, with a file of its own


class Watch:
    """What is measured of a run, where it goes, and what an alarm does.

    Args:
        config: of the run.
        optimizer: one of ours.
        of_tensors: layer group of each trained tensor, in the optimizer's order.
        manifest: of the training shards.
        saved: checkpoint that the run goes on from.
    """

    def __init__(
        self,
        config: Config,
        optimizer: Any,
        of_tensors: Sequence[str],
        manifest: Manifest,
        saved: Checkpoint | None,
    ) -> None:
        self.config, self._optimizer, self._manifest = config, optimizer, manifest
        self._groups = group_names(config.model.depth)
        self._by_group = ByGroup(self._groups, of_tensors)
        self._layer = next((g for g in self._groups if g in of_tensors and g != "cls"), "")
        self._alarms = Alarms()
        self._answer_until = self._quiet_until = 0
        if saved is not None and "watch" in saved.state:
            state = saved.value("watch")
            self._alarms.load(state["alarms"])
            self._answer_until, self._quiet_until = state["answer_until"], state["quiet_until"]
        self._file: SignalFile | None = None
        self._recent: deque[Floats] = deque(maxlen=_ROWS)
        if config.signals.every and ranks.is_first():
            done = saved.step if saved is not None else 0
            self._file = SignalFile(config.folder, self._groups, steps_done=done)

    def begin(self, step: int, lr: float) -> float:
        """Prepare the step after `step`: what it measures, and its learning rate."""
        every, response = self.config.signals.every, self.config.alarm.response
        self._optimizer.watch = bool(every) and (step + 1) % every == 0
        answering = step < self._answer_until
        if response == "clip":
            self._optimizer.set_update_clip(answering)
        return lr / 2 if response == "halve_lr" and answering else lr

    def record(
        self, job: "Run", batch: Batch, x1_BCHW: Tensor, row: dict[str, Any]
    ) -> dict[str, Any]:
        """Write the row of the step just done; all ranks must call.

        Args:
            job: the run; its `step` counts the step.
            batch: what it was fed.
            x1_BCHW: first views of this rank.
            row: what the log knows of the step.

        Returns:
            what the log should say of alarms; empty in most steps.
        """
        signals, step = self.config.signals, job.step
        if not signals.every:
            return {}
        values = {name: float(row[name]) for name in SCALARS if name in row}
        few = len(values)
        if _due(step, signals.features_every):
            values |= feature_signals(*job.engine.module.pair)
        if _due(step, signals.attention_every):
            values |= self._attention(job, x1_BCHW)
        if self._optimizer.watch and row["applied"]:
            values |= self._by_group(self._optimizer.signals().table())
        measured = len(values) > few or "knn" in row or _due(step, signals.every)
        if self._file is not None and measured:
            self._recent.append(self._file.write(values))
        return self._raise(job, batch, values) if _due(step, signals.every) else {}

    def _attention(self, job: "Run", x1_BCHW: Tensor) -> dict[str, float]:
        backbone = job.backbone
        was_training = backbone.training
        backbone.eval()
        blocks = middle_and_ends(self.config.model.depth)
        found = attention_extremes(backbone, x1_BCHW[:_IMAGES], blocks)  # type: ignore[arg-type]
        backbone.train(was_training)
        values: dict[str, float] = {}
        for index, (logit, entropy) in found.items():
            values |= {f"block_{index}/max_logit": logit, f"block_{index}/entropy": entropy}
        return values

    def _raise(self, job: "Run", batch: Batch, values: dict[str, float]) -> dict[str, Any]:
        rms, grad = (values.get(f"{self._layer}/{name}", math.nan) for name in ("rms", "grad_linf"))
        raised = self._alarms.push(rms, grad)
        if not raised:
            return {}
        step, alarm = job.step, self.config.alarm
        if step > self._quiet_until:
            self._dump(job, batch, raised)
        self._quiet_until = step + _QUIET
        told: dict[str, Any] = {"alarms": list(raised)}
        if alarm.response != "none":
            self._answer_until = step + alarm.steps
            told["response"] = alarm.response
        return told

    def _dump(self, job: "Run", batch: Batch, raised: tuple[str, ...]) -> None:
        """The rows before an alarm and the samples of its step, for who looks for the cause."""
        ids_G = ranks.all_gather_cat(batch.ids_B.to(job.device)).tolist()
        if self._file is None:
            return
        folder = self.config.folder / "alarms"
        folder.mkdir(exist_ok=True)
        content = {
            "step": job.step,
            "alarms": raised,
            "group": self._layer,
            "samples": _samples(self._manifest, ids_G),
            "columns": self._file.columns,
            "rows": [_as_json(row_C) for row_C in self._recent],
        }
        try:
            atomic.write_text(folder / f"step-{job.step:08d}.json", json.dumps(content))
        except OSError as error:  # the run needs it less than the disk
            _log.warning("the alarm of step %d is not written down: %s", job.step, error)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for the alarms to go on unchanged, as JSON values."""
        return {
            "alarms": self._alarms.state(),
            "answer_until": self._answer_until,
            "quiet_until": self._quiet_until,
        }

    def close(self) -> None:
        """Finish the file."""
        if self._file is not None:
            self._file.close()


def check_response(config: Config, optimizer: Any) -> None:
    """Whether the optimizer can do what an alarm asks of it.

    Raises:
        ValueError: `--alarm.response clip` without an update clip that is off until then.
    """
    if config.alarm.response != "clip":
        return
    if not hasattr(optimizer, "set_update_clip"):
        raise ValueError(
            f"--alarm.response clip needs AdamW: the trust ratio of {type(optimizer).__name__} "
            "sets the length of its steps; use halve_lr."
        )
    if optimizer.param_groups[0]["update_clip"]:
        raise ValueError(
            "--alarm.response clip has no effect: the optimizer's update_clip is always on."
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _samples(manifest: Manifest, ids: list[int]) -> list[dict[str, Any]]:
    """Shard and key of each sample; ids alone where each key would be a request to a store."""
    if "://" in manifest.url:
        return [{"id": sample} for sample in ids]
    found = []
    for sample in ids:
        shard, key = key_of(manifest, sample)
        found.append({"id": sample, "shard": shard, "key": key})
    return found


def _as_json(row_C: Floats) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in row_C]
