"""A step on a ResNet or a ViT with a stem of convolutions, beside a plain writing of the published
builder (facebookresearch/moco-v3, `moco/builder.py` and `vits.py`): weights change hands through
its layout, loss and gradients are equal in fp64 on one rank and on two.
"""

import functools
import itertools
import pickle
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from mocov3_ds.distributed import ranks
from mocov3_ds.model.base_encoder import BaseEncoder
from mocov3_ds.model.loss import ContrastiveLoss
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.model.shapes import EncoderShape, TimmShape, VitShape
from mocov3_ds.training.step import QueriesToLoss
from tests import reference
from tests.ranks_pool import run_ranks

BATCH, SIDE, HIDDEN, OUT, TEMPERATURE = 6, 32, 20, 12, 1.0
RESNET = EncoderShape(
    backbone=TimmShape(name="resnet18", size=(SIDE, SIDE), arguments=("layers=[1,1,1,1]",)),
    hidden=HIDDEN,
    out=OUT,
    projector_layers=2,
    predictor_norm=False,
)
CONV_STEM = EncoderShape(
    backbone=VitShape(image_size=SIDE, patch_size=16, dim=48, depth=2, heads=3, stem="conv"),
    hidden=HIDDEN,
    out=OUT,
)
SHAPES = {"fc": RESNET, "head": CONV_STEM}
"""name of the projector in the published layout -> what is trained"""


def plain_mlp(sizes: list[int], last_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(len(sizes) - 1):
        last = index == len(sizes) - 2
        layers.append(nn.Linear(sizes[index], sizes[index + 1], bias=False))
        if not last:
            layers += [nn.BatchNorm1d(sizes[index + 1]), nn.ReLU()]
        elif last_norm:
            layers.append(nn.BatchNorm1d(sizes[index + 1], affine=False))
    return nn.Sequential(*layers)


class PlainConvStem(nn.Module):
    """Four convolutions of 3 x 3 with stride 2, then one of 1 x 1; 16 pixels become a token."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        dim, self.num_patches = given["embed_dim"], (SIDE // 16) ** 2
        widths = [3, dim // 8, dim // 4, dim // 2, dim]
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Conv2d(fan_in, fan_out, 3, 2, 1, bias=False), nn.BatchNorm2d(fan_out)]
            layers.append(nn.ReLU())
        self.proj = nn.Sequential(*layers, nn.Conv2d(dim, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def plain_encoder(head: str) -> nn.Module:
    """An encoder as the builder has it: the projector in the classifier's place."""
    if head == "fc":
        block = torchvision.models.resnet.BasicBlock
        network: nn.Module = torchvision.models.ResNet(block, [1, 1, 1, 1])
        network.fc = plain_mlp([512, HIDDEN, OUT], True)
        return network
    network = timm.models.VisionTransformer(
        img_size=SIDE, patch_size=16, embed_dim=48, depth=2, num_heads=3, num_classes=1,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6), embed_layer=PlainConvStem,
    )  # fmt: skip
    network.head = plain_mlp([48, HIDDEN, HIDDEN, OUT], True)
    return network


class PlainBuilder(nn.Module):
    """Names as in the published files: base_encoder, momentum_encoder, predictor."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.base_encoder, self.momentum_encoder = plain_encoder(head), plain_encoder(head)
        self.predictor = plain_mlp([OUT, HIDDEN, OUT], head == "head")

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        q1, q2 = (self.predictor(self.base_encoder(x)) for x in (x1, x2))
        with torch.no_grad():
            k1, k2 = (self.momentum_encoder(x) for x in (x1, x2))
        first = reference.contrastive_loss(q1, k2, TEMPERATURE)
        return first + reference.contrastive_loss(q2, k1, TEMPERATURE)


def to_published(name: str, head: str) -> str:
    """Published name of one of our tensors of an encoder."""
    part, _, rest = name.partition(".")
    return {"backbone": rest, "projector": f"{head}.{rest}"}[part]


@functools.cache
def published(head: str) -> PlainBuilder:
    """The plain builder with weights that nobody drew for a purpose, in fp64, train mode."""
    torch.manual_seed(1)
    builder = PlainBuilder(head).double()
    with torch.no_grad():
        for parameter in builder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return builder


def views() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x1, x2 = torch.randn(2, BATCH, 3, SIDE, SIDE, generator=g, dtype=torch.float64)
    return x1, x2


def our_step(head: str, weights: bytes, recompute: bool = False) -> dict[str, Any]:
    """Loss and gradient of our step on this rank's rows, with the published weights."""
    state = pickle.loads(weights)
    base, momentum = BaseEncoder(SHAPES[head]).double(), MomentumEncoder(SHAPES[head]).double()
    base.backbone.set_grad_checkpointing(recompute)
    for encoder, prefix in ((base, "base_encoder."), (momentum, "momentum_encoder.")):
        encoder.load_state_dict(
            {
                name: state[
                    name if name.startswith("predictor") else prefix + to_published(name, head)
                ]
                for name in encoder.state_dict()
            }
        )
    rows = BATCH // ranks.world_size()
    x1, x2 = (x[ranks.rank() * rows :][:rows] for x in views())
    model = QueriesToLoss(base, ContrastiveLoss(TEMPERATURE))
    result = model(x1, x2, lambda: (momentum.make_keys(x1), momentum.make_keys(x2)))
    result.loss.backward()
    size = ranks.world_size()
    return {
        "loss": float(ranks.all_reduce_sum(result.loss.detach())) / size,
        "gradients": {
            n: ranks.all_reduce_sum(p.grad) / size
            for n, p in base.named_parameters()
            if p.requires_grad
        },
        "buffers": dict(base.named_buffers()),
        "key_buffers": dict(momentum.named_buffers()),
    }


@pytest.mark.parametrize("head", ["fc", "head"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_equals_the_published_builder(head: str, world_size: int) -> None:
    builder = published(head)
    state = pickle.dumps(builder.state_dict())
    builder.zero_grad()
    loss = builder(*views())
    loss.backward()
    expected = float(loss.detach())
    after = dict(builder.named_buffers())
    if world_size == 1:
        ours = our_step(head, state)
    else:
        ours = run_ranks(world_size, our_step, head, state)[0]
    assert ours["loss"] == pytest.approx(expected, rel=1e-10)
    wanted = {name: p.grad for name, p in builder.named_parameters()}
    for name, gradient in ours["gradients"].items():
        published_name = (
            name if name.startswith("predictor") else f"base_encoder.{to_published(name, head)}"
        )
        torch.testing.assert_close(
            gradient, wanted[published_name], rtol=1e-7, atol=1e-12, msg=name
        )
    for ours_of, prefix in (("buffers", "base_encoder."), ("key_buffers", "momentum_encoder.")):
        for name, buffer in ours[ours_of].items():
            if not name.startswith("predictor"):
                other = after[prefix + to_published(name, head)]
                torch.testing.assert_close(buffer, other, rtol=1e-9, atol=1e-12, msg=name)
    builder.load_state_dict(pickle.loads(state))


@pytest.mark.parametrize("head", ["fc", "head"])
def test_recomputed_blocks_give_the_same_gradient_and_statistics(head: str) -> None:
    state = pickle.dumps(published(head).state_dict())
    plain, recomputed = our_step(head, state), our_step(head, state, recompute=True)
    assert plain["loss"] == recomputed["loss"]
    for kind in ("gradients", "buffers"):
        for name, tensor in plain[kind].items():
            assert torch.equal(tensor, recomputed[kind][name]), name


@pytest.mark.parametrize("head", ["fc", "head"])
def test_our_weights_load_there_strictly(head: str) -> None:
    base, momentum = BaseEncoder(SHAPES[head]), MomentumEncoder(SHAPES[head])
    tensors = {}
    for encoder, prefix in ((base, "base_encoder."), (momentum, "momentum_encoder.")):
        for name, tensor in encoder.state_dict().items():
            kept = name.startswith("predictor")
            tensors[name if kept else prefix + to_published(name, head)] = tensor
    PlainBuilder(head).load_state_dict(tensors, strict=True)
