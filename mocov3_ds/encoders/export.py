"""How do other programs get an encoder? A folder in their layout, checked before it gets its name.

    timm      model.safetensors, config.json          timm.create_model("local-dir:FOLDER", ...)
              timm.json (sizes)                       timm.create_model(..., checkpoint_path=...)
    deit      model.pth {"model": ...}                DeiT's and MAE's --finetune / --resume
    hf        model.safetensors, config.json, ...     transformers.ViTModel.from_pretrained(...)
    moco-v3   model.pth.tar {"state_dict": ...}       the published code's --pretrained

The first holds any model of timm, the last also ResNets and convolutional stems, the others the
plain Vision Transformer alone. Fixed positions are written out as weights, for the image size that
is asked for.
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
    has_layer_scale,
    has_qk_norm,
    replace_prefix,
    timm_sizes,
    to_transformers,
)
from mocov3_ds.encoders.load import build_encoder, read_saved_encoder, read_weights
from mocov3_ds.encoders.model_card import write_card
from mocov3_ds.encoders.picture_settings import (
    any_timm_config,
    timm_config,
    transformers_preprocessor,
)
from mocov3_ds.encoders.timm_networks import (
    build_network,
    load_network,
    with_size,
    write_arguments,
)
from mocov3_ds.encoders.weights import Weights
from mocov3_ds.model.backbones import shape_name
from mocov3_ds.model.shapes import BackboneShape, TimmShape, VitShape

_log = logging.getLogger("mocov3_ds")

Forward = Callable[[Tensor], Tensor]
"""images (B, C, H, W) -> class-token features (B, D)"""
Writer = Callable[[Weights, dict[str, Tensor], Path], Forward]
"""Writes tensors (in timm's names) into a folder and loads them from there as the program does."""

TOLERANCE = 1e-5  # of the largest feature, fp32
_PUBLISHED_RESNETS = ("resnet50", "resnet101", "resnet152", "resnet18", "resnet34")
"""ResNets whose names in timm and torchvision are the same, as the published code builds them"""


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
    check_format(weights, to)
    encoder = build_encoder(weights, image_size=image_size)
    weights = replace(weights, backbone=with_size(weights.backbone, image_size))
    with _replace_folder(out) as temporary:
        exported = (writers or WRITERS)[to](weights, _state_dict(encoder, weights), temporary)
        difference = _compare_features(encoder, exported, weights, out)
        table = describe_results(weights) if describe_results is not None else ""
        (temporary / "README.md").write_text(write_card(weights, to, difference, table))
    if left_out := weights.left_out_of(to):
        _log.warning("%s holds the %s encoder; left out: %s", out, role, left_out)
    return difference


def check_format(weights: Weights, to: Format) -> None:
    """Refuse a format that has no place for a backbone.

    Args:
        weights: the encoder that is to be written.
        to: program that it is to be written for.

    Raises:
        ValueError: the sentence names the formats that have.
    """
    height, width = weights.backbone.size
    if to == "hf" and (height != width or weights.backbone.channels != 3):
        raise ValueError(
            f"--to hf describes square images in RGB, these are of {height} x {width} pixels and "
            f"{weights.backbone.channels} channels; --to timm keeps both."
        )
    if weights.is_plain_vit:
        _check_variant(weights, to)
        return
    formats: dict[Format, str] = {}
    if isinstance(weights.backbone, TimmShape):
        formats["timm"] = "--to timm"
    if isinstance(weights.backbone, VitShape) or weights.backbone.name in _PUBLISHED_RESNETS:
        formats["moco-v3"] = "--to moco-v3"
    if to not in formats:
        where = " or ".join(formats.values()) or (
            "save the state_dict() of mocov3_ds.load_encoder and load it in your own network"
        )
        raise ValueError(
            f"--to {to} has no place for the backbone {shape_name(weights.backbone)}; {where}."
        )


def _check_variant(weights: Weights, to: Format) -> None:
    """Refuse to write a Vision Transformer with tensors for which a format has no place."""
    variants = {
        "--model.qk_norm: its attention has norms on queries and keys": has_qk_norm,
        "--model.layer_scale: its branches have a factor for each feature": has_layer_scale,
    }
    for description, is_there in variants.items():
        if to != "timm" and is_there(weights.tensors):
            raise ValueError(
                f"{weights.path} was trained with {description}, for which --to {to} has no "
                "place; use --to timm."
            )


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


def _state_dict(encoder: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """The encoder's weights; those of a ViT of ours with positions of zero where it has none."""
    tensors = {name: tensor.detach() for name, tensor in encoder.state_dict().items()}
    shape = weights.backbone
    if isinstance(shape, VitShape) and "pos_embed" not in tensors:
        rows, columns = shape.grid
        tensors["pos_embed"] = torch.zeros(1, rows * columns + 1, shape.dim)
    return tensors


@torch.no_grad()
def _compare_features(encoder: nn.Module, exported: Forward, weights: Weights, out: Path) -> float:
    """Largest difference between the features of two networks; more than rounding is refused."""
    generator, norm_eps = torch.Generator().manual_seed(0), weights.settings.norm_eps
    shape = weights.backbone
    images_BCHW = torch.randn(1, shape.channels, *shape.size, generator=generator)
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
    if isinstance(weights.backbone, TimmShape):
        return _write_any_timm(weights.backbone, weights, tensors, out)
    sizes = timm_sizes(weights.shape, [*tensors])
    save_tensors(tensors, file, {"format": "pt", "num_heads": f"{weights.shape.heads}"})
    (out / "timm.json").write_text(json.dumps(sizes, indent=1) + "\n")
    config = timm_config(weights.shape, weights.settings, sizes)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return _load_local_dir(out)


def _write_any_timm(
    shape: TimmShape, weights: Weights, tensors: dict[str, Tensor], out: Path
) -> Forward:
    """A model of timm that is no plain ViT; its metadata says what it is, without the folder."""
    arguments = write_arguments(shape)
    about = {"architecture": shape.name, "model_args": json.dumps(arguments)}
    save_tensors(tensors, out / "model.safetensors", {"format": "pt", **about})
    (out / "timm.json").write_text(json.dumps(arguments, indent=1) + "\n")
    network: Any = build_network(shape)
    config = any_timm_config(
        shape, weights.width, network.pretrained_cfg, weights.settings, arguments
    )
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return _load_local_dir(out)


def _load_local_dir(out: Path) -> nn.Module:
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
    shape = weights.backbone
    content = {"arch": published_name(shape), "epoch": 0, "state_dict": state}
    if isinstance(shape, VitShape):
        content["num_heads"] = shape.heads
    elif isinstance(shape, TimmShape):
        content["model_args"] = write_arguments(shape)
    torch.save(content, file)
    saved = replace_prefix(torch.load(file, weights_only=True)["state_dict"], prefix, "")
    head = head_name(shape)
    backbone = {name: t for name, t in saved.items() if not name.startswith(f"{head}.")}
    if isinstance(shape, TimmShape):
        return load_network(shape, backbone).eval()
    if weights.is_plain_vit:
        return _load_in_timm(weights.shape, backbone)
    return build_encoder(replace(weights, tensors=backbone))


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
    head = head_name(weights.backbone)
    if weights.role == "momentum":
        return replace_prefix(momentum, "projector.", f"module.base_encoder.{head}.")
    momentum_weights = read_saved_encoder(weights, saved, "momentum")
    backbone = build_encoder(momentum_weights, image_size=weights.image_size).state_dict()
    return {
        **replace_prefix(base, "projector.", f"module.base_encoder.{head}."),
        **replace_prefix(base, "predictor.", "module.predictor."),
        **replace_prefix(backbone, "", "module.momentum_encoder."),
        **replace_prefix(momentum, "projector.", f"module.momentum_encoder.{head}."),
    }


def head_name(shape: BackboneShape) -> str:
    """What the published code calls the projector, which has the place of a classifier."""
    return "head" if isinstance(shape, VitShape) else "fc"


def published_name(shape: BackboneShape) -> str:
    """What the published code calls an architecture."""
    if not isinstance(shape, VitShape):
        return shape_name(shape).removeprefix("timm:")
    if shape.stem == "conv":
        return "vit_conv_small" if shape.dim == 384 else "vit_conv_base"
    return architecture_names(shape)[1]
