"""Which tensors of given weights does a new run begin with, and what is said of the others?

The base encoder takes the backbone, and projector and predictor where the file has them in the
run's sizes; the momentum encoder then starts as its copy, as in the paper. What a file has besides
is named, and what does not fit is refused by its name.

Shape suffixes: D = embedding, C = channels, p = side of a patch.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mocov3_ds.config.run_config import Config
from mocov3_ds.data.storage.atomic import digest_file
from mocov3_ds.encoders.choices import EncoderRole
from mocov3_ds.encoders.foreign_names import has_layer_scale, replace_prefix
from mocov3_ds.encoders.load import positions_for, read_weights
from mocov3_ds.encoders.networks import choose_prefix, find_prefixes, is_head, summarise_names
from mocov3_ds.encoders.owner_settings import OwnerSettings
from mocov3_ds.encoders.timm_networks import find_prefix, load_network
from mocov3_ds.encoders.weight_files import find_weights
from mocov3_ds.encoders.weights import Weights
from mocov3_ds.model.backbones import shape_name
from mocov3_ds.model.shapes import VitShape
from mocov3_ds.model.sigma_reparam import with_gains
from mocov3_ds.model.tensor_differences import differing_tensors
from mocov3_ds.settings.wording import count_noun

_SIZES = ("dim", "depth", "heads", "patch_size")
_HEADS = ("projector", "predictor")
_PATCHES = "patch_embed.proj.weight"


@dataclass(frozen=True)
class InitWeights:
    """What a run begins with instead of random weights."""

    tensors: Mapping[str, Tensor]
    """of the base encoder, by its own names"""
    line: str
    """what was taken and what was not"""
    record: Mapping[str, Any]
    """path, digest and counts, as ancestry tells them"""
    ancestry: tuple[Mapping[str, Any], ...]
    """what the run of the weights began with itself"""


def read_init(config: Config, base: nn.Module) -> InitWeights:
    """Read the weights of `--init` and fit them to the base encoder, which stays as it is.

    Args:
        config: settings of the run: `init`, `init_which` and the architecture count.
        base: the base encoder, with random weights.

    Raises:
        ValueError: no such weights, or weights of another architecture.
    """
    path, role, network_state = config.init, config.init_which, base.state_dict()
    try:
        weights = read_weights(path, role, expected=config.backbone, tells=False)
    except ValueError as error:
        raise ValueError(f"--init: {error}".replace("--which", "--init_which")) from None
    is_plain = isinstance(config.backbone, VitShape) and config.backbone.stem == "patch"
    if is_plain != weights.is_plain_vit:
        raise ValueError(
            f"--init {path} holds {shape_name(weights.backbone)}, the run trains "
            f"{shape_name(config.backbone)}; give another --model.backbone."
        )
    expected = replace_prefix(network_state, "backbone.", "")
    if is_plain:
        notes = _check_sizes(weights, config)
        backbone, fitted = _fit_vit(weights, config, expected)
    else:
        notes, (backbone, fitted) = [], _fit_network(weights, config)
    if names := differing_tensors(expected, backbone):
        raise ValueError(
            f"--init {path}: {len(names)} tensors differ from those of the run's backbone, e.g. "
            f"{', '.join(names[:3])}."
        )
    present, prefix = _all_tensors(weights)
    tensors = replace_prefix(backbone, "", "backbone.")
    used = {name for name in present if name.startswith(prefix)} - _names_below(present, prefix)
    for head in _HEADS:
        head_state = replace_prefix(network_state, f"{head}.", "")
        head_tensors, head_name = _find_head(head_state, present, prefix, head)
        tensors |= replace_prefix(head_tensors, "", f"{head}.")
        used |= {head_name + name for name in head_tensors}
        if not head_tensors:
            notes.append(_describe_random_head(head, head_name))
    unused = [name for name in present if name not in used]
    record = _describe_origin(weights, role, tensors)
    frozen = "stays as it is" if config.model.patch_lr == 0 else "is trained"
    patches = (
        f"the patch projection comes from there and {frozen} (--model.patch_lr "
        f"{config.model.patch_lr:g})"
    )
    left_out = summarise_names(unused, prefix)
    parts = [
        f"start: {weights.path} ({weights.kind}, {role} encoder): {record['tensors']} tensors with "
        f"{record['numbers']:,} numbers taken into both encoders",
        *fitted,
        *([patches] if is_plain else []),
        *notes,
        *([f"not taken: {left_out}"] if left_out else []),
    ]
    ancestry = weights.saved.state.get("ancestry", ()) if weights.saved is not None else ()
    return InitWeights(tensors, "; ".join(parts), record, tuple(ancestry))


def _describe_random_head(head: str, head_name: str) -> str:
    """Why a head keeps its random weights."""
    reason = f"{head_name}* of the file is another network" if head_name else "there is none"
    return f"the {head} stays random ({reason})"


def _describe_origin(
    weights: Weights, role: EncoderRole, tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What ancestry tells of the weights: path, digest and counts."""
    record = {
        "kind": "init",
        "path": str(weights.path),
        "which": role,
        "digest": _digest(weights),
        "tensors": len(tensors),
        "numbers": sum(tensor.numel() for tensor in tensors.values()),
    }
    return record if weights.saved is None else record | {"step": weights.saved.step}


def _check_sizes(weights: Weights, config: Config) -> list[str]:
    """What of the weights' settings the run does otherwise; refuses another architecture."""
    wrong = [n for n in _SIZES if getattr(weights.shape, n) != getattr(config.vit, n)]
    if wrong:
        file_sizes = ", ".join(f"{n} {getattr(weights.shape, n)}" for n in wrong)
        run_sizes = ", ".join(f"{n} {getattr(config.vit, n)}" for n in wrong)
        flags = " ".join(f"--model.{n} {getattr(weights.shape, n)}" for n in wrong)
        raise ValueError(
            f"--init {weights.path} has {file_sizes}, the run {run_sizes}; give {flags}."
        )
    if weights.positions != config.model.positions:
        raise ValueError(
            f"--init {weights.path} has positions {weights.positions!r}, the run "
            f"{config.model.positions!r}; give --model.positions {weights.positions}."
        )
    settings, notes = weights.settings, []
    if settings.norm_eps != OwnerSettings.norm_eps:
        notes.append(f"norms have epsilon {OwnerSettings.norm_eps:g}, there {settings.norm_eps:g}")
    if (settings.mean, settings.std) != (config.views.mean, config.views.std):
        notes.append(f"images had mean {settings.mean} and deviation {settings.std} there")
    return notes


def _fit_network(weights: Weights, config: Config) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a network that is no plain ViT, and what was done to them."""
    try:
        network = load_network(config.backbone, weights.tensors)
    except ValueError as error:
        raise ValueError(f"--init {weights.path}: {error}") from None
    tensors = network.state_dict()
    resized = sum(tensors[n].shape != t.shape for n, t in weights.tensors.items() if n in tensors)
    return tensors, [f"{count_noun(resized, 'tensor')} resized for the images"] if resized else []


def _fit_vit(
    weights: Weights, config: Config, expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The backbone's tensors for the run's image size and channels, and what was done to them."""
    tensors, sentences = dict(weights.tensors), []
    if "pos_embed" in tensors:
        old, new = weights.shape.grid, config.vit.grid
        tensors["pos_embed"] = positions_for(tensors["pos_embed"], new, old)
        if old != new:
            sentences.append(
                f"positions resized from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches"
            )
    if _PATCHES in tensors and _PATCHES in expected:
        weight_DCpp, channels = tensors[_PATCHES], expected[_PATCHES].shape[1]
        if weight_DCpp.shape[1] == 3 and channels == 1:  # a grey image has equal colours
            tensors[_PATCHES] = weight_DCpp.sum(1, keepdim=True)
            sentences.append("patch projection summed over the three colours")
        elif weight_DCpp.shape[1] != channels:
            raise ValueError(
                f"--init {weights.path} takes images of {weight_DCpp.shape[1]} channels, the run "
                f"{channels}; weights of three colours can start a run of 1 or 3 channels alone."
            )
    _fit_layer_scale(tensors, weights, config, expected)
    if config.model.sigma_reparam:
        tensors = with_gains(tensors, expected)
        sentences.append("gains of sigma_reparam begin as the weights' largest singular values")
    return tensors, sentences


def _fit_layer_scale(
    tensors: dict[str, Tensor], weights: Weights, config: Config, expected: Mapping[str, Tensor]
) -> None:
    """Give a network without LayerScale factors of 1, with which it computes the same."""
    in_file, in_run = has_layer_scale(tensors), bool(config.model.layer_scale)
    if in_file and not in_run:
        raise ValueError(
            f"--init {weights.path} has LayerScale; give --model.layer_scale 1, whose place the "
            "factors of the file take."
        )
    if in_run and not in_file:
        if config.model.layer_scale != 1:
            raise ValueError(
                f"--init {weights.path} has no LayerScale, which is factors of 1, and "
                f"--model.layer_scale {config.model.layer_scale:g} would make another network of "
                "it; give --model.layer_scale 1, or 0 for none."
            )
        tensors |= {name: t for name, t in expected.items() if name.endswith(".gamma")}


def _all_tensors(weights: Weights) -> tuple[dict[str, Tensor], str]:
    """Every tensor where the weights come from, and the text in front of the backbone's names."""
    if weights.saved is None:
        present = find_weights(weights.path).tensors
        if weights.is_plain_vit:
            return present, choose_prefix(present, weights.role)
        return present, find_prefix(present, weights.backbone, weights.role)
    present = {
        f"{group}.{name}": tensor
        for group in ("base", "momentum")
        for name, tensor in weights.saved.read_group(group).items()
    }
    return present, f"{weights.role}.backbone."


def _names_below(present: Mapping[str, Tensor], prefix: str) -> set[str]:
    """Names below a backbone's prefix that are no part of it."""
    inner = tuple(p for p in find_prefixes(present) if p.startswith(prefix) and p != prefix)
    return {
        name
        for name in present
        if name.startswith(prefix)
        and (is_head(name.removeprefix(prefix)) or bool(inner and name.startswith(inner)))
    }


def _find_head(
    expected: Mapping[str, Tensor], present: Mapping[str, Tensor], prefix: str, head: str
) -> tuple[dict[str, Tensor], str]:
    """A head of the run's sizes, and where its names begin; no tensors where there is none such.

    The published files have the projector as the network's head (`fc` of a ResNet), the predictor
    beside the encoders; runs of this package have both beside the backbone.
    """
    head_prefix = prefix.removesuffix(".").rpartition(".")[0]
    head_prefix = f"{head_prefix}." if head_prefix else ""
    places = {
        "projector": (f"{prefix}head.", f"{prefix}fc.", f"{head_prefix}projector."),
        "predictor": (f"{head_prefix}predictor.", "base.predictor."),
    }
    found_at = ""
    for head_name in places[head]:
        head_tensors = replace_prefix(present, head_name, "")
        if head_tensors and not differing_tensors(expected, head_tensors):
            _check_finite(head_tensors, head_name)
            return {name: t.to(expected[name].dtype) for name, t in head_tensors.items()}, head_name
        found_at = found_at or (head_name if head_tensors else "")
    return {}, found_at


def _check_finite(tensors: Mapping[str, Tensor], place: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"--init: numbers of {place}{name} are not finite.")


def _digest(weights: Weights) -> str:
    """SHA-256 of the checkpoint's state, of the file, or of the tensors of a folder."""
    if weights.saved is not None:
        return str(weights.saved.state.get("digest", ""))
    if weights.path.is_file():
        return digest_file(weights.path)
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.tensors.items()):
        digest.update(f"{name} {[*tensor.shape]}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
