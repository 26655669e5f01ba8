"""Writing a checkpoint folder so that a kill or a power cut at any moment does no harm.

The order on disk is what guarantees it: first the files, their digests and the folder itself, each
synced to the disk; then the folder gets its final name; then `latest` names it; only then are old
folders removed, and each of them is renamed before, so that no half-removed folder ever has the
name of a checkpoint.

    writing-NNNNNNNN     a checkpoint that is being written
    replaced-NNNNNNNN    an older one of the same step, until the new one has its name
    gone-NNNNNNNN        one that is being removed

Tensors go into files of bounded size, so rank 0 never holds all of them in its memory.
"""

import json
import logging
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mocov3_ds.checkpoints.checkpoint import (
    FORMAT,
    checkpoint_folder,
    list_checkpoints,
    state_digest,
    step_in_name,
)
from mocov3_ds.data.storage.atomic import (
    digest_file,
    remove_abandoned,
    sync_to_disk,
    write_text,
)
from mocov3_ds.data.storage.tensor_file import mode_of_umask
from mocov3_ds.distributed import ranks
from mocov3_ds.version import __version__

FILE_BYTES = 256 * 2**20
"""A tensor file is closed once it has so many bytes."""
_STEP = "[0-9]" * 8 + "*"  # pattern of the number in the names of folders

_log = logging.getLogger("mocov3_ds")

NamedTensors = Iterable[tuple[str, Tensor]]


class TensorFile(NamedTuple):
    """The content of a checkpoint file before it is written."""

    name: str
    """file name within the checkpoint folder"""
    tensors: dict[str, Tensor]
    """copies in host memory; empty on all ranks but the first"""
    size: int
    """bytes of the tensors, the same on all ranks"""


def gather_tensor_files(
    groups: Mapping[str, NamedTensors], file_bytes: int = FILE_BYTES
) -> Iterator[TensorFile]:
    """Copy all tensors to host memory, file by file; all ranks must iterate to the end.

    Args:
        groups: For each group (`base`, `optimizer`, ...) a stream of tensor names and full
            tensors, which is iterated in order.
        file_bytes: A file is closed once it has so many bytes.

    Yields:
        One file after the other; on all ranks but the first without its tensors.
    """
    for group, named_tensors in groups.items():
        index, size, copies = 0, 0, dict[str, Tensor]()
        for name, tensor in named_tensors:
            if ranks.is_first():
                copies[name] = _copy_to_host(tensor)
            size += tensor.numel() * tensor.element_size()
            if size >= file_bytes:
                yield TensorFile(f"{group}-{index}.safetensors", copies, size)
                index, size, copies = index + 1, 0, {}
        if size or copies:
            yield TensorFile(f"{group}-{index}.safetensors", copies, size)


def _copy_to_host(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU that no later step changes."""
    copy = tensor.detach().cpu()
    if copy.data_ptr() == tensor.data_ptr():
        copy = copy.clone(memory_format=torch.contiguous_format)
    return copy.contiguous()


def write_checkpoint(
    run: Path,
    step: int,
    files: Iterable[TensorFile],
    state: Mapping[str, Any],
    *,
    keep: int,
    keep_every: int = 0,
    in_use: Collection[str] = (),
) -> Path:
    """Write the files of a checkpoint; this process does it alone, on whatever thread.

    Args:
        run: Folder of the run, the parent of `checkpoints`.
        step: Number of optimizer steps done.
        files: What `gather_tensor_files` yields on the first rank.
        state: JSON values to store beside the tensors.
        keep: Number of newest checkpoints that stay.
        keep_every: Checkpoints of steps that are multiples of this number stay as well; 0 = none.
        in_use: Names of checkpoint folders that are being read and must not be removed.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: The checkpoint could not be written. Nothing of it stays on disk, and the former
            checkpoint is still the newest.
    """
    folder = run / "checkpoints"
    temporary = folder / f"writing-{step:08d}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        digests: dict[str, str] = {}
        for name, tensors, _ in files:
            _write_tensors(tensors, temporary / name)
            sync_to_disk(temporary / name)
            digests[name] = digest_file(temporary / name)
            tensors.clear()  # makes room: the copies of the next file are on their way
        versions = {"format": FORMAT, "version": __version__, "torch": torch.__version__}
        content = {**state, "step": step, "files": digests, **versions}
        content["digest"] = state_digest(content)
        write_text(temporary / "state.json", json.dumps(content, indent=1))
        final = install_checkpoint(temporary, run, step)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
        raise
    _remove_old(run, step, keep, keep_every, in_use)
    return final


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        with mode_of_umask(path):
            save_file(tensors, str(path))
    except SafetensorError as error:  # what safetensors raises when the disk fails
        raise OSError(f"{path}: {error}") from None


def install_checkpoint(temporary: Path, run: Path, step: int) -> Path:
    """Give a complete folder its final name, and let `latest` name it.

    Args:
        temporary: The folder with all files of the checkpoint, each synced to the disk.
        run: Folder of the run, the parent of `checkpoints`.
        step: Number of optimizer steps done.

    Returns:
        The folder's final path.

    Raises:
        OSError: The disk refused it.
    """
    folder, final = run / "checkpoints", checkpoint_folder(run, step)
    replaced = folder / f"replaced-{step:08d}"
    sync_to_disk(temporary)
    if final.exists():  # a damaged one, or one from before the run was rewound
        shutil.rmtree(replaced, ignore_errors=True)
        final.replace(replaced)
    temporary.replace(final)
    sync_to_disk(folder)
    write_text(folder / "latest", final.name + "\n")
    shutil.rmtree(replaced, ignore_errors=True)
    return final


# --------------------------------------------------------------------------------------- removing


def _remove_old(run: Path, step: int, keep: int, keep_every: int, in_use: Collection[str]) -> None:
    """Remove old checkpoints, and those of later steps, which the run has left by a rewind."""
    steps = [step_in_name(path) for path in list_checkpoints(run)]
    for old_step in set(steps) - steps_to_keep(steps, step, keep, keep_every):
        path = checkpoint_folder(run, old_step)
        try:
            if path.name not in in_use:
                remove_checkpoint(path)
        except OSError as error:
            _log.warning("old checkpoint %s cannot be removed: %s", path, error)


def steps_to_keep(steps: Iterable[int], step: int, keep: int, keep_every: int) -> set[int]:
    """Choose which checkpoints stay once the one of a step is complete.

    Args:
        steps: Steps of all checkpoints there are.
        step: The step whose checkpoint has just been written.
        keep: Number of newest checkpoints that stay; at least one stays.
        keep_every: Checkpoints of steps that are multiples of this number stay as well; 0 = none.
    """
    reached = sorted(s for s in steps if s <= step)
    return {s for s in reached if keep_every and s % keep_every == 0} | {*reached[-max(keep, 1) :]}


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; if the process is killed halfway, no checkpoint of that name is left.

    Args:
        folder: Folder of the checkpoint, `step-NNNNNNNN`.

    Raises:
        OSError: The folder cannot be removed.
    """
    renamed = folder.with_name(folder.name.replace("step-", "gone-"))
    shutil.rmtree(renamed, ignore_errors=True)
    folder.replace(renamed)
    shutil.rmtree(renamed)


def remove_checkpoints_after(run: Path, step: int) -> None:
    """Remove the checkpoints of later steps when a run returns to an earlier one.

    Args:
        run: Folder of the run, the parent of `checkpoints`.
        step: The step that the run returns to; its checkpoint stays.

    Raises:
        OSError: A checkpoint cannot be removed.
    """
    later_paths = [path for path in list_checkpoints(run) if step_in_name(path) > step]
    if later_paths:
        write_text(run / "checkpoints" / "latest", checkpoint_folder(run, step).name + "\n")
    for path in reversed(later_paths):
        remove_checkpoint(path)


def remove_leftovers(run: Path) -> None:
    """Remove what a killed run left in `checkpoints`; only the holder of the run's lock may call.

    Args:
        run: Folder of the run, the parent of `checkpoints`.

    Raises:
        OSError: The folder cannot be changed.
    """
    folder = run / "checkpoints"
    remove_abandoned(folder, age_s=0.0)
    for replaced in folder.glob(f"replaced-{_STEP}"):
        final = folder / replaced.name.replace("replaced-", "step-")
        if not final.exists():  # killed between the two renames
            replaced.replace(final)
    for kind in ("writing", "gone", "replaced"):
        for leftover in folder.glob(f"{kind}-{_STEP}"):
            shutil.rmtree(leftover)
