"""Counts of other backbones against their libraries' figures and against real passes."""

import pytest
import torch

from mocov3_ds.model.base_encoder import BaseEncoder
from mocov3_ds.model.shapes import CONV_STEM_SHAPES, EncoderShape, OwnShape, TimmShape, VitShape
from mocov3_ds.model.timm_backbone import build_timm
from mocov3_ds.planning import architecture
from mocov3_ds.planning.measured_backbone import measure_backbone
from mocov3_ds.training.chunk_size import activation_bytes

_ATTO = TimmShape(
    name="convnext_atto", size=(32, 32), arguments=("depths=[1,1,1,1]", "dims=[8,16,24,32]")
)


def test_a_resnet50_has_the_published_counts() -> None:
    counts = measure_backbone(EncoderShape(backbone=TimmShape(name="resnet50")))
    numbers = sum(tensor.numbers for tensor in counts.tensors)
    assert numbers == 23_508_032  # torchvision's 25,557,032 without the classifier's 2,049,000
    assert counts.forward_operations / 2 == pytest.approx(4.09e9, rel=0.01)  # torchvision: 4.09 G
    assert (counts.width, len(counts.norm_channels)) == (2048, 53)


@pytest.mark.parametrize(
    "shape",
    [_ATTO, VitShape(image_size=32, patch_size=8, dim=32, depth=2, heads=2, stem="conv")],
    ids=["timm", "conv stem"],
)
def test_tensors_are_those_of_the_module(shape: TimmShape | VitShape) -> None:
    encoder = EncoderShape(backbone=shape, hidden=12, out=8, projector_layers=2,
                           train_patch_projection=True)  # fmt: skip
    ours = [(t.name, t.numbers, t.trained) for t in architecture.list_tensors(encoder)]
    real = BaseEncoder(encoder).named_parameters()
    assert ours == [(name, p.numel(), p.requires_grad) for name, p in real]
    assert architecture.rows_know_each_other(encoder) == isinstance(shape, VitShape)


def test_kept_bytes_are_those_of_a_real_pass() -> None:
    network = build_timm(_ATTO)
    measured = activation_bytes(network, torch.zeros(1, 3, 32, 32))
    encoder = EncoderShape(backbone=_ATTO)
    assert architecture.backbone_bytes(encoder, 4) == pytest.approx(measured, rel=0.02)
    work = architecture.backward_work(encoder)
    assert work.operations <= 2 * architecture.forward_work(encoder).operations


def test_the_papers_vit_keeps_its_formulas() -> None:
    assert architecture.measure_other(EncoderShape(backbone=VitShape())) is None
    conv = EncoderShape(backbone=CONV_STEM_SHAPES["vit_conv_s16"])
    assert architecture.batch_norm_features(conv) == [48, 96, 192, 384, 4096, 4096, 256, 4096, 256]
    assert len(architecture.batch_norm_features(conv, keys=True)) == 7


def test_larger_patches_are_counted_without_numbers() -> None:
    vit = TimmShape(
        name="vit_tiny_patch16_224",
        size=(16, 16),
        arguments=("patch_size=4", "embed_dim=16", "depth=2", "num_heads=2"),
    )
    shape = EncoderShape(backbone=vit)
    whole, larger = measure_backbone(shape), measure_backbone(shape, 0, 2.0)
    assert 0.2 < larger.forward_operations / whole.forward_operations < 0.5


class Reading(torch.nn.Module):
    """Needs a number, which a tensor on the meta device does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean((2, 3))
        scaled: torch.Tensor = self.linear(mean * float(mean.sum()))
        return scaled


class Choosing(Reading):
    """Knows what to do on real devices alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return {"cpu": super().forward}[x.device.type](x)


class Pairing(Reading):
    """Gives more than features."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return x.mean((2, 3)), x


@pytest.mark.parametrize("make", [Reading, Choosing, Pairing])
def test_what_does_not_run_without_numbers_is_not_planned(make: type[torch.nn.Module]) -> None:
    own = OwnShape(name="reading", make=make)
    with pytest.raises(ValueError, match="backbone reading cannot be planned"):
        measure_backbone(EncoderShape(backbone=own))
