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
from mocov3_ds.encoders.foreign_names import replace_prefix
from mocov3_ds.encoders.load import Weights, positions_for, read_weights
from mocov3_ds.encoders.networks import choose_prefix, find_prefixes, is_head, summarise_names
from mocov3_ds.encoders.owner_settings import OwnerSettings
from mocov3_ds.encoders.timm_networks import find_prefix, load_network
from mocov3_ds.encoders.weight_files import find_weights
from mocov3_ds.model.backbones import shape_name
from mocov3_ds.model.shapes import VitShape
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
    path, role, own = config.init, config.init_which, base.state_dict()
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
    expected = replace_prefix(own, "backbone.", "")
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
        taken, place = _find_head(replace_prefix(own, f"{head}.", ""), present, prefix, head)
        tensors |= replace_prefix(taken, "", f"{head}.")
        used |= {place + name for name in taken}
        if not taken:
            other_sizes = f"{place}* of the file is another network" if place else "there is none"
            notes.append(f"the {head} stays random ({other_sizes})")
    unused = [name for name in present if name not in used]
    record = {
        "kind": "init",
        "path": str(weights.path),
        "which": role,
        "digest": _digest(weights),
        "tensors": len(tensors),
        "numbers": sum(tensor.numel() for tensor in tensors.values()),
    }
    if weights.saved is not None:
        record |= {"step": weights.saved.step}
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


def _check_sizes(weights: Weights, config: Config) -> list[str]:
    """What of the weights' settings the run does otherwise; refuses another architecture."""
    wrong = [n for n in _SIZES if getattr(weights.shape, n) != getattr(config.vit, n)]
    if wrong:
        theirs = ", ".join(f"{n} {getattr(weights.shape, n)}" for n in wrong)
        ours = ", ".join(f"{n} {getattr(config.vit, n)}" for n in wrong)
        flags = " ".join(f"--model.{n} {getattr(weights.shape, n)}" for n in wrong)
        raise ValueError(f"--init {weights.path} has {theirs}, the run {ours}; give {flags}.")
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
    tensors, said = dict(weights.tensors), []
    if "pos_embed" in tensors:
        old, new = weights.shape.grid, config.vit.grid
        tensors["pos_embed"] = positions_for(tensors["pos_embed"], new, old)
        if old != new:
            said.append(
                f"positions resized from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches"
            )
    if _PATCHES in tensors and _PATCHES in expected:
        weight_DCpp, channels = tensors[_PATCHES], expected[_PATCHES].shape[1]
        if weight_DCpp.shape[1] == 3 and channels == 1:  # a grey image has equal colours
            tensors[_PATCHES] = weight_DCpp.sum(1, keepdim=True)
            said.append("patch projection summed over the three colours")
        elif weight_DCpp.shape[1] != channels:
            raise ValueError(
                f"--init {weights.path} takes images of {weight_DCpp.shape[1]} channels, the run "
                f"{channels}; weights of three colours can start a run of 1 or 3 channels alone."
            )
    return tensors, said


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
    beside = prefix.removesuffix(".").rpartition(".")[0]
    beside = f"{beside}." if beside else ""
    places = {
        "projector": (f"{prefix}head.", f"{prefix}fc.", f"{beside}projector."),
        "predictor": (f"{beside}predictor.", "base.predictor."),
    }
    found_at = ""
    for place in places[head]:
        found = replace_prefix(present, place, "")
        if found and not differing_tensors(expected, found):
            _check_finite(found, place)
            return {name: t.to(expected[name].dtype) for name, t in found.items()}, place
        found_at = found_at or (place if found else "")
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
