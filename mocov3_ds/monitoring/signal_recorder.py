"""What is measured of a run beside its loss, where it is written, and the alarms it raises.

    recorder.prepare_step(steps_done)          what the coming step measures
    lr = recorder.adjust_rate(steps_done, lr)  its learning rate, lower for a while after an alarm
    row |= recorder.record(step, row, ...)     the signals and alarms of the step just done

The optimizer measures each tensor in its own pass (`optim.signals`). The recorder joins that with
the spread of queries and keys, the attention and the k-NN accuracies into one row per step
(`signal_file`). An alarm on the first trained layer group (`alarms`) writes the rows before it and
the samples of its step to RUN/alarms, and may start a response (`alarm_response`).

Every number here is the same on all ranks, so all of them respond alike. The history of the alarms
is part of each checkpoint: a resumed run raises the same alarms as an unbroken one.

Shape suffixes: B = rank batch, C H W = image, P = head output, C = columns of a row.
"""

import json
import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mocov3_ds.checkpoints.checkpoint import Checkpoint
from mocov3_ds.config.run_config import Config
from mocov3_ds.data import storage
from mocov3_ds.data.fetch import locate_sample
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.storage import atomic
from mocov3_ds.distributed import ranks
from mocov3_ds.model.backbones import BackboneFacts, evaluating
from mocov3_ds.model.layer_groups import HEAD_GROUPS
from mocov3_ds.monitoring.alarm_response import AlarmResponse
from mocov3_ds.monitoring.alarms import RULES, AlarmRule, Alarms
from mocov3_ds.monitoring.block_signals import block_signals
from mocov3_ds.monitoring.embedding_spread import feature_signals
from mocov3_ds.monitoring.signal_file import INSTRUMENTS, SCALARS, Floats, GroupExtremes, SignalFile
from mocov3_ds.optim.sharded import ShardedOptimizer

_ATTENTION_IMAGES = 8
_ALARM_ROWS = 50  # rows before an alarm that its file keeps
_RARE_VALUES = ("knn", *INSTRUMENTS)  # a step that has one has a row
_QUIET_STEPS = 20  # a new alarm gets a file of its own only after so many steps without one

_log = logging.getLogger("mocov3_ds")


class SignalRecorder:
    """Measures a run, writes RUN/signals.f32, and raises alarms.

    Args:
        config: The settings of the run.
        optimizer: The run's optimizer, which measures each tensor in its steps.
        facts: What is known of the backbone: its layer groups and its attention.
        tensor_groups: Layer group of each trained tensor, in the optimizer's order.
        manifest: Manifest of the training shards, to name the samples of a step.
        saved: The checkpoint that the run continues from; None = it starts from scratch.
        rules: The rules that raise alarms, by name.
    """

    def __init__(
        self,
        config: Config,
        optimizer: ShardedOptimizer,
        facts: BackboneFacts,
        tensor_groups: Sequence[str],
        manifest: Manifest,
        saved: Checkpoint | None,
        rules: Mapping[str, AlarmRule] = RULES,
    ) -> None:
        self.config, self._optimizer, self._manifest = config, optimizer, manifest
        self._groups = (*facts.groups, *HEAD_GROUPS)
        self._has_blocks = facts.attention_blocks > 0
        if config.signals.attention_every and not self._has_blocks and ranks.is_first():
            _log.info("attention is not measured: the backbone has no blocks of a plain ViT")
        self._group_extremes = GroupExtremes(self._groups, tensor_groups)
        trained_groups = [g for g in self._groups if g in tensor_groups and g != "cls"]
        self._alarm_group = trained_groups[0] if trained_groups else ""
        self._alarms = Alarms(rules)
        self._response = AlarmResponse(config.alarm, optimizer)
        self._quiet_until = 0
        if saved is not None and "watch" in saved.state:
            state = saved.state_value("watch")
            self._alarms.load(state["alarms"])
            self._response.active_until = state["answer_until"]
            self._quiet_until = state["quiet_until"]
        self.layer_values: dict[str, float] = {}
        """what was measured of the layer groups in the last step, GROUP/SIGNAL -> number"""
        self._file: SignalFile | None = None
        self._recent: deque[Floats] = deque(maxlen=_ALARM_ROWS)
        if config.signals.every and ranks.is_first():
            steps_done = saved.step if saved is not None else 0
            self._file = SignalFile(config.folder, self._groups, steps_done=steps_done)

    def prepare_step(self, steps_done: int) -> None:
        """Tell the optimizer what to measure in the coming step, and whether to clip its updates.

        Args:
            steps_done: Number of optimizer steps done before the coming one.
        """
        self._optimizer.measure_all(_is_due(steps_done + 1, self.config.signals.every))
        self._response.switch_clip(steps_done)

    def adjust_rate(self, steps_done: int, lr: float) -> float:
        """Return the learning rate of the coming step, lower while an alarm's response lasts.

        Args:
            steps_done: Number of optimizer steps done before the coming one.
            lr: Learning rate that the schedule gives.
        """
        return self._response.adjust_rate(steps_done, lr)

    def record(
        self,
        step: int,
        row: Mapping[str, Any],
        *,
        sample_ids_B: Tensor,
        x1_BCHW: Tensor,
        pair: tuple[Tensor, Tensor],
        backbone: nn.Module,
    ) -> dict[str, Any]:
        """Write the row of the step just done; all ranks must call.

        Args:
            step: Number of that step, from 1.
            row: Values that the log has of the step, such as `lr`, `loss`, `applied`, `knn`.
            sample_ids_B: Numbers of the samples in this rank's batch.
            x1_BCHW: First views of this rank, as the network got them.
            pair: Queries of view 1 and keys of view 2, (B, P) each.
            backbone: Backbone of the base encoder, for its attention.

        Returns:
            What the log should say: `spread` of the queries (1 = even on the sphere, 0 = all
            alike) where it was measured, `alarms` and `response`; empty in most steps.
        """
        signals = self.config.signals
        self.layer_values = {}
        if not signals.every:
            return {}
        values = {name: float(row[name]) for name in SCALARS if name in row}
        is_due = _is_due(step, signals.every) or any(name in row for name in _RARE_VALUES)
        entries: dict[str, Any] = {}
        if _is_due(step, signals.features_every):
            values |= feature_signals(*pair)
            entries["spread"] = values["features_std"] * math.sqrt(pair[0].shape[1])
            is_due = True
        if self._has_blocks and _is_due(step, signals.attention_every):
            values |= _measure_blocks(backbone, x1_BCHW)
            is_due = True
        if _is_due(step, signals.every) and row["applied"]:
            tensor_signals = self._optimizer.signals()
            assert tensor_signals is not None, "an applied step was measured"
            values |= self._group_extremes.reduce_tensors(tensor_signals.table())
        if self._file is not None and is_due:
            self._recent.append(self._file.write_row(values))
            self.layer_values = {
                name: value
                for name, value in values.items()
                if "/" in name and not math.isnan(value)
            }
        if not _is_due(step, signals.every):
            return entries
        return entries | self._raise_alarms(step, sample_ids_B, values)

    def _raise_alarms(
        self, step: int, sample_ids_B: Tensor, values: Mapping[str, float]
    ) -> dict[str, Any]:
        rms, grad_linf = (
            values.get(f"{self._alarm_group}/{name}", math.nan) for name in ("rms", "grad_linf")
        )
        alarms = self._alarms.push(rms, grad_linf)
        if not alarms:
            return {}
        if step > self._quiet_until:
            self._write_alarm(step, sample_ids_B, alarms)
        self._quiet_until = step + _QUIET_STEPS
        response = self._response.start(step)
        return {"alarms": list(alarms)} | ({"response": response} if response else {})

    def _write_alarm(self, step: int, sample_ids_B: Tensor, alarms: tuple[str, ...]) -> None:
        """Write the rows before an alarm and the samples of its step, to look for the cause."""
        sample_ids_G = ranks.all_gather_cat(sample_ids_B.to(ranks.this_device())).tolist()
        if self._file is None:
            return
        folder = self.config.folder / "alarms"
        folder.mkdir(exist_ok=True)
        content = {
            "step": step,
            "alarms": alarms,
            "group": self._alarm_group,
            "samples": _describe_samples(self._manifest, sample_ids_G),
            "columns": self._file.columns,
            "rows": [_as_json(row_C) for row_C in self._recent],
        }
        try:
            atomic.write_text(folder / f"step-{step:08d}.json", json.dumps(content))
        except OSError as error:  # no reason to end a run
            _log.warning("the alarm of step %d is not written down: %s", step, error)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold for the alarms to go on unchanged, as JSON values."""
        return {
            "alarms": self._alarms.state(),
            "answer_until": self._response.active_until,
            "quiet_until": self._quiet_until,
        }

    def close(self) -> None:
        """Finish writing RUN/signals.f32."""
        if self._file is not None:
            self._file.close()


def _measure_blocks(backbone: nn.Module, x1_BCHW: Tensor) -> dict[str, float]:
    assert isinstance(backbone, VisionTransformer), "only a ViT has attention blocks"
    with evaluating(backbone):
        return block_signals(backbone, x1_BCHW[:_ATTENTION_IMAGES])


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _describe_samples(manifest: Manifest, sample_ids: list[int]) -> list[dict[str, Any]]:
    """Return id, shard and key of each sample.

    The key of a sample in an object store would cost a request, so there it is only the id.
    """
    if not storage.is_local(manifest.shards_url):
        return [{"id": sample_id} for sample_id in sample_ids]
    samples = []
    for sample_id in sample_ids:
        shard, key = locate_sample(manifest, sample_id)
        samples.append({"id": sample_id, "shard": shard, "key": key})
    return samples


def _as_json(row_C: Floats) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in row_C]
