"""The run's whole state on disk: written aside, renamed, free of any layout, verified on reading.

    RUN/config.json                      the resolved configuration, before step 0
    RUN/checkpoints/step-00000500/       one folder a step
        base-0.safetensors ...           base encoder: fp32 weights, frozen tensors, buffers
        momentum-0.safetensors ...       momentum encoder, fp32
        optimizer-0.safetensors ...      "exp_avg/NAME" and the like, whole tensors
        extra-0.safetensors              what the k-NN monitor remembers
        state.json                       step, optimizer step count, versions, sha256 of each file
    RUN/checkpoints/latest               name of the newest complete folder

No file knows the world size, the ZeRO stage or the precision it was written under, and none holds
a pickle. Tensors are written in parts of bounded size, so rank 0 never holds them all.

The order on disk is what makes a kill or a power cut harmless: files, their digests, the folder
itself, each waited for; then the folder's final name; then `latest`; then old folders go, by a
rename first, so that no half-deleted folder ever has the name of a checkpoint.
"""

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mocov3_ds.data.storage.atomic import digest, sync, write_text
from mocov3_ds.distributed import ranks
from mocov3_ds.version import __version__

__all__ = [
    "FORMAT", "Checkpoint", "Part", "Refused", "Tensors", "drop", "drop_after",
    "folders", "install", "newest", "newest_of_all_ranks", "parts", "read_state", "save", "staying",
    "step_of", "sweep", "write",
]  # fmt: skip

FORMAT = 1
"""Layout of a checkpoint folder; later formats keep `state.json` with `format` and `digest`."""

_PART_BYTES = 256 * 2**20
_log = logging.getLogger("mocov3_ds")

Tensors = Iterable[tuple[str, Tensor]]
Part = tuple[str, dict[str, Tensor], int]
"""name of the file to be, its tensors, their bytes"""


class Refused(ValueError):  # noqa: N818 - it says what happens to the checkpoint
    """A checkpoint that is not damaged and yet cannot be read here; none before it may be taken."""


# ---------------------------------------------------------------------------------------- writing


def save(
    run: Path,
    step: int,
    groups: Mapping[str, Tensors],
    state: Mapping[str, Any],
    *,
    keep: int,
    keep_every: int = 0,
) -> Path:
    """Write a checkpoint and wait for it; all ranks must call and iterate, rank 0 writes.

    The folder gets its name only when complete and on disk, and `latest` names it only then: a
    kill at any moment leaves the former checkpoint in force.

    Args:
        run: run folder.
        step: optimizer steps done.
        groups: named streams of (tensor name, whole tensor), iterated in order.
        state: JSON values to keep beside them.
        keep: newest checkpoints that stay.
        keep_every: those of multiples of so many steps stay as well; 0 = none.

    Returns:
        the checkpoint's folder.

    Raises:
        ValueError: it could not be written; on each rank, and the former one is in force.
    """
    of_all = parts(groups)
    trouble: OSError | None = None
    if ranks.is_first():
        try:
            write(run, step, of_all, state, keep=keep, keep_every=keep_every)
        except OSError as error:
            trouble = error
    for _ in of_all:  # what is gathered is gathered by all ranks, also after the disk failed
        pass

    def tell() -> None:
        if trouble is not None:
            raise trouble

    ranks.first_does(tell)
    return _folder(run, step)


def parts(groups: Mapping[str, Tensors]) -> Iterator[Part]:
    """Copies in host memory of all tensors, in parts of bounded size; all ranks must iterate.

    Yields:
        on the first rank a file's name and content; on the others the same name and no tensors.
    """
    for group, tensors in groups.items():
        index, size, part = 0, 0, dict[str, Tensor]()
        for name, tensor in tensors:
            if ranks.is_first():
                part[name] = _host_copy(tensor)
            size += tensor.numel() * tensor.element_size()
            if size >= _PART_BYTES:
                yield f"{group}-{index}.safetensors", part, size
                index, size, part = index + 1, 0, {}
        if size or part:
            yield f"{group}-{index}.safetensors", part, size


def _host_copy(tensor: Tensor) -> Tensor:
    """A copy that no later step changes."""
    here = tensor.detach().cpu()
    if here.data_ptr() == tensor.data_ptr():
        here = here.clone(memory_format=torch.contiguous_format)
    return here.contiguous()


def write(
    run: Path,
    step: int,
    of_all: Iterable[Part],
    state: Mapping[str, Any],
    *,
    keep: int,
    keep_every: int = 0,
    spare: Collection[str] = (),
) -> Path:
    """Write what `parts` gave; this process alone, on whatever thread.

    Args:
        run: run folder.
        step: optimizer steps done.
        of_all: the parts.
        state: JSON values to keep beside them.
        keep: newest checkpoints that stay.
        keep_every: those of multiples of so many steps stay as well; 0 = none.
        spare: names of folders that somebody is reading.

    Returns:
        the checkpoint's folder.

    Raises:
        OSError: it could not be written; nothing of it is left and the former one is in force.
    """
    folder = run / "checkpoints"
    aside = folder / f"writing-{step:08d}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        digests: dict[str, str] = {}
        for name, tensors, _ in of_all:
            _save_file(tensors, aside / name)
            sync(aside / name)
            digests[name] = digest(aside / name)
            tensors.clear()  # the copies are needed no more, and the next ones are on their way
        versions = {"format": FORMAT, "version": __version__, "torch": torch.__version__}
        whole = {**state, "step": step, "files": digests, **versions}
        write_text(aside / "state.json", json.dumps({**whole, "digest": _seal(whole)}, indent=1))
        final = install(aside, run, step)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk needs the room
        raise
    _prune(folder, step, keep, keep_every, spare)
    return final


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, str(path))
    except SafetensorError as error:  # its name for trouble with the disk
        raise OSError(f"{path}: {error}") from None


def install(aside: Path, run: Path, step: int) -> Path:
    """Give a complete folder the name of its step, and make `latest` name it.

    Raises:
        OSError: the disk refused it.
    """
    folder, final = run / "checkpoints", _folder(run, step)
    replaced = folder / f"replaced-{step:08d}"
    sync(aside)
    if final.exists():  # damaged, or of a past that was rewound
        shutil.rmtree(replaced, ignore_errors=True)
        final.replace(replaced)
    aside.replace(final)
    sync(folder)
    write_text(folder / "latest", final.name + "\n")
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _prune(folder: Path, step: int, keep: int, keep_every: int, spare: Collection[str]) -> None:
    """Let old checkpoints go, and those of a later step: the run has gone another way since."""
    steps = [step_of(path) for path in folders(folder.parent)]
    for other in set(steps) - staying(steps, step, keep, keep_every):
        path = _folder(folder.parent, other)
        try:
            if path.name not in spare:
                drop(path)
        except OSError as error:
            _log.warning("old checkpoint %s cannot be removed: %s", path, error)


def staying(steps: Iterable[int], step: int, keep: int, keep_every: int) -> set[int]:
    """Which of the checkpoints at `steps` stay once the one at `step` is complete."""
    past = sorted(s for s in steps if s <= step)
    return {s for s in past if keep_every and s % keep_every == 0} | {*past[-max(keep, 1) :]}


def drop(checkpoint: Path) -> None:
    """Remove a checkpoint; killed halfway, it is none any more.

    Raises:
        OSError: it cannot be removed.
    """
    gone = checkpoint.with_name(checkpoint.name.replace("step-", "gone-"))
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.replace(gone)
    shutil.rmtree(gone)


def drop_after(run: Path, step: int) -> None:
    """Remove the checkpoints after the one at `step`, from where the run goes another way.

    Raises:
        OSError: one cannot be removed.
    """
    later = [path for path in folders(run) if step_of(path) > step]
    if later:
        write_text(run / "checkpoints" / "latest", _folder(run, step).name + "\n")
    for path in reversed(later):
        drop(path)


def sweep(run: Path) -> None:
    """Clear away what a killed job left in `checkpoints`; only for the holder of the lock.

    Raises:
        OSError: the folder cannot be changed.
    """
    folder = run / "checkpoints"
    for replaced in folder.glob("replaced-*"):
        final = folder / replaced.name.replace("replaced-", "step-")
        if not final.exists():  # killed between the two renames
            replaced.replace(final)
    for pattern in ("writing-*", "gone-*", "replaced-*"):
        for left in folder.glob(pattern):
            shutil.rmtree(left)


def folders(run: Path) -> list[Path]:
    """Folders of complete checkpoints, damaged ones too, oldest first."""
    found = (run / "checkpoints").glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d{8,}", path.name))


def step_of(folder: Path) -> int:
    """Step that a folder's name tells."""
    return int(folder.name.removeprefix("step-"))


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


# ---------------------------------------------------------------------------------------- reading


class Checkpoint:
    """A checkpoint folder, read tensor by tensor without unpickling anything.

    Raises:
        ValueError: it is damaged (`state.json` is checked, of the tensors the outer form) or,
            as `Refused`, of a later version.
        OSError: it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = read_state(folder)
        self._where: dict[str, dict[str, Any]] = {}
        for name in self.state["files"]:
            group = name.rpartition("-")[0]
            try:
                file = safe_open(str(folder / name), framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{name} is no complete safetensors file ({error})") from None
            self._where.setdefault(group, {}).update(dict.fromkeys(_names(file), file))

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        return int(self.state["step"])

    @property
    def position(self) -> int:
        """Global batches that the run had gone through: as many as steps, unless it was rewound."""
        return int(self.state.get("position", self.step))

    def value(self, name: str) -> Any:
        """One of the JSON values beside the tensors.

        Raises:
            ValueError: this checkpoint has no such value.
        """
        if name not in self.state:
            raise ValueError(
                f"checkpoint {self.folder} was written by version {self.state.get('version')} and "
                f"lacks {name!r}, without which version {__version__} cannot continue."
            )
        return self.state[name]

    def names(self, group: str) -> list[str]:
        """Tensors of a group (`base`, `momentum`, `optimizer`, `extra`)."""
        return sorted(self._where.get(group, {}))

    def tensor(self, group: str, name: str) -> Tensor:
        """One whole tensor on the CPU.

        Raises:
            ValueError: this checkpoint has no such tensor.
        """
        if name not in self._where.get(group, {}):
            raise ValueError(
                f"checkpoint {self.folder} has no {group} tensor {name!r}; it is of another model "
                "or optimizer."
            )
        tensor: Tensor = self._where[group][name].get_tensor(name)
        return tensor

    def group(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group by name."""
        return {name: self.tensor(group, name) for name in self.names(group)}

    def verify(self) -> None:
        """Read every byte.

        Raises:
            ValueError: a file is not what was written.
            OSError: a file cannot be read.
        """
        for name, wanted in self.state["files"].items():
            if digest(self.folder / name) != wanted:
                raise ValueError(f"{name} is not what was written")


def _names(file: Any) -> list[str]:
    names: list[str] = file.keys()
    return names


def read_state(folder: Path) -> dict[str, Any]:
    """The content of a folder's `state.json`, compared with its own digest.

    Raises:
        ValueError: it is damaged or, as `Refused`, of a later version.
        OSError: it cannot be read.
    """
    try:
        state = json.loads((folder / "state.json").read_bytes())
    except RecursionError:
        state = None
    if not isinstance(state, dict):
        raise ValueError("state.json is not what was written")
    # before there was a format number there was no digest of the rest either
    if ("format" in state or "digest" in state) and state.get("digest") != _seal(state):
        raise ValueError("state.json is not what was written")
    if not isinstance(state.get("format", FORMAT), int):
        raise ValueError("state.json has an impossible format number")
    if state.get("format", FORMAT) > FORMAT:
        raise Refused(
            f"checkpoint {folder} was written by version {state.get('version')} in format "
            f"{state['format']}; version {__version__} reads up to format {FORMAT}. Install the "
            "newer version."
        )
    files = state.get("files")
    if not isinstance(state.get("step"), int) or not isinstance(files, dict):
        raise ValueError("state.json names no step or no files")
    if any("/" in name or not isinstance(wanted, str) for name, wanted in files.items()):
        raise ValueError("state.json names impossible files")
    return state


def _seal(state: Mapping[str, Any]) -> str:
    """Digest of all values of `state.json` but itself, as the file will have them."""
    # a key that is a number becomes a word, and those sort otherwise
    rest = json.loads(json.dumps({n: value for n, value in state.items() if n != "digest"}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def newest(run: Path, before: float = math.inf) -> Checkpoint | None:
    """The newest checkpoint of a run before a step whose files are what was written, or None.

    Names are not believed: each byte is compared with its digest. A damaged folder is passed over
    with a warning in favour of the one before. A run may be read while it trains and prunes.

    Raises:
        ValueError: the newest may be whole but is not for us: of a later version, or forbidden.
    """
    passed: set[str] = set()
    while left := [p for p in folders(run) if step_of(p) < before and p.name not in passed]:
        try:
            found = Checkpoint(left[-1])
            found.verify()
        except Refused:
            raise
        except PermissionError as error:
            raise Refused(f"checkpoint {left[-1]} cannot be read: {error}.") from None
        except (OSError, ValueError) as error:
            if left[-1].exists():  # and was not pruned in this moment
                passed.add(left[-1].name)
                _log.warning("passing over checkpoint %s: %s", left[-1], error)
        else:
            return found
    return None


def newest_of_all_ranks(run: Path, before: float = math.inf) -> Checkpoint | None:
    """The same on each rank, and only the first reads every byte; all ranks must call.

    Raises:
        ValueError: there are checkpoints but none can be continued from, or not on each rank.
    """
    folder: Path | None = ranks.first_does(partial(_to_continue, run, before))
    if folder is None:
        return None
    found, trouble = None, ""
    try:
        found = Checkpoint(folder)
    except (OSError, ValueError) as error:
        trouble = str(error)
    for rank, words in enumerate(ranks.gather_objects(trouble)):
        if words:
            raise ValueError(
                f"rank {rank} cannot read checkpoint {folder}, which rank 0 can ({words}); put "
                "--runs on a file system that all machines share."
            )
    return found


def _to_continue(run: Path, before: float) -> Path | None:
    found, there = newest(run, before), folders(run)
    if found is None and there and before == math.inf:
        raise ValueError(
            f"none of the {len(there)} checkpoints of {run} is whole (see above), and starting "
            f"anew would drop its metrics; restore one, or move {run} away to start again."
        )
    return None if found is None else found.folder
