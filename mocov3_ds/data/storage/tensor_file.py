"""How does a file of tensors get onto the disk? As safetensors, with the mode of any other file."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextlib.contextmanager
def mode_of_umask(path: Path) -> Iterator[None]:
    """Let a block write a file that those may read who may read what this user writes.

    safetensors gives each file the mode 0600, whatever umask says: a colleague, or another user of
    a container, could not read a checkpoint.

    Args:
        path: file that the block writes; one that exists keeps its mode.

    Raises:
        OSError: the file cannot be made.
    """
    path.touch()  # a file made this way has the mode that umask, or the folder, says
    mode = path.stat().st_mode & 0o777
    yield
    path.chmod(mode)


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with the mode that umask says.

    Args:
        tensors: contiguous tensors by name.
        path: file to write; one that exists is replaced and keeps its mode.
        metadata: text to store beside the tensors.

    Raises:
        OSError: the disk refused it.
    """
    try:
        with mode_of_umask(path):
            save_file(dict(tensors), str(path), dict(metadata) if metadata is not None else None)
    except SafetensorError as error:  # what safetensors raises when the disk fails
        raise OSError(f"{path}: {error}") from None
