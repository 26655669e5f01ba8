"""A trained encoder as a plain module, outside any engine: for evaluation, export and embedding.

Read are runs of ours and single checkpoints of them, exported folders, the published MoCo v3 files
(`.pth.tar`), mmpretrain's, DeiT's, timm's and transformers' ViTs, and folders that DeepSpeed's
`save_checkpoint` wrote at any ZeRO stage. Nothing is unpickled but tensors and plain containers.
"""

import argparse
import contextlib
import json
import pickle
from collections.abc import Iterator, Mapping
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
from mocov3_ds.config import Config, from_json, read_json
from mocov3_ds.encoders.names import Which, has_qk_norm, shape_of, to_timm
from mocov3_ds.model.cpu_ops import suit_cpu
from mocov3_ds.model.vit import Positions, VitShape, build_vit, sincos_positions

__all__ = ["Weights", "Which", "build", "load_encoder", "read_run", "read_weights"]

_WRAPPERS = ("state_dict", "model", "module")
_LOW_PRECISION = 2e-2  # positions between -1 and 1, perhaps stored in fp16 or bf16


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A backbone's weights and what is known of where they come from."""

    path: Path
    """what was asked for"""
    kind: str
    """what it turned out to be, for people"""
    which: Which
    tensors: Mapping[str, Tensor]
    """backbone in timm's names, fp32"""
    shape: VitShape
    positions: Positions = "sincos"
    config: Config | None = None
    """settings of the run, where it is one of ours"""
    saved: Checkpoint | None = None
    """the checkpoint, where it is one of ours"""

    @property
    def title(self) -> str:
        """Name for tables and cards."""
        step = f", step {self.saved.step}" if self.saved is not None else ""
        return f"{self.path.name} ({self.which} encoder{step})"


def load_encoder(
    path: str | Path, which: Which = "base", *, image_size: int = 0, heads: int = 0
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
            DeepSpeed checkpoint folder, or a weights file (see the module's text).
        which: the base encoder (what the paper evaluates) or the momentum encoder.
        image_size: pixels; 0 = as trained. Fixed sin-cos positions are made anew for another size,
            others are interpolated.
        heads: attention heads where the weights cannot tell; 0 = the paper's for their width.

    Raises:
        ValueError: no such file, nothing usable in it, or weights that are missing.
    """
    return build(read_weights(path, which, heads=heads), image_size=image_size)


def read_run(run: Path) -> Config:
    """Settings of a run folder.

    Raises:
        ValueError: no run lives there.
    """
    path = run / "config.json"
    if not path.exists():
        raise ValueError(f"{run} is no run folder: it holds no config.json.")
    try:
        return from_json(read_json(path))
    except ValueError as error:
        raise ValueError(f"{run}: {error}") from None


def read_weights(path: str | Path, which: Which = "base", *, heads: int = 0) -> Weights:
    """Find out what `path` is and read the backbone from it; see `load_encoder`.

    Raises:
        ValueError: see `load_encoder`.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no {path}.")
    run = _run_of(path)
    if run is not None:
        return _of_run(path, run, which, heads)
    try:
        tensors, told_heads, kind = _of_folder(path) if path.is_dir() else _of_file(path)
        backbone = to_timm(tensors, which)
        shape = shape_of(backbone, heads or told_heads)
    except ValueError as error:
        raise ValueError(f"{path} gives no encoder: {error}") from None
    positions: Positions = "sincos" if "pos_embed" in backbone else "none"
    return Weights(
        path=path, kind=kind, which=which, tensors=backbone, shape=shape, positions=positions
    )


def build(weights: Weights, *, image_size: int = 0, drop_path: float = 0.0) -> VisionTransformer:
    """The module of these weights, fp32, in eval mode; see `load_encoder`.

    Raises:
        ValueError: shapes that do not fit together, an impossible image size.
    """
    shape = replace(weights.shape, image_size=image_size or weights.shape.image_size)
    with _of(weights.path), torch.device("meta"):  # no time for a thrown away initialisation
        vit = build_vit(
            shape,
            positions=weights.positions,
            drop_path=drop_path,
            qk_norm=has_qk_norm(weights.tensors),
        )
    tensors = dict(weights.tensors)
    if "pos_embed" in tensors:
        tensors["pos_embed"] = positions_for(
            tensors["pos_embed"], shape.image_size // shape.patch_size
        )
    own = vit.state_dict()
    wrong = sorted(
        {*own} ^ {*tensors} | {n for n in {*own} & {*tensors} if own[n].shape != tensors[n].shape}
    )
    if wrong:
        raise ValueError(
            f"{len(wrong)} weights of {weights.path} do not fit a ViT of width {shape.dim} and "
            f"{shape.depth} blocks: {json.dumps(wrong[:3])}."
        )
    vit.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    suit_cpu(vit)
    return vit.eval()


@contextlib.contextmanager
def _of(path: Path) -> Iterator[None]:
    """Name the file in what is wrong with sizes that it gave."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} gives no encoder: {error}") from None


def positions_for(pos_1ND: Tensor, grid: int) -> Tensor:
    """Positions for `grid` x `grid` patches: by their closed form if they have it, else resampled.

    Args:
        pos_1ND: (1, 1 + tokens, D), the class token's row first.
        grid: patches along a side.
    """
    old = round((pos_1ND.shape[1] - 1) ** 0.5)
    if old == grid:
        return pos_1ND
    dim = pos_1ND.shape[2]
    if dim % 4 == 0 and torch.allclose(
        pos_1ND.float(), sincos_positions(old, dim), atol=_LOW_PRECISION
    ):
        return sincos_positions(grid, dim)
    resampled: Tensor = resample_abs_pos_embed(pos_1ND, [grid, grid], [old, old])
    return resampled


def _run_of(path: Path) -> Path | None:
    """The run folder that `path` is, or in which it is the checkpoints or one of them."""
    inside = [path]
    if path.name == "checkpoints":
        inside.append(path.parent)
    elif (path / "state.json").is_file():
        inside.append(path.parent.parent)
    for folder in inside:
        if (folder / "config.json").is_file():
            tree = read_json(folder / "config.json")
            if "config" in tree and "deepspeed" in tree:
                return folder
    return None


def _of_run(path: Path, run: Path, which: Which, heads: int) -> Weights:
    config = read_run(run)
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
        newest = checkpoint.newest(run)
        if newest is None:
            raise ValueError(f"{run} holds no complete checkpoint yet.")
        saved = newest
    try:
        tensors = to_timm(saved.group(which))
    except ValueError as error:
        raise ValueError(f"checkpoint {saved.folder} gives no encoder: {error}") from None
    return Weights(
        path=run,
        kind="mocov3-ds run",
        which=which,
        tensors=tensors,
        shape=config.vit,
        positions=config.model.positions,
        config=config,
        saved=saved,
    )


def _of_folder(folder: Path) -> tuple[Mapping[str, Tensor], int, str]:
    """Tensors, number of heads (0 = not told) and kind of a folder that is no run of ours."""
    if (folder / "latest").is_file() or any(folder.glob("*_model_states.pt")):
        from mocov3_ds.distributed.zero_folder import merged_weights  # DeepSpeed takes seconds

        return merged_weights(folder), 0, "DeepSpeed checkpoint"
    for name in ("model.safetensors", "model.pth", "model.pth.tar", "pytorch_model.bin"):
        if (folder / name).is_file():
            tensors, heads, kind = _of_file(folder / name)
            config = folder / "config.json"
            if not heads and config.is_file():
                told = read_json(config).get("num_attention_heads", 0)
                heads = told if isinstance(told, int) else 0
            return tensors, heads, kind
    raise ValueError(
        "it is no run (config.json and checkpoints/), no DeepSpeed checkpoint (latest, "
        "*_model_states.pt) and no exported folder (model.safetensors)."
    )


def _of_file(path: Path) -> tuple[Mapping[str, Tensor], int, str]:
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
                f"({_refused(str(error))}); save its weights alone where you trust it: torch.save("
                "{'state_dict': ...})."
            ) from None
        raise ValueError(f"it is no torch file ({_first_line(error)}).") from None
    except Exception as error:  # a damaged archive can raise almost anything
        raise ValueError(
            f"it is no torch file, or a truncated one ({_first_line(error)})."
        ) from None
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}, not weights by name.")
    heads = loaded.get("num_heads", 0)
    return _weights_in(loaded), heads if isinstance(heads, int) else 0, "torch file"


def _weights_in(loaded: dict[Any, Any]) -> Mapping[str, Tensor]:
    """The state dict in what `torch.save` wrote."""
    for name in _WRAPPERS:
        inner = loaded.get(name)
        if isinstance(inner, dict) and any(isinstance(v, Tensor) for v in inner.values()):
            loaded = inner
            break
    return {str(n): t for n, t in loaded.items() if isinstance(t, Tensor)}


def _refused(text: str) -> str:
    for line in text.splitlines():
        if "GLOBAL" in line:
            return line.partition("GLOBAL")[2].split()[0]
    return "unknown class"


def _first_line(error: BaseException) -> str:
    sentence = (str(error).strip().splitlines() or [""])[0].partition(". ")[0]
    return f"{type(error).__name__}: {sentence}"
