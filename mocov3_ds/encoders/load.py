"""How does a trained encoder become a plain module, outside any engine?

Read are runs of this package and single checkpoints of them, exported folders, the published MoCo
v3 files (`.pth.tar`), the ViTs of mmpretrain, DINO, DeiT, timm and transformers, ResNets and any
model of timm whose name is known (`timm_networks`), and folders that DeepSpeed's `save_checkpoint`
and `ds_to_universal` wrote. Each tensor of the backbone is used, or the file is refused; so is a
setting beside the weights that this network cannot obey. Nothing is unpickled but tensors and plain
containers.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from mocov3_ds.checkpoints import checkpoint
from mocov3_ds.checkpoints.checkpoint import Checkpoint
from mocov3_ds.checkpoints.run_paths import anchor_to_run
from mocov3_ds.config.run_config import Config, encoder_shape
from mocov3_ds.config.stored import from_json
from mocov3_ds.distributed import ranks
from mocov3_ds.encoders.choices import EncoderRole
from mocov3_ds.encoders.foreign_names import (
    has_layer_scale,
    has_qk_norm,
    infer_shape,
    replace_prefix,
    take_backbone,
    to_timm,
)
from mocov3_ds.encoders.networks import CLASS_TOKEN, choose_prefix, summarise_names
from mocov3_ds.encoders.owner_settings import (
    TRANSFORMERS_EPS,
    OwnerSettings,
    read_settings_beside,
    read_settings_inside,
)
from mocov3_ds.encoders.timm_networks import (
    ClaimedNetwork,
    build_network,
    find_claim,
    load_network,
    take_tensors,
    with_size,
)
from mocov3_ds.encoders.torch_file import first_sentence
from mocov3_ds.encoders.weight_files import FoundWeights, check_readable, find_weights
from mocov3_ds.encoders.weights import Weights
from mocov3_ds.model.backbones import describe_backbone
from mocov3_ds.model.cpu_ops import suit_cpu
from mocov3_ds.model.shapes import LARGEST_SIDE, BackboneShape
from mocov3_ds.model.sigma_reparam import bake_weights
from mocov3_ds.model.tensor_differences import differing_tensors
from mocov3_ds.model.vit import VitShape, build_vit, sincos_positions
from mocov3_ds.recipes import read_json
from mocov3_ds.settings.paths import expand_user

_log = logging.getLogger("mocov3_ds")

_LOW_PRECISION = 2e-2  # positions between -1 and 1, perhaps stored in fp16 or bf16


def load_encoder(
    path: str | Path, which: EncoderRole = "base", *, image_size: int = 0, heads: int = 0
) -> nn.Module:
    """A trained backbone, fp32, in eval mode: images (B, 3, H, W) -> features (B, D).

    They are the class token's of a Vision Transformer, and what the network pools of any other.

    Images are RGB scaled to [0, 1], then normalised by the ImageNet mean (0.485, 0.456, 0.406) and
    standard deviation (0.229, 0.224, 0.225), at the size the encoder was trained with (or
    `image_size`). A config beside the weights may tell another mean and deviation, which is then
    said in the line that tells what was understood (logger `mocov3_ds`). The evaluation's own
    preprocessing resizes the shorter side to 256/224 of that size (bilinear, antialiased) and crops
    the centre:

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
        ValueError: no such file, nothing usable in it, weights that are missing or have no place
            here, or settings beside them that cannot be obeyed.
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
        return anchor_to_run(from_json(read_json(path)), run)
    except ValueError as error:
        raise ValueError(f"{run}: {error}") from None


def read_weights(
    path: str | Path,
    role: EncoderRole = "base",
    *,
    heads: int = 0,
    expected: BackboneShape | None = None,
    tells: bool = True,
) -> Weights:
    """Find out what kind of file or folder `path` is and read the backbone from it.

    Args:
        path: anything that `load_encoder` reads.
        role: base or momentum encoder.
        heads: attention heads where the weights cannot tell; 0 = the paper's for their width.
        expected: the network, or the number of heads, that it is where nothing tells another one;
            None = the plain ViT with the paper's heads, and a guess.
        tells: whether what was understood goes to the log; False = the caller says it.

    Raises:
        ValueError: no such file, nothing usable in it, or weights that are missing.
    """
    path = expand_user(path)
    if heads < 0:
        raise ValueError(f"--heads {heads} is no number of attention heads.")
    if not path.exists():
        raise ValueError(f"there is no {path}.")
    check_readable(path)
    run = _find_run(path)
    if run is not None:
        return _read_run_weights(path, run, role, heads)
    try:
        weights = _interpret_tensors(path, find_weights(path), role, heads, expected)
    except ValueError as error:
        raise ValueError(f"{path} gives no encoder: {error}") from None
    except (TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(  # a stranger's file may hold anything in the place of anything
            f"{path} gives no encoder: it is damaged, or of a layout that is not known here "
            f"({first_sentence(error)})."
        ) from None
    if tells and ranks.is_first():
        is_plain = weights.settings.source and not weights.guess and not weights.left_out
        level = logging.INFO if is_plain else logging.WARNING
        _log.log(level, "%s", weights.describe())
    return weights


def _interpret_tensors(
    path: Path,
    found: FoundWeights,
    role: EncoderRole,
    heads: int,
    expected: BackboneShape | None,
) -> Weights:
    """The encoder among the tensors of a file, by the settings within and beside it."""
    claim, is_plain = find_claim(found), isinstance(expected, VitShape) and expected.stem == "patch"
    if claim is None and expected is not None and not is_plain:
        claim = ClaimedNetwork(shape=expected, settings=OwnerSettings(source="what is expected"))
    if claim is not None:
        return _take_claimed(path, found, role, claim, heads)
    try:
        settings = read_settings_beside(found.folder)
        options = read_settings_inside(found.tree, choose_prefix(found.tensors, role), heads)
    except ValueError:
        take_backbone(found.tensors, role, qkv_bias=False)  # a tensor says it more plainly
        raise
    biased = settings.qkv_bias and options.qkv_bias
    backbone = take_backbone(found.tensors, role, qkv_bias=biased)
    claims = {s.heads: s.source for s in (settings, options) if s.heads}
    if heads:
        claims.setdefault(heads, "--heads")
    if len(claims) > 1:
        sentence = ", ".join(f"{source} says {count}" for count, source in claims.items())
        raise ValueError(f"the number of attention heads is not clear: {sentence}.")
    assumed_heads = expected.heads if isinstance(expected, VitShape) else 0
    shape = infer_shape(backbone.tensors, next(iter(claims), assumed_heads))
    if contradiction := settings.contradiction_of(shape) or options.contradiction_of(shape):
        raise ValueError(
            f"{contradiction}; they do not belong together. Move the weights alone to a folder, or "
            "save them alone in a file."
        )
    if options.source and not settings.source:
        settings = replace(options, mean=settings.mean, std=settings.std)
    if not settings.source and f"{backbone.prefix}embeddings.{CLASS_TOKEN}" in found.tensors:
        settings = replace(settings, norm_eps=TRANSFORMERS_EPS)
    return Weights(
        path=path,
        kind=found.kind,
        role=role,
        tensors=backbone.tensors,
        backbone=shape,
        width=shape.dim,
        positions="sincos" if "pos_embed" in backbone.tensors else "none",
        settings=settings,
        left_out=backbone.left_out,
        guess="" if claims or assumed_heads else explain_guess(shape),
    )


def _take_claimed(
    path: Path, found: FoundWeights, role: EncoderRole, claim: ClaimedNetwork, heads: int
) -> Weights:
    """The encoder of a file whose settings or tensors say that it is no plain ViT."""
    if heads:
        raise ValueError(
            f"{claim.settings.source} decides its architecture; leave out --heads {heads}."
        )
    tensors, left_out = take_tensors(found.tensors, claim.shape, role)
    return Weights(
        path=path,
        kind=found.kind,
        role=role,
        tensors=tensors,
        backbone=claim.shape,
        width=_count_features(claim.shape),
        settings=claim.settings,
        left_out=left_out,
    )


def explain_guess(shape: VitShape) -> str:
    """Which number of heads was assumed, and what else it might be.

    Args:
        shape: sizes whose heads are those of the paper for the width.
    """
    usual = shape.dim // 64
    alternative = f", {usual} (DeiT, DINO, timm) is as likely" if usual != shape.heads else ""
    return (
        f"nothing tells the number of attention heads: {shape.heads} assumed, MoCo v3's for width "
        f"{shape.dim}{alternative}; --heads decides"
    )


def build_encoder(weights: Weights, *, image_size: int = 0, drop_path: float = 0.0) -> nn.Module:
    """The module of these weights, fp32, in eval mode.

    Args:
        weights: what `read_weights` returned; they are copied.
        image_size: side of an image, pixels; 0 = as trained.
        drop_path: stochastic depth rate of the last block, for training.

    Raises:
        ValueError: shapes that do not fit together, or an impossible image size.
    """
    if not 0 <= image_size <= LARGEST_SIDE:
        raise ValueError(
            f"image size {image_size} is no side of an image (at most {LARGEST_SIDE}); "
            "0 = as trained."
        )
    shape = with_size(weights.backbone, image_size)
    if not isinstance(shape, VitShape):
        try:
            network = load_network(shape, weights.tensors, drop_path)
        except ValueError as error:
            raise ValueError(f"{weights.path} gives no encoder: {error}") from None
        suit_cpu(network)
        return network.eval()
    try:
        with torch.device("meta"):  # saves the time of an initialisation that is thrown away
            vit = build_vit(
                shape,
                positions=weights.positions,
                drop_path=drop_path,
                qk_norm=has_qk_norm(weights.tensors),
                layer_scale=float(has_layer_scale(weights.tensors)),
                norm_eps=weights.settings.norm_eps,
            )
    except ValueError as error:
        raise ValueError(f"{weights.path} gives no encoder: {error}") from None
    tensors = dict(weights.tensors)
    if "pos_embed" in tensors:
        tensors["pos_embed"] = positions_for(tensors["pos_embed"], shape.grid, weights.shape.grid)
    if names := differing_tensors(vit.state_dict(), tensors):
        raise ValueError(
            f"{len(names)} weights of {weights.path} do not fit a ViT of width {shape.dim} and "
            f"{shape.depth} blocks: {json.dumps(names[:3])}."
        )
    vit.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    suit_cpu(vit)
    return vit.eval()


def positions_for(pos_1ND: Tensor, grid: tuple[int, int], old_grid: tuple[int, int]) -> Tensor:
    """Positions for another grid of patches.

    Sin-cos positions are computed by their formula, others are interpolated.

    Args:
        pos_1ND: positions of the old grid, (1, 1 + patches, D), the class token's row first.
        grid: rows and columns of patches.
        old_grid: rows and columns of those that are given.
    """
    if old_grid == grid:
        return pos_1ND
    dim = pos_1ND.shape[2]
    if dim % 4 == 0 and torch.allclose(
        pos_1ND.float(), sincos_positions(old_grid, dim), atol=_LOW_PRECISION
    ):
        return sincos_positions(grid, dim)
    return resample_abs_pos_embed(pos_1ND, [*grid], [*old_grid])


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
    shape = encoder_shape(config).backbone
    is_vit = isinstance(shape, VitShape)
    if heads and not is_vit:
        raise ValueError(f"{run} says what its backbone is; leave out --heads {heads}.")
    if heads not in (0, config.model.heads):
        raise ValueError(
            f"{run} has {config.model.heads} attention heads; leave out --heads {heads}."
        )
    if (path / "state.json").is_file():
        try:
            saved = Checkpoint(path)
        except PermissionError as error:
            raise ValueError(f"checkpoint {path} cannot be read: {error}.") from None
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(f"{path} is a damaged checkpoint ({first_sentence(error)}).") from None
    else:
        newest = checkpoint.find_newest(run)
        if newest is None:
            raise ValueError(f"{run} holds no complete checkpoint yet.")
        saved = newest
    try:
        tensors = _read_backbone(saved, role, shape)
    except ValueError as error:
        raise ValueError(f"checkpoint {saved.folder} gives no encoder: {error}") from None
    names = [f"{group}.{n}" for group in ("base", "momentum") for n in saved.tensor_names(group)]
    unused = [name for name in names if not name.startswith(f"{role}.backbone.")]
    return Weights(
        path=run,
        kind="mocov3-ds run",
        role=role,
        tensors=tensors,
        backbone=shape,
        width=_count_features(shape),
        positions=config.model.positions,
        settings=OwnerSettings(mean=config.views.mean, std=config.views.std),
        config=config,
        saved=saved,
        left_out=summarise_names(unused, f"{role}.backbone."),
    )


def _count_features(shape: BackboneShape) -> int:
    if isinstance(shape, VitShape):
        return shape.dim
    with torch.enable_grad():  # which the caller may have switched off
        return describe_backbone(build_network(shape), shape).width


def _read_backbone(saved: Checkpoint, role: EncoderRole, shape: BackboneShape) -> dict[str, Tensor]:
    """The backbone of a saved encoder in the names of its own library, fp32."""
    group = bake_weights(saved.read_group(role))
    if isinstance(shape, VitShape) and shape.stem == "patch":
        return to_timm(group)
    tensors = replace_prefix(group, "backbone.", "")
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def read_saved_encoder(weights: Weights, saved: Checkpoint, role: EncoderRole) -> Weights:
    """The other encoder of the run that weights are from.

    Args:
        weights: what `read_weights` returned for a run.
        saved: the checkpoint that they are from.
        role: base or momentum encoder.
    """
    assert weights.config is not None
    backbone = encoder_shape(weights.config).backbone  # for the images that it was trained with
    tensors = _read_backbone(saved, role, backbone)
    return replace(weights, role=role, backbone=backbone, tensors=tensors)
