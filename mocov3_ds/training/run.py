"""A pretraining run in memory: its parts and its position; saved, brought back, rewound, closed.

`build` puts the parts together, `advance` does the steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mocov3_ds.checkpoints import run_folder, run_status
from mocov3_ds.checkpoints.checkpoint import Checkpoint
from mocov3_ds.checkpoints.saver import Saver
from mocov3_ds.config.run_config import Config
from mocov3_ds.data.loader import Loader
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.views.spec import ViewSpec
from mocov3_ds.distributed import ranks, zero
from mocov3_ds.distributed.engine import Engine
from mocov3_ds.model.base_encoder import BaseEncoder
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.monitoring.knn_monitor import KnnMonitor
from mocov3_ds.monitoring.signal_recorder import SignalRecorder
from mocov3_ds.optim.sharded import ShardedOptimizer
from mocov3_ds.training import trained_state
from mocov3_ds.training.instruments import Instruments
from mocov3_ds.training.resume import merge_bad_samples
from mocov3_ds.training.start import Start
from mocov3_ds.training.step import QueriesToLoss
from mocov3_ds.training.step_limits import StepLimits, rewound_limits

_LAST_WRITE_S = 20.0
"""seconds that a failing run waits for a checkpoint that is on its way to the disk"""


@dataclass
class Run:
    """A run in memory: its parts, its length, and how far it is."""

    config: Config
    device: torch.device
    dtype: torch.dtype
    """dtype of the network's weights and of the views"""
    engine: Engine[QueriesToLoss]
    optimizer: ShardedOptimizer
    momentum_encoder: MomentumEncoder
    loader: Loader
    knn_monitor: KnnMonitor | None
    view_spec: ViewSpec
    peak_rate: float
    """learning rate at the end of the warm-up, for the global batch of this run"""
    total_steps: int
    warmup_steps: float
    step: int
    """optimizer steps done so far"""
    saver: Saver
    recorder: SignalRecorder
    limits: StepLimits
    instruments: Instruments
    """what measures curvature and noise of the loss before a step"""
    position: int
    """global batches gone through; the next one, counted from 0"""
    start: Start
    """what the run began with"""
    manifest: Manifest
    """manifest of the training shards"""
    chunk_conditions: Mapping[str, Any]
    """what decided the chunks, see `chunk_size.chunk_conditions`"""
    open_loader: Callable[[int, dict[int, str]], Loader]
    """loader from a position on, given the unreadable samples so far"""
    open_recorder: Callable[[Checkpoint], SignalRecorder]
    """signal recorder that goes on from a checkpoint"""
    save_s: float = 0.0
    """seconds that the step loop stood still for checkpoints, see `take_save_seconds`"""

    @property
    def model(self) -> QueriesToLoss:
        """The trained module: the base encoder and the loss."""
        return self.engine.module

    @property
    def base(self) -> BaseEncoder:
        """The base encoder."""
        return self.model.base

    @property
    def chance_loss(self) -> float:
        """Loss of a network that cannot tell the keys of a global batch apart."""
        return self.model.loss.chance_level(self.config.batch)

    def count_step(self) -> None:
        """Count a step and its global batch as done."""
        self.step += 1
        self.position += 1

    def take_save_seconds(self) -> float:
        """Seconds that the step loop stood still for checkpoints since the last call."""
        seconds, self.save_s = self.save_s, 0.0
        return seconds

    # ------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self, *, last: bool = False) -> None:
        """Write a checkpoint of everything the run needs to go on; all ranks must call.

        Args:
            last: whether nothing is trained after it, so that it is waited for.

        Raises:
            ValueError: it could not be written; the one before it stays the newest.
        """
        groups = {
            **trained_state.weight_streams(self.model, self.optimizer, self.momentum_encoder),
            "optimizer": trained_state.optimizer_stream(self.optimizer),
            "momentum": self.momentum_encoder.full_state(),
        }
        if self.knn_monitor is not None:
            groups["extra"] = self.knn_monitor.full_state()
        groups["direction"] = self.instruments.full_state()
        chunks = self.model.chunks
        state = {
            "loss": trained_state.loss_name(self.model.loss),
            "optimizer_steps": self.optimizer.step_count,
            "loss_scale": zero.read_loss_scale(self.engine),
            "chunks": {"size": chunks.size, "kept": chunks.keep, **self.chunk_conditions},
            "watch": self.recorder.state(),
            "position": self.position,
            "trouble": self.limits.state(),
            "bad_samples": self._all_bad_samples(),
            "ancestry": [dict(entry) for entry in self.start.ancestry],
        }
        background = self.config.save.background and not last
        self.save_s += self.saver.save(self.step, groups, state, background=background)

    def restore(self, saved: Checkpoint, *, with_queues: bool = True) -> None:
        """Set all but weights of the module back to a checkpoint; all ranks must call.

        Args:
            saved: checkpoint of this run or of the one that it goes on from; the module's weights
                come with the optimizer's masters.
            with_queues: False leaves the k-NN queues empty, as for other samples.

        Raises:
            ValueError: the checkpoint is of another model or another optimizer.
        """
        trained_state.load_optimizer(self.optimizer, saved)
        zero.load_loss_scale(self.engine, saved.state_value("loss_scale"))
        self.momentum_encoder.load_full_state(saved.read_group("momentum"))
        if with_queues and self.knn_monitor is not None and saved.tensor_names("extra"):
            self.knn_monitor.load_full_state(saved.read_group("extra"))
        self.instruments.load_full_state(saved.read_group("direction"))

    def rewind_to(self, saved: Checkpoint) -> None:
        """Be as a checkpoint of this run says, but go on with the batch after the present one.

        Args:
            saved: checkpoint of an earlier step; all ranks must call.
        """
        trained_state.load_buffers(self.model, saved)
        self.restore(saved)
        self.limits = rewound_limits(
            self.config.trouble, self.limits, saved.state.get("trouble", {})
        )
        self.recorder.close()
        self.recorder = self.open_recorder(saved)
        self.step, self.position = saved.step, max(saved.position, self.position + 1)
        bad_samples = self._all_bad_samples()
        self.loader.close()
        self.loader = self.open_loader(self.position, bad_samples)

    def _all_bad_samples(self) -> dict[int, str]:
        return merge_bad_samples(ranks.gather_objects(self.loader.bad_samples.reasons()))

    # ------------------------------------------------------------------------------- end

    def close(self) -> None:
        """Wait for what is on its way to disk and mirror, and leave data and folder; each rank."""
        self.loader.close()
        self.recorder.close()
        self.saver.close()
        if self.step >= self.total_steps and ranks.is_first():
            run_status.mark_finished(self.config.folder, self.step)
        run_folder.unlock_folder(self.config.folder)

    def abandon(self) -> None:
        """Leave data and folder where the run has failed, which is to be reported soon; each rank.

        A checkpoint on its way to the disk gets a moment, its copy to a mirror none.
        """
        self.loader.close()
        self.recorder.close()
        self.saver.wait(_LAST_WRITE_S)
        run_folder.unlock_folder(self.config.folder)
