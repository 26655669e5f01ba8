"""Which tensors lie behind a path that is no run of this package?

FILE.safetensors, FILE.pth ...             tensors by name
FOLDER/model.safetensors, model.pth ...    the same, with settings beside them
FOLDER/model.safetensors.index.json        the same in several files
FOLDER/latest, *_model_states.pt           what DeepSpeed's save_checkpoint wrote
FOLDER/zero/NAME/fp32.pt                   what DeepSpeed's ds_to_universal made of that
"""

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mocov3_ds.checkpoints.checkpoint import check_access
from mocov3_ds.encoders.networks import describe_tree, flatten_tensors
from mocov3_ds.encoders.torch_file import HARMLESS, read_torch_file
from mocov3_ds.recipes import read_json

_SINGLE_FILES = ("model.safetensors", "model.pth", "model.pth.tar", "pytorch_model.bin")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.", re.ASCII
)
_WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")


class FoundWeights(NamedTuple):
    """The tensors of a file or folder, and where its settings are to be looked for."""

    tensors: dict[str, Tensor]
    """by their whole names"""
    kind: str
    """what it is, in words for people"""
    tree: Mapping[Any, Any] = {}
    """what lies beside the tensors in a file"""
    folder: Path | None = None
    """folder whose config.json belongs to the weights"""


def find_weights(path: Path) -> FoundWeights:
    """Read all tensors of a file or folder.

    Args:
        path: a weights file, or a folder in one of the layouts above.

    Raises:
        ValueError: nothing that is known, a part that is missing or damaged, or no tensors.
    """
    weights = _find_in_folder(path) if path.is_dir() else _read_file(path)
    if not weights.tensors:
        raise ValueError(f"it holds no tensors, but {describe_tree(weights.tree)}.")
    return weights._replace(tensors=_unwrap_names(weights.tensors))


def _unwrap_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names without what compiled, checkpointed or FSDP's modules add, if they stay unique."""
    unwrapped = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    return unwrapped if len(unwrapped) == len(tensors) else tensors


def check_readable(path: Path) -> None:
    """Tell a file or folder that another user keeps for himself from one that is not there.

    Raises:
        ValueError: this user may not read it.
    """
    try:
        check_access(path)
    except PermissionError:
        raise ValueError(f"{path} may not be read by this user (permission denied).") from None


def _find_in_folder(folder: Path) -> FoundWeights:
    if (universal := _universal_folder(folder)) is not None:
        return FoundWeights(_read_universal(universal), "universal DeepSpeed checkpoint")
    if (folder / "latest").is_file() or any(folder.glob("*_model_states.pt")):
        from mocov3_ds.distributed.zero_folder import merge_weights  # DeepSpeed takes seconds

        stand_ins = [pair for pair in HARMLESS if not pair[1].startswith("deepspeed.")]
        return FoundWeights(merge_weights(folder, stand_ins), "DeepSpeed checkpoint")
    for name in _SINGLE_FILES:
        if (folder / name).is_file():
            tensors = _read_file(folder / name)
            other_files = sorted(p.name for p in folder.glob(f"{name.partition('.')[0]}_[0-9]*"))
            file_text = (
                f" {name}, not {', '.join(other_files[:4])} beside it" if other_files else ""
            )
            return tensors._replace(kind=tensors.kind + file_text)
    for name in _INDEX_FILES:
        if (folder / name).is_file():
            return FoundWeights(_read_shards(folder / name), "folder in shards", folder=folder)
    raise ValueError(
        "it is no run (config.json and checkpoints/), no DeepSpeed checkpoint and no folder with "
        f"model.safetensors; it holds {_describe_folder(folder)}."
    )


def _describe_folder(folder: Path) -> str:
    """What lies in a folder, and what to do about it."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    if any(name.endswith(".distcp") for name in names):
        return (
            "a distributed checkpoint of torch (*.distcp); python -m torch.distributed.checkpoint."
            f"format_utils dcp_to_torch {str(folder)!r} weights.pth writes a file that can be read"
        )
    if "adapter_config.json" in names:
        return (
            "adapters of PEFT without the weights that they adapt; merge_and_unload() and "
            "save_pretrained() make a folder that can be read"
        )
    listing = ", ".join(repr(name[:60]) for name in names[:8]) + " ..." * (len(names) > 8)
    if files := [name for name in names if name.endswith(_WEIGHT_SUFFIXES)]:
        return f"{listing}; give a file of it, e.g. {str(folder / files[0])!r}"
    return listing or "nothing"


# ----------------------------------------------------------------------------------------- files


def _read_file(path: Path) -> FoundWeights:
    """The tensors of one file; its folder may hold settings of it."""
    check_readable(path)
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
        return FoundWeights(tensors, "safetensors file", _read_metadata(metadata), path.parent)
    tree = read_torch_file(path)
    if not isinstance(tree, Mapping):
        raise ValueError(f"it holds a {type(tree).__name__}, not weights by name.")
    return FoundWeights(flatten_tensors(tree), "torch file", tree, path.parent)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and its metadata."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {n: file.get_tensor(n) for n in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"it is no complete safetensors file ({error}).") from None


def _read_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What our own files say of their network: its number of heads, or a model of timm."""
    tree: dict[str, Any] = {}
    if metadata.get("num_heads", "").isdecimal():
        tree["num_heads"] = int(metadata["num_heads"])
    if "architecture" in metadata:
        tree["architecture"] = metadata["architecture"].strip('"')  # a state file writes JSON
        with contextlib.suppress(ValueError):
            tree["model_args"] = json.loads(metadata.get("model_args", "{}"))
    return tree


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names; each tensor must be where it says."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise ValueError(f"{index.name} has no weight_map from tensors to files.")
    tensors: dict[str, Tensor] = {}
    for name in sorted({*places.values()}):
        path = index.parent / name
        if Path(name).name != name or not path.is_file():
            raise ValueError(f"{index.name} names the file {name[:80]!r}, which is not beside it.")
        try:
            shard = _read_file(path).tensors
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if doubled := sorted({*shard} & {*tensors}):
            raise ValueError(f"{doubled[0]!r} stands in {name} and in a file before it.")
        tensors |= shard
        if missing := sorted(t for t, file in places.items() if file == name and t not in shard):
            raise ValueError(f"{name} lacks {missing[0]!r}, which {index.name} says is in it.")
    return tensors


# ------------------------------------------------------------------------ universal checkpoints


def _universal_folder(folder: Path) -> Path | None:
    """The folder with zero/NAME/fp32.pt, given it or the folder above it."""
    candidates = [folder]
    pointer = folder / "latest_universal"
    if pointer.is_file():
        name = pointer.read_text(errors="replace").strip()
        if Path(name).name != name:
            raise ValueError(f"its latest_universal names {name[:80]!r}, which is no folder in it.")
        candidates.append(folder / name)
    for candidate in candidates:
        if next((candidate / "zero").glob("*/fp32.pt"), None) is not None:
            return candidate
    return None


def _read_universal(folder: Path) -> dict[str, Tensor]:
    """The fp32 masters of a universal checkpoint, with what was not trained."""
    tensors: dict[str, Tensor] = {}
    for states in sorted(folder.glob("mp_rank_00_model_states.pt")):
        module = _read_part(states).get("module")
        tensors |= flatten_tensors(module) if isinstance(module, Mapping) else {}
    parts = [_read_part(p) for p in sorted(folder.glob("zero_pp_rank_*_mp_rank_00_model_*.pt"))]
    tensors |= _read_untrained(parts)
    shapes = _read_shapes(parts)
    for entry in sorted((folder / "zero").iterdir()):
        if not entry.is_dir():
            continue
        if not (entry / "fp32.pt").is_file():
            raise ValueError(f"zero/{entry.name} holds no fp32.pt; the checkpoint is not whole.")
        saved = _read_part(entry / "fp32.pt")
        tensor = saved.get("param")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"zero/{entry.name}/fp32.pt holds no tensor.")
        shape = shapes.get(entry.name, tensor.shape)  # stage 3 leaves them flat
        if tensor.numel() < shape.numel():
            raise ValueError(f"zero/{entry.name}/fp32.pt holds less than a tensor {[*shape]}.")
        tensors[entry.name] = tensor.flatten()[: shape.numel()].view(shape)
    return tensors


def _read_shapes(parts: Iterable[Mapping[Any, Any]]) -> dict[str, torch.Size]:
    """Shapes of the trained weights, as the files of stage 3 tell them for each group."""
    shapes: dict[str, torch.Size] = {}
    for states in parts:
        groups = states.get("param_shapes")
        for group in groups if isinstance(groups, list) else ():
            if isinstance(group, Mapping):
                shapes |= {f"{n}": s for n, s in group.items() if isinstance(s, torch.Size)}
    return shapes


def _read_untrained(ranks: Iterable[Mapping[Any, Any]]) -> dict[str, Tensor]:
    """What stage 3 leaves in the files of its ranks: buffers, and frozen weights in fragments."""
    tensors: dict[str, Tensor] = {}
    fragments: dict[str, list[Tensor]] = {}
    shapes: dict[str, Any] = {}
    for states in ranks:
        module, frozen = states.get("module"), states.get("frozen_param_fragments")
        shapes |= states.get("frozen_param_shapes") or {}
        for name in states.get("buffer_names") or ():
            if isinstance(module, Mapping) and isinstance(module.get(name), Tensor):
                tensors[name] = module[name]
        for name, fragment in (frozen if isinstance(frozen, Mapping) else {}).items():
            fragments.setdefault(name, []).append(fragment.flatten())
    for name, parts in fragments.items():
        shape = torch.Size(shapes[name])
        tensors[name] = torch.cat(parts)[: shape.numel()].view(shape)
    return tensors


def _read_part(path: Path) -> Mapping[Any, Any]:
    """The content of one file of a folder; a bare tensor as `param`."""
    try:
        check_readable(path)
        content = read_torch_file(path)
    except ValueError as error:
        raise ValueError(f"{path.parent.name}/{path.name}: {error}") from None
    if isinstance(content, Tensor):
        return {"param": content}
    return content if isinstance(content, Mapping) else {}
