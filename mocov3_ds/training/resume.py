"""Where does a run go on? Its folder is claimed, then its newest checkpoint is found.

Nothing of the folder changes before the settings are known to be those of the run that lives there.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from mocov3_ds.checkpoints import checkpoint, checkpoint_writer, mirror, run_folder
from mocov3_ds.checkpoints.checkpoint import Checkpoint
from mocov3_ds.checkpoints.saver import Saver
from mocov3_ds.config.run_config import Config, Settings
from mocov3_ds.distributed import ranks


def claim_run(
    settings: Settings, data_digest: str, ancestry: Sequence[Mapping[str, Any]] = ()
) -> Checkpoint | None:
    """Enter the run folder and find the checkpoint to go on from; all ranks must call.

    Args:
        settings: resolved command line of the run.
        data_digest: digest of the training shards' manifest.
        ancestry: what a new run begins with, for its `config.json`.

    Returns:
        the newest checkpoint of folder and mirror; None for a new run.

    Raises:
        ValueError: the folder belongs to another run or another process, or no checkpoint of it is
            whole.
    """
    resolved = settings.as_json()
    if ancestry:
        resolved["ancestry"] = [dict(entry) for entry in ancestry]
    ranks.run_on_first(partial(_enter_folder, settings.config, resolved, data_digest))
    return checkpoint.find_newest_on_all_ranks(settings.config.folder)


def _enter_folder(config: Config, resolved: Mapping[str, Any], data_digest: str) -> None:
    """Make the run folder this process's own, and bring it up to its mirror; first rank alone."""
    if config.save.mirror:
        mirror.check_mirror(config.save.mirror, resolved, data_digest)
    run_folder.enter_folder(config.folder, resolved, data_digest)
    checkpoint_writer.remove_leftovers(config.folder)
    if config.save.mirror:
        mirror.fetch_newer_checkpoint(config.save.mirror, config.folder)


def build_saver(config: Config) -> Saver:
    """Writer of the run's checkpoints, with a copy of each to the mirror where there is one."""
    save = config.save
    # a rewind may need the one before the newest
    smallest_keep = 2 if config.trouble.policy == "rewind" else 1
    staying = {"keep": max(save.keep, smallest_keep), "keep_every": save.keep_every}
    copies = mirror.Mirror(save.mirror, config.folder, **staying) if save.mirror else None
    return Saver(config.folder, **staying, host_bytes=int(save.host_gb * 1e9), mirror=copies)


def merge_bad_samples(samples_by_rank: Iterable[Mapping[Any, str]]) -> dict[int, str]:
    """Unreadable samples of all ranks, id -> reason.

    Args:
        samples_by_rank: id -> reason of each rank; the keys of a JSON object are text.
    """
    return {int(i): reason for samples in samples_by_rank for i, reason in samples.items()}
