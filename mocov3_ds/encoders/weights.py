"""A backbone's weights and what is known of where they come from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mocov3_ds.checkpoints.checkpoint import Checkpoint
from mocov3_ds.config.run_config import Config
from mocov3_ds.encoders.choices import EncoderRole
from mocov3_ds.encoders.owner_settings import OwnerSettings
from mocov3_ds.model.backbones import shape_name
from mocov3_ds.model.shapes import BackboneShape, EncoderShape, Positions, VitShape, write_size


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
    backbone: BackboneShape
    """what the backbone is built from"""
    width: int
    """numbers of an image's features"""
    positions: Positions = "sincos"
    settings: OwnerSettings = OwnerSettings()  # noqa: RUF009 - frozen
    """what lies beside the weights: epsilon of the norms, mean and deviation of the images"""
    left_out: str = ""
    """tensors of the file that have no part in the features, in groups; empty = none"""
    guess: str = ""
    """a guess that decides the features, in a sentence; empty = none was needed"""
    config: Config | None = None
    """settings of the run; None = the weights are not from a run of this package"""
    saved: Checkpoint | None = None
    """checkpoint that the weights were read from; None = not from a run of this package"""

    @property
    def shape(self) -> VitShape:
        """Sizes of the backbone, where it is a Vision Transformer of this program.

        Raises:
            ValueError: it is another network.
        """
        return EncoderShape(backbone=self.backbone).vit

    @property
    def is_plain_vit(self) -> bool:
        """Whether it is the Vision Transformer of the paper, which many programs can load."""
        return isinstance(self.backbone, VitShape) and self.backbone.stem == "patch"

    @property
    def image_size(self) -> int:
        """Side of an image as trained, pixels; its height, where it is no square."""
        return self.backbone.size[0]

    def size_for(self, image_size: int) -> tuple[int, int]:
        """Height and width of the images, pixels: a square of that side; 0 = as trained."""
        return (image_size, image_size) if image_size else self.backbone.size

    @property
    def title(self) -> str:
        """Name of the encoder in tables and model cards."""
        step = f", step {self.saved.step}" if self.saved is not None else ""
        return f"{self.path.name} ({self.role} encoder{step})"

    def left_out_of(self, layout: str) -> str:
        """What an export in a layout lacks of the run or file, in groups; empty = nothing.

        Args:
            layout: program that is written for; the published layout of MoCo v3 holds a whole run.
        """
        if layout != "moco-v3" or self.saved is None:
            hint = "; --to moco-v3 keeps them" if self.saved is not None else ""
            return f"{self.left_out}{hint}" if self.left_out else ""
        return "the base encoder and its predictor" if self.role == "momentum" else ""

    def describe(self) -> str:
        """What was understood, in one line: sizes, source, what was left out, what was guessed."""
        settings, size = self.settings, write_size(self.backbone.size)
        if isinstance(self.backbone, VitShape):
            shape = self.backbone
            sizes = (
                f"{shape.dim} wide, {shape.depth} blocks, {shape.heads} heads, patch "
                f"{shape.patch_size}{' by convolutions' * (shape.stem == 'conv')}, {size} px"
            )
        else:
            sizes = f"{shape_name(self.backbone)}, {self.width} features, {size} px"
        parts = [f"{self.path}: {self.kind}, {self.role} encoder, {sizes}"]
        parts.append(
            f"settings from {settings.source}"
            if settings.source
            else f"nothing beside the weights tells more: gelu, norms of epsilon "
            f"{settings.norm_eps:g} before attention and MLP assumed"
        )
        if (settings.mean, settings.std) != (OwnerSettings.mean, OwnerSettings.std):
            parts.append(f"images normalised by mean {settings.mean}, std {settings.std}")
        if self.left_out:
            parts.append(f"left out: {self.left_out}")
        return "; ".join([*parts, self.guess] if self.guess else parts) + "."
