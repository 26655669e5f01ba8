"""Base encoder of MoCo v3 (arXiv 2104.02057, Alg. 1): backbone, projector, predictor.

A query is `predictor(projector(backbone(view)))`; a key is made by the momentum encoder, which has
no predictor (`momentum_encoder`).

Shape suffixes: B = images, C H W = image, D = backbone features, P = projector and predictor
output.
"""

from torch import Tensor, nn

from mocov3_ds.model.backbones import build_backbone, describe_backbone
from mocov3_ds.model.cpu_ops import suit_cpu
from mocov3_ds.model.heads import build_predictor, build_projector
from mocov3_ds.model.layer_groups import HEAD_GROUPS
from mocov3_ds.model.shapes import EncoderShape as EncoderShape


class BaseEncoder(nn.Module):
    """The trained network; its three parts keep their own state-dict prefixes.

    Args:
        shape: architecture of backbone, projector and predictor.
    """

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.backbone = build_backbone(shape, shape.drop_path)
        self.facts = describe_backbone(self.backbone, shape.backbone)
        for name in self.facts.unused:
            self.backbone.get_parameter(name).requires_grad_(False)
        self.projector = build_projector(
            self.facts.width, shape.hidden, shape.out, shape.projector_layers
        )
        self.predictor = build_predictor(shape.out, shape.hidden, last_norm=shape.predictor_norm)
        suit_cpu(self)

    @property
    def groups(self) -> tuple[str, ...]:
        """Layer groups from input to output, heads last."""
        return (*self.facts.groups, *HEAD_GROUPS)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Queries (B, P) of one view, in a single pass."""
        queries_BP: Tensor = self.predictor(self.projector(self.backbone(x_BCHW)))
        return queries_BP
