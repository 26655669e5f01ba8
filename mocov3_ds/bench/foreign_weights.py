"""What do the checkpoints of timm and transformers do here: the owner's features, or a refusal?

    python -m mocov3_ds.bench foreign_weights

Each model is made with random weights, away from their starting values, two blocks deep, and saved
as its own program saves it. The folder is loaded here; so is a bare file of its weights, with
`--heads` given. The cosine is that between the features of both programs, the smallest over some
random images. A model whose parts the plain Vision Transformer lacks must be refused by name.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mocov3_ds.encoders.load import load_encoder

SIZE = 32
_PATCH = 8
_DEPTH = 2

_TIMM: tuple[tuple[str, dict[str, Any]], ...] = (
    ("vit_tiny_patch16_224", {}),
    ("vit_small_patch16_224", {}),
    ("vit_base_patch16_224", {}),
    ("deit_small_patch16_224", {}),
    ("vit_base_patch16_224_miil", {}),
    ("vit_small_patch16_224", {"qk_norm": True}),
    ("vit_small_patch16_224", {"act_layer": "relu"}),
    ("vit_small_patch16_224", {"global_pool": "avg"}),
    ("vit_small_patch16_224", {"scale_attn_norm": True}),
    ("vit_small_patch16_224", {"scale_mlp_norm": True}),
    ("deit_small_distilled_patch16_224", {}),
    ("deit3_small_patch16_224", {}),
    ("vit_small_patch14_dinov2", {}),
    ("vit_small_patch14_reg4_dinov2", {}),
    ("vit_base_patch16_clip_224", {}),
    ("vit_base_patch16_rpn_224", {}),
    ("vit_base_patch16_siglip_224", {}),
    ("eva02_tiny_patch14_224", {}),
    ("beit_base_patch16_224", {}),
)
"""architectures of timm, with what they are made with besides their sizes"""
_TRANSFORMERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ViT", {}),
    ("ViT", {"qkv_bias": False}),
    ("ViT", {"hidden_act": "relu"}),
    ("ViT", {"layer_norm_eps": 1e-2}),
    ("ViTMAE", {"mask_ratio": 0.0}),
    ("ViTMSN", {}),
    ("DeiT", {}),
    ("Dinov2", {}),
    ("Dinov2WithRegisters", {}),
    ("Beit", {}),
    ("Data2VecVision", {}),
)
"""names of transformers' models, with settings that are not their defaults"""


@dataclass(frozen=True, kw_only=True)
class ForeignOptions:
    """Other programs' models, loaded here."""

    only: str = ""
    """rows whose name holds this text; empty = all"""
    images: int = 8
    """random images that are compared"""


class Owner(NamedTuple):
    """A model of another program."""

    name: str
    model: nn.Module
    heads: int
    features: Callable[[Tensor], Tensor]
    """images (B, 3, H, W) -> class-token features (B, D)"""
    save: Callable[[Path], None]
    """writes the folder of it"""


class Outcome(NamedTuple):
    """What became of a model here."""

    name: str
    folder: str
    """cosine of the features, or why the folder was refused"""
    file: str
    """the same for a bare file of its weights"""


def compare_models(options: ForeignOptions) -> Iterator[Outcome]:
    """Load each model here, and compare its features with its owner's."""
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(options.images, 3, SIZE, SIZE, generator=generator)
    for owner in _make_owners(options.only):
        with tempfile.TemporaryDirectory() as temporary:
            folder, file = Path(temporary) / "folder", Path(temporary) / "weights.pth"
            folder.mkdir()
            owner.save(folder)
            torch.save(owner.model.state_dict(), file)
            yield Outcome(
                owner.name,
                _try_loading(folder, owner, images_BCHW),
                _try_loading(file, owner, images_BCHW, owner.heads),
            )


@torch.no_grad()
def _try_loading(path: Path, owner: Owner, images_BCHW: Tensor, heads: int = 0) -> str:
    """The smallest cosine over the images, or the sentence of the refusal without the path."""
    try:
        encoder = load_encoder(path, heads=heads)
    except ValueError as error:
        return str(error).removeprefix(f"{path} gives no encoder: ")
    features_BD, expected_BD = encoder(images_BCHW), owner.features(images_BCHW)
    return f"{float(torch.cosine_similarity(features_BD, expected_BD).min()):.6f}"


def _make_owners(only: str) -> Iterator[Owner]:
    for name, arguments in _TIMM:
        if only in (title := _describe_model("timm", name, arguments)):
            yield _make_timm(title, name, arguments)
    for name, arguments in _TRANSFORMERS:
        if only in (title := _describe_model("transformers", name, arguments)):
            yield _make_transformers(title, name, arguments)


def _describe_model(program: str, name: str, arguments: dict[str, Any]) -> str:
    argument_text = "".join(f", {key}={value}" for key, value in arguments.items())
    return f"{program} {name}{argument_text}"


def _make_timm(title: str, name: str, arguments: dict[str, Any]) -> Owner:
    sizes = {"img_size": SIZE, "patch_size": _PATCH, "depth": _DEPTH, **arguments}
    model: Any = _shake(timm.create_model(name, num_classes=0, **sizes))

    def save(folder: Path) -> None:
        tree = {"architecture": name, "num_classes": 0, "model_args": sizes}
        tree["pretrained_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3}
        (folder / "config.json").write_text(json.dumps(tree))
        save_file(model.state_dict(), str(folder / "model.safetensors"))

    heads = int(model.blocks[0].attn.num_heads)
    return Owner(title, model, heads, model, save)


def _make_transformers(title: str, name: str, settings: dict[str, Any]) -> Owner:
    import transformers

    sizes = {
        "hidden_size": 192,
        "num_hidden_layers": _DEPTH,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "image_size": SIZE,
        "patch_size": _PATCH,
    }
    config = getattr(transformers, f"{name}Config")(**sizes, **settings)
    model: Any = _shake(getattr(transformers, f"{name}Model")(config))

    def features(images_BCHW: Tensor) -> Tensor:
        result: Tensor = model(pixel_values=images_BCHW).last_hidden_state[:, 0]
        return result

    return Owner(title, model, 3, features, model.save_pretrained)


def _shake(model: nn.Module) -> nn.Module:
    """Weights as far from their starting values as training brings them, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.5 if parameter.dim() == 1 else 0.1)
    return model.eval()


def run_bench(options: ForeignOptions) -> None:
    """Print a table of all models."""
    print("| model | its folder here | its weights alone, `--heads` given |")
    print("|---|---|---|")
    for outcome in compare_models(options):
        print(f"| {outcome.name} | {outcome.folder} | {outcome.file} |", flush=True)
