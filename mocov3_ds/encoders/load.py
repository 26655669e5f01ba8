"""How does a trained encoder become a plain module, outside any engine?

Read are runs of this package and single checkpoints of them, exported folders, the published MoCo
v3 files (`.pth.tar`), the ViTs of mmpretrain, DeiT, timm and transformers, and folders that
DeepSpeed's `save_checkpoint` wrote at any ZeRO stage. Nothing is unpickled but tensors and plain
containers.
"""

import argparse
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mocov3_ds.checkpoints import checkpoint
from mocov3_ds.checkpoints.checkpoint import Checkpoint
from mocov3_ds.config import Config, from_json
from mocov3_ds.encoders.foreign_names import EncoderRole, has_qk_norm, infer_shape, to_timm
from mocov3_ds.model.cpu_ops import suit_cpu
from mocov3_ds.model.tensor_differences import differing_tensors
from mocov3_ds.model.vit import Positions, VitShape, build_vit, sincos_positions
from mocov3_ds.recipes import read_json

_WRAPPERS = ("state_dict", "model", "module")
_LOW_PRECISION = 2e-2  # positions between -1 and 1, perhaps stored in fp16 or bf16


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A backbone's weights and what is known of where they come from."""

    path: Path
    """run folder, or the file or folder that was given"""
    kind: str
    """what `path` is, in words for people"""
    role: EncoderRole
    """base or momentum encoder"""
    tensors: Mapping[str, Tensor]
    """the backbone in timm's names, fp32"""
    shape: VitShape
    positions: Positions = "sincos"
    config: Config | None = None
    """settings of the run; None = the weights are not from a run of this package"""
    saved: Checkpoint | None = None
    """checkpoint that the weights were read from; None = not from a run of this package"""

    @property
    def title(self) -> str:
        """Name of the encoder in tables and model cards."""
        step = f", step {self.saved.step}" if self.saved is not None else ""
        return f"{self.path.name} ({self.role} encoder{step})"


def load_encoder(
    path: str | Path, which: EncoderRole = "base", *, image_size: int = 0, heads: int = 0
) -> VisionTransformer:
    """A trained backbone, fp32, in eval mode: images (B, 3, H, W) -> class-token features (B, D).

    Images are RGB scaled to [0, 1], then normalised by the ImageNet mean (0.485, 0.456, 0.406) and
    standard deviation (0.229, 0.224, 0.225), at the size the encoder was trained with (or
    `image_size`). The evaluation's own preprocessing resizes the shorter side to 256/224 of that
    size (bilinear, antialiased) and crops the centre:

        encoder = mocov3_ds.load_encoder("runs/vit_b16")
        view = torchvision.transforms.Compose([Resize(256), CenterCrop(224), ToTensor(),
                                               Normalize(mean, std)])
        features_BD = encoder(torch.stack([view(image) for image in images]))

    Args:
        path: a run folder (its newest checkpoint), one checkpoint of it, an exported folder, a
            DeepSpeed checkpoint folder, or a weights file (the module's docstring lists the kinds).
        which: the base encoder (what the paper evaluates) or the momentum encoder.
        image_size: side of an image, pixels; 0 = as trained. For another size fixed sin-cos
            positions are computed, others are interpolated.
        heads: attention heads where the weights cannot tell; 0 = the paper's for their width.

    Raises:
        ValueError: no such file, nothing usable in it, or weights that are missing.
    """
    return build_encoder(read_weights(path, which, heads=heads), image_size=image_size)


def read_run_config(run: Path) -> Config:
    """Settings of a run folder.

    Raises:
        ValueError: the folder holds no run.
    """
    path = run / "config.json"
    if not path.exists():
        raise ValueError(f"{run} is no run folder: it holds no config.json.")
    try:
        return from_json(read_json(path))
    except ValueError as error:
        raise ValueError(f"{run}: {error}") from None


def read_weights(path: str | Path, role: EncoderRole = "base", *, heads: int = 0) -> Weights:
    """Find out what kind of file or folder `path` is and read the backbone from it.

    Args:
        path: anything that `load_encoder` reads.
        role: base or momentum encoder.
        heads: attention heads where the weights cannot tell; 0 = the paper's for their width.

    Raises:
        ValueError: no such file, nothing usable in it, or weights that are missing.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no {path}.")
    run = _find_run(path)
    if run is not None:
        return _read_run_weights(path, run, role, heads)
    try:
        tensors, saved_heads, kind = _read_folder(path) if path.is_dir() else _read_file(path)
        backbone = to_timm(tensors, role)
        shape = infer_shape(backbone, heads or saved_heads)
    except ValueError as error:
        raise ValueError(f"{path} gives no encoder: {error}") from None
    positions: Positions = "sincos" if "pos_embed" in backbone else "none"
    return Weights(
        path=path, kind=kind, role=role, tensors=backbone, shape=shape, positions=positions
    )


def build_encoder(
    weights: Weights, *, image_size: int = 0, drop_path: float = 0.0
) -> VisionTransformer:
    """The module of these weights, fp32, in eval mode.

    Args:
        weights: what `read_weights` returned; they are copied.
        image_size: side of an image, pixels; 0 = as trained.
        drop_path: stochastic depth rate of the last block, for training.

    Raises:
        ValueError: shapes that do not fit together, or an impossible image size.
    """
    shape = replace(weights.shape, image_size=image_size or weights.shape.image_size)
    try:
        with torch.device("meta"):  # saves the time of an initialisation that is thrown away
            vit = build_vit(
                shape,
                positions=weights.positions,
                drop_path=drop_path,
                qk_norm=has_qk_norm(weights.tensors),
            )
    except ValueError as error:
        raise ValueError(f"{weights.path} gives no encoder: {error}") from None
    tensors = dict(weights.tensors)
    if "pos_embed" in tensors:
        tensors["pos_embed"] = positions_for(
            tensors["pos_embed"], shape.image_size // shape.patch_size
        )
    if names := differing_tensors(vit.state_dict(), tensors):
        raise ValueError(
            f"{len(names)} weights of {weights.path} do not fit a ViT of width {shape.dim} and "
            f"{shape.depth} blocks: {json.dumps(names[:3])}."
        )
    vit.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    suit_cpu(vit)
    return vit.eval()


def positions_for(pos_1ND: Tensor, grid: int) -> Tensor:
    """Positions for `grid` x `grid` patches.

    Sin-cos positions are computed by their formula, others are interpolated.

    Args:
        pos_1ND: positions of another grid, (1, 1 + patches, D), the class token's row first.
        grid: number of patches along a side.
    """
    old_grid = round((pos_1ND.shape[1] - 1) ** 0.5)
    if old_grid == grid:
        return pos_1ND
    dim = pos_1ND.shape[2]
    if dim % 4 == 0 and torch.allclose(
        pos_1ND.float(), sincos_positions(old_grid, dim), atol=_LOW_PRECISION
    ):
        return sincos_positions(grid, dim)
    return resample_abs_pos_embed(pos_1ND, [grid, grid], [old_grid, old_grid])


def _find_run(path: Path) -> Path | None:
    """The run folder, given that folder itself, its checkpoints or one checkpoint of it."""
    candidates = [path]
    if path.name == "checkpoints":
        candidates.append(path.parent)
    elif (path / "state.json").is_file():
        candidates.append(path.parent.parent)
    for folder in candidates:
        if (folder / "config.json").is_file():
            tree = read_json(folder / "config.json")
            if "config" in tree and "deepspeed" in tree:
                return folder
    return None


def _read_run_weights(path: Path, run: Path, role: EncoderRole, heads: int) -> Weights:
    """The backbone from one checkpoint (`path`) or the newest checkpoint of a run."""
    config = read_run_config(run)
    if heads not in (0, config.model.heads):
        raise ValueError(
            f"{run} has {config.model.heads} attention heads; leave out --heads {heads}."
        )
    if (path / "state.json").is_file():
        try:
            saved = Checkpoint(path)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(f"{path} is a damaged checkpoint ({_first_line(error)}).") from None
    else:
        newest = checkpoint.find_newest(run)
        if newest is None:
            raise ValueError(f"{run} holds no complete checkpoint yet.")
        saved = newest
    try:
        tensors = to_timm(saved.read_group(role))
    except ValueError as error:
        raise ValueError(f"checkpoint {saved.folder} gives no encoder: {error}") from None
    return Weights(
        path=run,
        kind="mocov3-ds run",
        role=role,
        tensors=tensors,
        shape=config.vit,
        positions=config.model.positions,
        config=config,
        saved=saved,
    )


def _read_folder(folder: Path) -> tuple[Mapping[str, Tensor], int, str]:
    """Tensors, number of heads (0 = unknown) and kind of a folder that is no run."""
    if (folder / "latest").is_file() or any(folder.glob("*_model_states.pt")):
        from mocov3_ds.distributed.zero_folder import merge_weights  # DeepSpeed takes seconds

        return merge_weights(folder), 0, "DeepSpeed checkpoint"
    for name in ("model.safetensors", "model.pth", "model.pth.tar", "pytorch_model.bin"):
        if (folder / name).is_file():
            tensors, heads, kind = _read_file(folder / name)
            config = folder / "config.json"
            if not heads and config.is_file():
                heads = _as_int(read_json(config).get("num_attention_heads"))
            return tensors, heads, kind
    raise ValueError(
        "it is no run (config.json and checkpoints/), no DeepSpeed checkpoint (latest, "
        "*_model_states.pt) and no exported folder (model.safetensors)."
    )


def _read_file(path: Path) -> tuple[Mapping[str, Tensor], int, str]:
    """Tensors, number of heads (0 = unknown) and kind of a safetensors file or a torch file."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(str(path), framework="pt") as file:
                heads = int((file.metadata() or {}).get("num_heads", 0))
                return {n: file.get_tensor(n) for n in file.keys()}, heads, "safetensors file"  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"it is no complete safetensors file ({error}).") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain data; DeiT saves one
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise ValueError(
                "it holds pickled objects besides tensors, which could run code and are not opened "
                f"({_refused_class(str(error))}); save its weights alone where you trust it: "
                "torch.save({'state_dict': ...})."
            ) from None
        raise ValueError(f"it is no torch file ({_first_line(error)}).") from None
    except Exception as error:  # a damaged archive can raise almost anything
        raise ValueError(
            f"it is no torch file, or a truncated one ({_first_line(error)})."
        ) from None
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}, not weights by name.")
    return _find_state_dict(loaded), _as_int(loaded.get("num_heads")), "torch file"


def _as_int(value: object) -> int:
    """An integer from a foreign file; 0 where it is anything else."""
    return value if isinstance(value, int) else 0


def _find_state_dict(loaded: dict[Any, Any]) -> Mapping[str, Tensor]:
    """The state dict in a file of `torch.save`, which other entries may surround."""
    for name in _WRAPPERS:
        inner = loaded.get(name)
        if isinstance(inner, dict) and any(isinstance(v, Tensor) for v in inner.values()):
            loaded = inner
            break
    return {str(n): t for n, t in loaded.items() if isinstance(t, Tensor)}


def _refused_class(text: str) -> str:
    """Name of the class that torch refused to unpickle, from its message."""
    for line in text.splitlines():
        if "GLOBAL" in line:
            return line.partition("GLOBAL")[2].split()[0]
    return "unknown class"


def _first_line(error: BaseException) -> str:
    """Type and first sentence of an error."""
    sentence = (str(error).strip().splitlines() or [""])[0].partition(". ")[0]
    return f"{type(error).__name__}: {sentence}"
