"""Take the encoder away: weights that other programs load, checked before success is claimed.

    timm      model.safetensors, timm.json (sizes)    timm.create_model(..., checkpoint_path=...)
    deit      model.pth {"model": ...}                DeiT's and MAE's --finetune / --resume
    hf        model.safetensors, config.json, ...     transformers.ViTModel.from_pretrained(...)
    moco-v3   model.pth.tar {"state_dict": ...}       the published code's --pretrained

Fixed positions are written out as weights, for the size that is asked for.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mocov3_ds.encoders.load import Weights, Which, build, read_weights
from mocov3_ds.encoders.names import has_qk_norm, to_moco_v3, to_timm, to_transformers
from mocov3_ds.evaluation import results
from mocov3_ds.model.vit import PAPER_SHAPES, VitShape

Format = Literal["timm", "deit", "hf", "moco-v3"]
Forward = Callable[[Tensor], Tensor]

TOLERANCE = 1e-5  # of the largest feature, fp32
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ARCHITECTURES = {  # names of the same sizes in timm, and in the published code where it has them
    "vit_s16": ("vit_small_patch16_224", "vit_small"),
    "vit_b16": ("vit_base_patch16_224", "vit_base"),
    "vit_l16": ("vit_large_patch16_224", "vit_large"),
    "vit_h14": ("vit_huge_patch14_224", "vit_huge"),
}


def export(
    path: Path,
    out: Path,
    *,
    to: Format = "timm",
    which: Which = "base",
    image_size: int = 0,
    heads: int = 0,
) -> float:
    """Write the backbone for another program, with a README.md that says how to load it.

    What was written is loaded again the way that program loads it, and must give the features of
    the encoder itself; only then does the folder get its name.

    Args:
        path: a run, or anything else that `load_encoder` reads.
        out: folder to make; must not exist or be empty.
        to: program that shall load it.
        which: base or momentum encoder.
        image_size: pixels; 0 = as trained.
        heads: see `load_encoder`.

    Returns:
        largest difference of a feature between the encoder and the exported one.

    Raises:
        ValueError: nothing to export, `out` in use, a package that is missing, or features that
            differ.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; give another --out.")
    weights = read_weights(path, which, heads=heads)
    if has_qk_norm(weights.tensors) and to != "timm":
        raise ValueError(
            f"{path} was trained with --model.qk_norm: its attention has norms on queries and "
            f"keys, for which --to {to} has no place; use --to timm."
        )
    encoder = build(weights, image_size=image_size)
    size = image_size or weights.shape.image_size
    weights = replace(weights, shape=replace(weights.shape, image_size=size))
    tensors = {name: tensor.detach() for name, tensor in encoder.state_dict().items()}
    if "pos_embed" not in tensors:  # no positions are positions of zero
        tokens = (size // weights.shape.patch_size) ** 2 + 1
        tensors["pos_embed"] = torch.zeros(1, tokens, weights.shape.dim)
    aside = out.with_name(out.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        again = _WRITERS[to](weights, tensors, aside)
        difference, largest = _compare(encoder, again, size)
        if not difference <= TOLERANCE * max(largest, 1.0):
            raise ValueError(
                f"the exported encoder's features differ by {difference:.2g} where rounding is "
                f"below {TOLERANCE:.0e} of {largest:.2g}; nothing was written to {out}."
            )
        (aside / "README.md").write_text(_card(weights, to, difference))
        if out.exists():
            out.rmdir()
        aside.replace(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return difference


@torch.no_grad()
def _compare(encoder: nn.Module, again: Forward, size: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(1, 3, size, size, generator=generator)
    ours_BD, theirs_BD = encoder(images_BCHW), again(images_BCHW)
    return float((ours_BD - theirs_BD).abs().max()), float(ours_BD.abs().max())


# ----------------------------------------------------------------------------------------- writers


def _write_timm(weights: Weights, tensors: dict[str, Tensor], out: Path) -> Forward:
    file = out / "model.safetensors"
    sizes = timm_sizes(weights.shape, qk_norm=has_qk_norm(tensors))
    save_file(tensors, str(file), metadata={"format": "pt", "num_heads": f"{weights.shape.heads}"})
    (out / "timm.json").write_text(json.dumps(sizes, indent=1) + "\n")
    again: nn.Module = timm.create_model(
        "vit_base_patch16_224", checkpoint_path=str(file), **sizes
    ).eval()
    return again


def _write_deit(weights: Weights, tensors: dict[str, Tensor], out: Path) -> Forward:
    file = out / "model.pth"
    torch.save({"model": tensors, "num_heads": weights.shape.heads}, file)
    return _in_timm(weights.shape, torch.load(file, weights_only=True)["model"])


def _write_moco_v3(weights: Weights, tensors: dict[str, Tensor], out: Path) -> Forward:
    parts: dict[str, dict[str, Tensor]] = {"base.backbone": tensors}
    if weights.saved is not None:
        parts |= _heads_of(weights)
    file = out / "model.pth.tar"
    content = {
        "arch": _name(weights.shape)[1],
        "num_heads": weights.shape.heads,
        "epoch": 0,
        "state_dict": to_moco_v3(parts),
    }
    torch.save(content, file)
    read = torch.load(file, weights_only=True)["state_dict"]
    prefix = "module.base_encoder."
    backbone = {
        name.removeprefix(prefix): tensor
        for name, tensor in read.items()
        if name.startswith(prefix) and not name.startswith(prefix + "head.")
    }
    return _in_timm(weights.shape, backbone)


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
        layer_norm_eps=1e-6,
        architectures=["ViTModel"],
    )
    config.save_pretrained(out)
    save_file(to_transformers(tensors), str(out / "model.safetensors"), metadata={"format": "pt"})
    side = {"height": shape.image_size, "width": shape.image_size}
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": side,
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _MEAN,
        "image_std": _STD,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1) + "\n")
    loaded: Any = transformers.ViTModel.from_pretrained(
        out, add_pooling_layer=False, output_loading_info=True
    )
    again, told = loaded
    wrong = [*told["missing_keys"], *told["unexpected_keys"]]
    if wrong:
        raise ValueError(f"transformers did not recognise {sorted(wrong)[:3]}.")

    def features(images_BCHW: Tensor) -> Tensor:
        hidden_BND: Tensor = again.eval()(pixel_values=images_BCHW).last_hidden_state
        return hidden_BND[:, 0]

    return features


_WRITERS: dict[Format, Callable[[Weights, dict[str, Tensor], Path], Forward]] = {
    "timm": _write_timm,
    "deit": _write_deit,
    "hf": _write_hf,
    "moco-v3": _write_moco_v3,
}


def _in_timm(shape: VitShape, tensors: dict[str, Tensor]) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model("vit_base_patch16_224", **timm_sizes(shape))
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _heads_of(weights: Weights) -> dict[str, dict[str, Tensor]]:
    """What a run knows besides the backbone.

    A momentum encoder is written in the place of the base encoder, where the published code looks
    for it, and then stands there alone: predictor and base encoder belong to another network.
    """
    saved = weights.saved
    assert saved is not None
    base, momentum = saved.group("base"), saved.group("momentum")

    def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    own = momentum if weights.which == "momentum" else base
    parts = {"base.projector": part(own, "projector.")}
    if weights.which == "base":
        parts["predictor"] = part(base, "predictor.")
        same = replace(weights, which="momentum", tensors=to_timm(momentum))
        parts["momentum.backbone"] = dict(
            build(same, image_size=weights.shape.image_size).state_dict()
        )
        parts["momentum.projector"] = part(momentum, "projector.")
    return parts


def timm_sizes(shape: VitShape, *, qk_norm: bool = False) -> dict[str, Any]:
    """Arguments that make any of timm's ViTs the one of this shape."""
    sizes = {
        "img_size": shape.image_size,
        "patch_size": shape.patch_size,
        "embed_dim": shape.dim,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "num_classes": 0,
    }
    return sizes | {"qk_norm": True} if qk_norm else sizes


def _name(shape: VitShape) -> tuple[str, str]:
    """Name in timm and in the published code of an architecture."""
    for name, known in PAPER_SHAPES.items():
        if replace(shape, image_size=224) == known:
            return _ARCHITECTURES[name]
    return "vit_base_patch16_224", f"vit_{shape.dim}_{shape.depth}_{shape.patch_size}"


# -------------------------------------------------------------------------------------- model card


def _card(weights: Weights, to: Format, difference: float) -> str:
    shape = weights.shape
    return "\n\n".join(
        [
            f"# {weights.title}: MoCo v3 features",
            "Class-token features of a Vision Transformer pretrained without labels "
            "([MoCo v3](https://arxiv.org/abs/2104.02057)), exported with mocov3-ds.",
            "## Load it",
            _how_to_load(weights, to),
            f"Input: RGB in [0, 1], normalised by mean {_MEAN} and std {_STD}, "
            f"{shape.image_size} x {shape.image_size} pixels. Evaluation resizes the shorter side "
            f"to {round(shape.image_size * 256 / 224)} (bilinear) and crops the centre. Output: "
            f"{shape.dim} features.",
            f"Loaded this way its features differ from the encoder's by {difference:.1e} at most "
            "(fp32, checked when it was exported).",
            "## What it is",
            _what_it_is(weights),
            "## How good it is",
            _how_good(weights),
            "",
        ]
    )


def _how_to_load(weights: Weights, to: Format) -> str:
    name = _name(weights.shape)[0]
    sizes = timm_sizes(weights.shape, qk_norm=has_qk_norm(weights.tensors))
    arguments = ", ".join(f"{key}={value}" for key, value in sizes.items())
    code = {
        "timm": f'import timm\n\nmodel = timm.create_model(\n    "{name}", '
        f'checkpoint_path="model.safetensors",\n    {arguments},\n).eval()\n'
        "features = model(images)",
        "deit": "import timm, torch\n\n"
        f'model = timm.create_model("{name}", {arguments})\n'
        'model.load_state_dict(torch.load("model.pth", weights_only=True)["model"])\n'
        "# or, in DeiT's and MAE's code: --finetune model.pth",
        "hf": "from transformers import ViTModel\n\n"
        'model = ViTModel.from_pretrained(".", add_pooling_layer=False).eval()\n'
        "features = model(pixel_values=images).last_hidden_state[:, 0]",
        "moco-v3": 'import torch\n\nstate = torch.load("model.pth.tar", weights_only=True)'
        '["state_dict"]\n# module.base_encoder.*, as in the published files; in the published code:'
        "\n# main_lincls.py --pretrained model.pth.tar",
    }[to]
    return f"```python\n{code}\n```"


def _what_it_is(weights: Weights) -> str:
    shape = weights.shape
    rows = [
        ("weights from", f"{weights.kind} `{weights.path.name}`, {weights.which} encoder"),
        ("width, blocks, heads", f"{shape.dim}, {shape.depth}, {shape.heads}"),
        ("patch, image", f"{shape.patch_size}, {shape.image_size} pixels"),
        ("positions", "2-D, written out" if weights.positions == "sincos" else "none (zeros)"),
    ]
    if weights.config is not None and weights.saved is not None:
        config = weights.config
        rows += [
            ("steps", f"{weights.saved.step}"),
            ("recipe", f"{config.recipe}: global batch {config.batch}, {config.epochs:g} epochs, "
             f"{config.warmup_epochs:g} of warm-up"),
            ("loss", f"temperature {config.moco.temperature}, momentum {config.moco.momentum} "
             f"({config.moco.momentum_schedule})"),
            ("patch projection", "trained" if config.model.patch_lr else "frozen at random"),
            ("optimizer", _optimizer(weights.path)),
        ]  # fmt: skip
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _optimizer(run: Path) -> str:
    tree = json.loads((run / "config.json").read_text())
    block = tree.get("deepspeed", {}).get("optimizer", {})
    values = ", ".join(f"{key} {value}" for key, value in block.get("params", {}).items())
    return f"{block.get('type', 'not told')}: {values}"


def _how_good(weights: Weights) -> str:
    folder = results.folder_of(weights.path)
    found = results.read(folder)
    if not any(key.endswith(f" {weights.which}") for key in found):
        return "Not evaluated (`mocov3 knn`, `python -m mocov3_ds.evaluation.linear`)."
    return f"{results.HEADER}\n{results.table_line(folder, weights.which)}"
