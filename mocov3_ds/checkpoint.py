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
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mocov3_ds import __version__
from mocov3_ds.distributed import ranks

_PART_BYTES = 2 * 2**30
_log = logging.getLogger("mocov3_ds")

Tensors = Iterable[tuple[str, Tensor]]


def save(
    run: Path, step: int, groups: Mapping[str, Tensors], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Write a checkpoint; all ranks must call and iterate, rank 0 writes.

    The folder gets its name only when complete and on disk, and `latest` names it only then: a
    kill at any moment leaves the former checkpoint in force.

    Args:
        run: run folder.
        step: optimizer steps done.
        groups: named streams of (tensor name, whole tensor), iterated in order.
        state: JSON values to keep beside them.
        keep: newest checkpoints that stay.

    Returns:
        the checkpoint's folder.
    """
    folder = run / "checkpoints"
    final = folder / f"step-{step:08d}"
    aside = folder / f"writing-{step:08d}"
    if ranks.is_first():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    digests: dict[str, str] = {}
    for group, tensors in groups.items():
        for index, part in enumerate(_parts(tensors)):
            if ranks.is_first():
                path = aside / f"{group}-{index}.safetensors"
                save_file(part, str(path))
                _sync(path)
                digests[path.name] = _digest(path)
    if ranks.is_first():
        whole = {**state, "step": step, "files": digests, "version": __version__}
        whole["torch"] = torch.__version__
        _write_text(aside / "state.json", json.dumps(whole, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        aside.replace(final)
        _write_text(folder / "latest", final.name + "\n")
        _sync(folder)
        for old in sorted(folder.glob("step-*"))[: -max(keep, 1)]:
            shutil.rmtree(old)
    ranks.barrier()
    return final


def _parts(tensors: Tensors) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if ranks.is_first():
            part[name] = tensor.detach().cpu().contiguous().clone()
        size += tensor.numel() * tensor.element_size()
        if size >= _PART_BYTES:
            yield part
            part, size = {}, 0
    if size or part:
        yield part


def _write_text(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    _sync(aside)
    aside.replace(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if _HAS_FILE_DIGEST else _slow(file)


_HAS_FILE_DIGEST = hasattr(hashlib, "file_digest")  # Python 3.11


def _slow(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


class Checkpoint:
    """A verified checkpoint folder, read tensor by tensor without unpickling anything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        self._where: dict[str, dict[str, Any]] = {}
        for name in self.state["files"]:
            group = name.rpartition("-")[0]
            file = safe_open(str(folder / name), framework="pt")
            self._where.setdefault(group, {}).update(dict.fromkeys(_names(file), file))

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        return int(self.state["step"])

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


def _names(file: Any) -> list[str]:
    names: list[str] = file.keys()
    return names


def newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run whose files are what was written, or None.

    `latest` is believed after its digests were checked; a damaged folder is passed over with a
    warning in favour of the one before.
    """
    folder = run / "checkpoints"
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        trouble = _trouble(candidate)
        if trouble is None:
            return Checkpoint(candidate)
        _log.warning("passing over checkpoint %s: %s", candidate, trouble)
    return None


def newest_of_all_ranks(run: Path) -> Checkpoint | None:
    """The same on each rank, and only the first reads every byte; all ranks must call."""

    def find() -> Path | None:
        found = newest(run)
        return None if found is None else found.folder

    folder: Path | None = ranks.first_does(find)
    return None if folder is None else Checkpoint(folder)


def _trouble(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; None when it is whole."""
    try:
        files: dict[str, str] = json.loads((folder / "state.json").read_text())["files"]
        for name, digest in files.items():
            if _digest(folder / name) != digest:
                return f"{name} is not what was written"
            with safe_open(str(folder / name), framework="pt"):
                pass
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


# What decides the numbers of a run. The rest (folders, threads, saving, watching, chunks, ZeRO
# stage) may differ between two sittings of the same run.
_DECIDES = (
    "batch",
    "epochs",
    "warmup_epochs",
    "decay",
    "seed",
    "views",
    "model",
    "moco",
    "data.lanes",
    "data.pool",
)


def claim_folder(run: Path, resolved: Mapping[str, Any], data: str) -> None:
    """Write `config.json` of a new run, or check that an existing one is the same run.

    Args:
        run: run folder.
        resolved: `Run.as_json()`.
        data: digest of the training shards' manifest.

    Raises:
        ValueError: the folder belongs to a run with other settings or other data.
    """
    path = run / "config.json"
    mine = {**resolved, "data_digest": data, "version": __version__}
    if path.exists():
        try:
            theirs = json.loads(path.read_text())
        except json.JSONDecodeError:
            raise ValueError(f"{path} is not valid JSON; move the folder away.") from None
        differing = list(_differences(theirs, mine))
        if differing:
            raise ValueError(
                f"{run} holds another run: {'; '.join(differing[:6])}. Give --name another name, "
                "or repeat the settings it was started with."
            )
        return
    if run.exists() and any(run.iterdir()):
        raise ValueError(
            f"{run} is not empty and holds no config.json, so it is no run of ours; give --name."
        )
    run.mkdir(parents=True, exist_ok=True)
    _write_text(path, json.dumps(mine, indent=1))


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> Iterator[str]:
    pairs = [(f"config.{name}", name) for name in _DECIDES]
    pairs += [
        ("deepspeed.optimizer", "optimizer"),
        ("deepspeed.gradient_clipping", "gradient_clipping"),
        ("data_digest", "training shards"),
    ]
    for dotted, name in pairs:
        yield from _leaf_differences(_at(theirs, dotted), _at(mine, dotted), name)


def _at(tree: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _leaf_differences(theirs: Any, mine: Any, name: str) -> Iterator[str]:
    if isinstance(theirs, Mapping) and isinstance(mine, Mapping):
        for key in sorted({*theirs, *mine}):
            yield from _leaf_differences(theirs.get(key), mine.get(key), f"{name}.{key}")
    elif theirs != mine:
        yield f"{name} is {theirs} there, {mine} here"
