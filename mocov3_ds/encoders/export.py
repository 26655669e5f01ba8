"""How do other programs get an encoder? A folder in their layout, checked before it gets its name.

    timm      model.safetensors, config.json          timm.create_model("local-dir:FOLDER", ...)
              timm.json (sizes)                       timm.create_model(..., checkpoint_path=...)
    deit      model.pth {"model": ...}                DeiT's and MAE's --finetune / --resume
    hf        model.safetensors, config.json, ...     transformers.ViTModel.from_pretrained(...)
    moco-v3   model.pth.tar {"state_dict": ...}       the published code's --pretrained

Fixed positions are written out as weights, for the image size that is asked for.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mocov3_ds.checkpoints.checkpoint import Checkpoint
from mocov3_ds.data.storage.atomic import sync_to_disk
from mocov3_ds.data.storage.tensor_file import save_tensors
from mocov3_ds.encoders.choices import EncoderRole, Format
from mocov3_ds.encoders.foreign_names import (
    architecture_names,
    has_qk_norm,
    replace_prefix,
    timm_sizes,
    to_timm,
    to_transformers,
)
from mocov3_ds.encoders.load import Weights, build_encoder, read_weights
from mocov3_ds.encoders.model_card import write_card
from mocov3_ds.encoders.picture_settings import timm_config, transformers_preprocessor
from mocov3_ds.model.vit import VitShape

_log = logging.getLogger("mocov3_ds")

Forward = Callable[[Tensor], Tensor]
"""images (B, C, H, W) -> class-token features (B, D)"""
Writer = Callable[[Weights, dict[str, Tensor], Path], Forward]
"""Writes tensors (in timm's names) into a folder and loads them from there as the program does."""

TOLERANCE = 1e-5  # of the largest feature, fp32


def export_encoder(
    path: Path,
    out: Path,
    *,
    to: Format = "timm",
    role: EncoderRole = "base",
    image_size: int = 0,
    heads: int = 0,
    describe_results: Callable[[Weights], str] | None = None,
    writers: Mapping[Format, Writer] | None = None,
) -> float:
    """Write the backbone for another program, with a README.md that says how to load it.

    What was written is loaded again the way that program loads it, and must give the features of
    the encoder itself; only then does the folder get its name.

    Args:
        path: run, or anything else that `load_encoder` reads.
        out: folder to make; must not exist or be empty.
        to: program that will load the weights.
        role: base or momentum encoder.
        image_size: side of an image, pixels; 0 = as trained.
        heads: attention heads where the weights cannot tell; 0 = the paper's for their width.
        describe_results: function that returns a Markdown table of the encoder's accuracies for
            the README.md, empty where it was not evaluated; None = no table.
        writers: functions that write and load each format; None = `WRITERS`.

    Returns:
        Largest difference of a feature between the encoder and the exported one.

    Raises:
        ValueError: nothing to export, `out` in use, a missing package, or features that differ.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; give another --out.")
    weights = read_weights(path, role, heads=heads)
    if has_qk_norm(weights.tensors) and to != "timm":
        raise ValueError(
            f"{path} was trained with --model.qk_norm: its attention has norms on queries and "
            f"keys, for which --to {to} has no place; use --to timm."
        )
    encoder = build_encoder(weights, image_size=image_size)
    size = image_size or weights.shape.image_size
    weights = replace(weights, shape=replace(weights.shape, image_size=size))
    with _replace_folder(out) as temporary:
        exported = (writers or WRITERS)[to](weights, _state_dict(encoder, weights.shape), temporary)
        difference = _compare_features(encoder, exported, size, out, weights.settings.norm_eps)
        table = describe_results(weights) if describe_results is not None else ""
        (temporary / "README.md").write_text(write_card(weights, to, difference, table))
    if left_out := weights.left_out_of(to):
        _log.warning("%s holds the %s encoder; left out: %s", out, role, left_out)
    return difference


@contextlib.contextmanager
def _replace_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out`, whole and on disk, or vanishes if the block fails."""
    temporary = out.with_name(out.name + ".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            sync_to_disk(path)
        temporary.replace(out)  # over an empty folder, too
        sync_to_disk(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _state_dict(encoder: nn.Module, shape: VitShape) -> dict[str, Tensor]:
    """The encoder's weights, with positions of zero where it has none."""
    tensors = {name: tensor.detach() for name, tensor in encoder.state_dict().items()}
    if "pos_embed" not in tensors:
        patches = (shape.image_size // shape.patch_size) ** 2
        tensors["pos_embed"] = torch.zeros(1, patches + 1, shape.dim)
    return tensors


@torch.no_grad()
def _compare_features(
    encoder: nn.Module, exported: Forward, size: int, out: Path, norm_eps: float
) -> float:
    """Largest difference between the features of two networks; more than rounding is refused."""
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(1, 3, size, size, generator=generator)
    features_BD, exported_BD = encoder(images_BCHW), exported(images_BCHW)
    difference, largest = (float(x.abs().max()) for x in (features_BD - exported_BD, features_BD))
    if not difference <= TOLERANCE * max(largest, 1.0):
        cause = (
            ""
            if norm_eps == 1e-6
            else (f" (its norms have the epsilon {norm_eps:g}, for which only --to hf has a place)")
        )
        raise ValueError(
            f"the exported encoder's features differ by {difference:.2g} where rounding is "
            f"below {TOLERANCE:.0e} of {largest:.2g}{cause}; nothing was written to {out}."
        )
    return difference


# ----------------------------------------------------------------------------------------- writers


def _write_timm(weights: Weights, tensors: dict[str, Tensor], out: Path) -> Forward:
    file = out / "model.safetensors"
    sizes = timm_sizes(weights.shape, qk_norm=has_qk_norm(tensors))
    save_tensors(tensors, file, {"format": "pt", "num_heads": f"{weights.shape.heads}"})
    (out / "timm.json").write_text(json.dumps(sizes, indent=1) + "\n")
    config = timm_config(weights.shape, weights.settings, sizes)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    model: nn.Module = timm.create_model(f"local-dir:{out}", pretrained=True)
    return model.eval()


def _write_deit(weights: Weights, tensors: dict[str, Tensor], out: Path) -> Forward:
    file = out / "model.pth"
    torch.save({"model": tensors, "num_heads": weights.shape.heads}, file)
    return _load_in_timm(weights.shape, torch.load(file, weights_only=True)["model"])


def _write_moco_v3(weights: Weights, tensors: dict[str, Tensor], out: Path) -> Forward:
    prefix = "module.base_encoder."
    state = replace_prefix(tensors, "", prefix)
    if weights.saved is not None:
        state |= _read_other_modules(weights, weights.saved)
    file = out / "model.pth.tar"
    content = {
        "arch": architecture_names(weights.shape)[1],
        "num_heads": weights.shape.heads,
        "epoch": 0,
        "state_dict": state,
    }
    torch.save(content, file)
    saved = replace_prefix(torch.load(file, weights_only=True)["state_dict"], prefix, "")
    backbone = {name: tensor for name, tensor in saved.items() if not name.startswith("head.")}
    return _load_in_timm(weights.shape, backbone)


def _write_hf(weights: Weights, tensors: dict[str, Tensor], out: Path) -> Forward:
    try:
        import transformers  # not needed by anything else here
    except ImportError:
        raise ValueError(
            "--to hf loads what it wrote with transformers, which is not installed; "
            "pip install transformers."
        ) from None
    shape = weights.shape
    config = transformers.ViTConfig(
        hidden_size=shape.dim,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.dim,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        layer_norm_eps=weights.settings.norm_eps,
        architectures=["ViTModel"],
    )
    config.save_pretrained(out)
    save_tensors(to_transformers(tensors), out / "model.safetensors", {"format": "pt"})
    preprocessor = transformers_preprocessor(shape.image_size, weights.settings)
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1) + "\n")
    loaded: Any = transformers.ViTModel.from_pretrained(
        out, add_pooling_layer=False, output_loading_info=True
    )
    model, report = loaded
    if names := [*report["missing_keys"], *report["unexpected_keys"]]:
        raise ValueError(f"transformers did not recognise {sorted(names)[:3]}.")
    return lambda images_BCHW: model.eval()(pixel_values=images_BCHW).last_hidden_state[:, 0]


WRITERS: dict[Format, Writer] = {
    "timm": _write_timm,
    "deit": _write_deit,
    "hf": _write_hf,
    "moco-v3": _write_moco_v3,
}


def _load_in_timm(shape: VitShape, tensors: dict[str, Tensor]) -> nn.Module:
    """Timm's ViT of this shape with these weights, in eval mode."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model("vit_base_patch16_224", **timm_sizes(shape))
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _read_other_modules(weights: Weights, saved: Checkpoint) -> dict[str, Tensor]:
    """Heads, predictor and momentum encoder of a run, in the names of the published files.

    A momentum encoder is written in the place of the base encoder, where the published code looks
    for it, and stands there alone: predictor and base encoder belong to another network.
    """
    base, momentum = saved.read_group("base"), saved.read_group("momentum")
    if weights.role == "momentum":
        return replace_prefix(momentum, "projector.", "module.base_encoder.head.")
    encoder = replace(weights, role="momentum", tensors=to_timm(momentum))
    backbone = build_encoder(encoder, image_size=weights.shape.image_size).state_dict()
    return {
        **replace_prefix(base, "projector.", "module.base_encoder.head."),
        **replace_prefix(base, "predictor.", "module.predictor."),
        **replace_prefix(backbone, "", "module.momentum_encoder."),
        **replace_prefix(momentum, "projector.", "module.momentum_encoder.head."),
    }
