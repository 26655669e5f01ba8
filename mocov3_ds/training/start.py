"""With what does a run begin? Random weights, given ones (`--init`), or the end of another run.

own checkpoint          the run goes on; what it once began with is in the checkpoint
--extend RUN            weights, momentum encoder and optimizer of RUN's last checkpoint
--init WEIGHTS          weights of both encoders
none of these           the weights of the seed
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from mocov3_ds.checkpoints import checkpoint, mirror
from mocov3_ds.checkpoints.checkpoint import Checkpoint
from mocov3_ds.config.run_config import Config, Settings
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.distributed import ranks
from mocov3_ds.training.extension import read_parent
from mocov3_ds.training.init_weights import read_init
from mocov3_ds.training.step import QueriesToLoss

Ancestry = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run began with, and where its own steps begin."""

    ancestry: Ancestry = ()
    """where its weights came from, oldest first; empty = the seed alone"""
    line: str = ""
    """what was taken and what not, for the first lines; empty = random weights"""
    step: int = 0
    """steps that were done before the run's own first one"""
    position: int = 0
    """global batches gone through before"""
    parent: Checkpoint | None = None
    """what the run goes on from; None = it does not, or has a checkpoint of its own"""
    parent_has_same_samples: bool = False
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """given weights of the base encoder by name; empty = those of the seed"""

    def schedule_begins(self, config: Config) -> int:
        """Step at which rate and momentum begin their way.

        Args:
            config: settings of the run, of which `extend_schedule` counts.
        """
        return self.step if config.extend_schedule == "new" else 0


def find_start(settings: Settings, train: Manifest, model: QueriesToLoss) -> Start:
    """Read and check what a new run begins with, before its folder is touched; all ranks must call.

    A run that has a checkpoint begins with nothing but that: `--init` and `--extend` are not read.

    Args:
        settings: resolved command line of the run.
        train: manifest of the training shards.
        model: the trained module with the weights of the seed, which stays as it is.

    Raises:
        ValueError: weights or a run that it cannot begin with.
    """
    config = settings.config
    if (not config.init and not config.extend) or ranks.run_on_first(partial(_has_begun, config)):
        return Start()
    if config.init:
        init = read_init(config, model.base)
        ancestry = (*init.ancestry, init.record)
        return Start(ancestry=ancestry, line=init.line, tensors=init.tensors)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    parent = read_parent(settings, train, trained)
    return Start(
        ancestry=(*parent.saved.state.get("ancestry", ()), parent.record),
        line=parent.line,
        step=parent.step,
        position=parent.position,
        parent=parent.saved,
        parent_has_same_samples=parent.has_same_samples,
    )


def start_of(saved: Checkpoint) -> Start:
    """What a run began with that goes on from a checkpoint of its own."""
    ancestry = tuple(saved.state.get("ancestry", ()))
    if not ancestry:
        return Start()
    last = ancestry[-1]
    own_step = int(last.get("begins_at", 0))
    line = f"start: once began with {last['path']} ({last['kind']}), which is not read again"
    return Start(ancestry=ancestry, line=line, step=own_step)


def _has_begun(config: Config) -> bool:
    """Whether the run has a checkpoint, in its folder or its mirror."""
    if checkpoint.list_checkpoints(config.folder):
        return True
    return bool(config.save.mirror) and mirror.has_checkpoint(config.save.mirror)
