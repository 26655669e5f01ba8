"""What a checkpoint looks like on disk, and how it is found and read.

    RUN/config.json                      the resolved configuration, written before step 0
    RUN/checkpoints/step-00000500/       one folder for each saved step
        base-0.safetensors ...           base encoder: fp32 weights, frozen tensors, buffers
        loss-0.safetensors               what the loss trains, where it trains anything
        momentum-0.safetensors ...       momentum encoder, fp32
        optimizer-0.safetensors ...      "exp_avg/NAME" and the like, full tensors
        extra-0.safetensors              queues of the k-NN monitor
        state.json                       step, optimizer step count, versions, sha256 of each file
    RUN/checkpoints/latest               name of the newest complete folder

No file depends on the world size, the ZeRO stage or the precision of the run that wrote it, and
none holds a pickle. `checkpoint_writer` writes these folders.
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mocov3_ds.checkpoints.state_types import check_types
from mocov3_ds.data.storage.atomic import digest_file
from mocov3_ds.distributed import ranks
from mocov3_ds.version import __version__

FORMAT = 1
"""Layout of a checkpoint folder; later formats keep `state.json` with `format` and `digest`."""

_log = logging.getLogger("mocov3_ds")


class CheckpointRefusedError(ValueError):
    """A checkpoint that may be complete but cannot be read by this version or this user.

    Nobody may silently take an older checkpoint instead of it.
    """


class Checkpoint:
    """A checkpoint folder; tensors are read one by one, and nothing is unpickled.

    Args:
        folder: The checkpoint's folder, `RUN/checkpoints/step-NNNNNNNN`.

    Raises:
        ValueError: The folder is damaged (`state.json` is checked completely, of the tensor files
            only the header), or it is of a later version (`CheckpointRefusedError`).
        OSError: The folder cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = read_state(folder)
        self._files: dict[str, dict[str, Any]] = {}  # group -> tensor name -> open file
        for name in self.state["files"]:
            group = name.rpartition("-")[0]
            check_access(folder / name)
            try:
                file: Any = safe_open(str(folder / name), framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{name} is no complete safetensors file ({error})") from None
            self._files.setdefault(group, {}).update(dict.fromkeys(file.keys(), file))

    @property
    def step(self) -> int:
        """Number of optimizer steps that were done when the checkpoint was written."""
        return int(self.state["step"])

    @property
    def position(self) -> int:
        """Number of global batches that the run had used: equal to `step` unless it was rewound."""
        return int(self.state.get("position", self.step))

    def state_value(self, name: str) -> Any:
        """Return one of the JSON values that are stored beside the tensors.

        Args:
            name: Key of the value in `state.json`.

        Raises:
            ValueError: The checkpoint has no such value.
        """
        if name not in self.state:
            raise ValueError(
                f"checkpoint {self.folder} was written by version {self.state.get('version')} and "
                f"lacks {name!r}, without which version {__version__} cannot continue."
            )
        return self.state[name]

    def tensor_names(self, group: str) -> list[str]:
        """Return the sorted tensor names of a group.

        Args:
            group: One of `base`, `momentum`, `optimizer`, `extra`.
        """
        return sorted(self._files.get(group, {}))

    def read_tensor(self, group: str, name: str) -> Tensor:
        """Read one full tensor into the memory of the CPU.

        Args:
            group: One of `base`, `momentum`, `optimizer`, `extra`.
            name: Name of the tensor within its group.

        Raises:
            ValueError: The checkpoint has no such tensor.
        """
        if name not in self._files.get(group, {}):
            raise ValueError(
                f"checkpoint {self.folder} has no {group} tensor {name!r}; it is of another model "
                "or optimizer."
            )
        return self._files[group][name].get_tensor(name)

    def read_group(self, group: str) -> dict[str, Tensor]:
        """Read all tensors of a group, by name.

        Args:
            group: One of `base`, `momentum`, `optimizer`, `extra`.
        """
        return {name: self.read_tensor(group, name) for name in self.tensor_names(group)}

    def verify(self) -> None:
        """Compare every byte of the tensor files with the digests in `state.json`.

        Raises:
            ValueError: The content of a file is not what was written.
            OSError: A file cannot be read.
        """
        for name, expected in self.state["files"].items():
            if digest_file(self.folder / name) != expected:
                raise ValueError(f"{name} is not what was written")


def read_state(folder: Path) -> dict[str, Any]:
    """Read `state.json` of a checkpoint folder and compare it with its own digest.

    Args:
        folder: Folder of one checkpoint, complete or in the making.

    Raises:
        ValueError: The file is damaged or of a later version (`CheckpointRefusedError`).
        OSError: The file cannot be read.
    """
    try:
        state = json.loads((folder / "state.json").read_bytes())
    except RecursionError:
        state = None
    if not isinstance(state, dict):
        raise ValueError("state.json is not what was written")
    # checkpoints from before the format number have no digest of the state either
    if ("format" in state or "digest" in state) and state.get("digest") != state_digest(state):
        raise ValueError("state.json is not what was written")
    if type(state.get("format", FORMAT)) is not int:
        raise ValueError("state.json has an impossible format number")
    if state.get("format", FORMAT) > FORMAT:
        raise CheckpointRefusedError(
            f"checkpoint {folder} was written by version {state.get('version')} in format "
            f"{state['format']}; version {__version__} reads up to format {FORMAT}. Install the "
            "newer version."
        )
    files = state.get("files")
    if "step" not in state or not isinstance(files, dict):
        raise ValueError("state.json names no step or no files")
    check_types(state)
    if any("/" in name or not isinstance(value, str) for name, value in files.items()):
        raise ValueError("state.json names impossible files")
    return state


def state_digest(state: Mapping[str, Any]) -> str:
    """Compute the sha256 of all values of `state.json` except `digest` itself.

    Args:
        state: JSON values by name, with or without the key `digest`.
    """
    # a number as a key becomes text in JSON, and text sorts differently
    values = json.loads(json.dumps({n: value for n, value in state.items() if n != "digest"}))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------- finding


def list_checkpoints(run: Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first; damaged ones are among them.

    Args:
        run: The run folder, which may have no checkpoints yet.
    """
    paths = (run / "checkpoints").glob("step-*")
    return sorted(path for path in paths if re.fullmatch(r"step-\d{8,}", path.name))


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the path that a checkpoint of a step has once it is complete.

    Args:
        run: Run folder, which need not exist.
        step: Number of optimizer steps done.
    """
    return run / "checkpoints" / f"step-{step:08d}"


def step_in_name(folder: Path) -> int:
    """Return the step that the name of a checkpoint folder tells.

    Args:
        folder: A path whose last part is `step-NNNNNNNN`.
    """
    return int(folder.name.removeprefix("step-"))


def check_access(path: Path) -> None:
    """Tell what another user keeps for himself from what is not there, which looks the same.

    Args:
        path: File or folder that need not exist.

    Raises:
        PermissionError: It exists, and this user may not read it.
    """
    needed = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
    if path.exists() and not os.access(path, needed):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def find_newest(run: Path, before: float = math.inf) -> Checkpoint | None:
    """Find the newest undamaged checkpoint of a run.

    Each byte is compared with its digest. A damaged folder is passed over with a warning, and the
    one before it is tried. The run may train and remove old checkpoints in the meantime.

    Args:
        run: Run folder, whether it trains or not.
        before: Only checkpoints of earlier steps than this one are considered.

    Returns:
        The checkpoint, or None where there is no undamaged one.

    Raises:
        ValueError: The newest may be undamaged but is of a later version or may not be read
            (`CheckpointRefusedError`).
    """
    try:
        check_access(run / "checkpoints")
    except PermissionError as error:
        raise CheckpointRefusedError(f"the checkpoints of {run} cannot be read: {error}.") from None
    damaged: set[str] = set()
    while paths := [
        path
        for path in list_checkpoints(run)
        if step_in_name(path) < before and path.name not in damaged
    ]:
        newest = paths[-1]
        try:
            checkpoint = Checkpoint(newest)
            checkpoint.verify()
        except CheckpointRefusedError:
            raise
        except PermissionError as error:
            raise CheckpointRefusedError(f"checkpoint {newest} cannot be read: {error}.") from None
        except (OSError, ValueError) as error:
            if newest.exists():  # otherwise the run has just removed it
                damaged.add(newest.name)
                _log.warning("passing over checkpoint %s: %s", newest, error)
        else:
            return checkpoint
    return None


def find_newest_on_all_ranks(run: Path, before: float = math.inf) -> Checkpoint | None:
    """Do what `find_newest` does, with the same result on each rank; all ranks must call.

    Only the first rank reads every byte.

    Args:
        run: The run folder, on a file system that all ranks see.
        before: Only checkpoints of earlier steps than this one are considered.

    Raises:
        ValueError: There are checkpoints but all are damaged, or a rank cannot read the one that
            the first rank found.
    """
    folder: Path | None = ranks.run_on_first(partial(_find_folder_to_continue, run, before))
    if folder is None:
        return None
    checkpoint, message = None, ""
    try:
        checkpoint = Checkpoint(folder)
    except (OSError, ValueError) as error:
        message = str(error)
    for rank, rank_message in enumerate(ranks.gather_objects(message)):
        if rank_message:
            raise ValueError(
                f"rank {rank} cannot read checkpoint {folder}, which rank 0 can ({rank_message}); "
                "put --runs on a file system that all machines share."
            )
    return checkpoint


def _find_folder_to_continue(run: Path, before: float) -> Path | None:
    checkpoint, folders = find_newest(run, before), list_checkpoints(run)
    if checkpoint is None and folders and before == math.inf:
        raise ValueError(
            f"none of the {len(folders)} checkpoints of {run} is whole (see above), and starting "
            f"anew would drop its metrics; restore one, or move {run} away to start again."
        )
    return None if checkpoint is None else checkpoint.folder
