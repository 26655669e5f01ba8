"""Base encoder of MoCo v3 (arXiv 2104.02057, Alg. 1): backbone, projector, predictor.

A query is `predictor(projector(backbone(view)))`; a key is made by the momentum encoder, which has
no predictor (`momentum_encoder`).

Shape suffixes: B = images, C H W = image, D = backbone features, P = projector and predictor
output.
"""

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mocov3_ds.model.cpu_ops import suit_cpu
from mocov3_ds.model.heads import build_predictor, build_projector
from mocov3_ds.model.shapes import EncoderShape as EncoderShape
from mocov3_ds.model.stochastic_depth import replace_drop_paths
from mocov3_ds.model.vit import build_vit


def build_backbone(shape: EncoderShape, drop_path: float = 0.0) -> VisionTransformer:
    """Backbone of the base or the momentum encoder, whose last block gives the class token alone.

    Args:
        shape: architecture of the encoder.
        drop_path: stochastic depth rate of the last block.
    """
    return build_vit(
        shape.vit,
        positions=shape.positions,
        train_patch_projection=shape.train_patch_projection,
        drop_path=drop_path,
        qk_norm=shape.qk_norm,
        class_token_only=True,
    )


class BaseEncoder(nn.Module):
    """The trained network; its three parts keep their own state-dict prefixes.

    Args:
        shape: architecture of backbone, projector and predictor.
    """

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.backbone = build_backbone(shape, shape.drop_path)
        replace_drop_paths(self.backbone)
        self.projector = build_projector(shape.vit.dim, shape.hidden, shape.out)
        self.predictor = build_predictor(shape.out, shape.hidden)
        suit_cpu(self)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Queries (B, P) of one view, in a single pass."""
        return self.predictor(self.projector(self.backbone(x_BCHW)))
