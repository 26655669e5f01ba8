"""A part of the patches: which ones are drawn, and that the network computes with those alone."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mocov3_ds.data.splitmix import hash_counters, hash_words
from mocov3_ds.model import token_dropout
from mocov3_ds.model.backbones import build_backbone, describe_backbone
from mocov3_ds.model.base_encoder import BaseEncoder
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.loss import ContrastiveLoss
from mocov3_ds.model.momentum_encoder import MomentumEncoder, ViewKeys
from mocov3_ds.model.sequence_length import shortened
from mocov3_ds.model.shapes import EncoderShape, TimmShape, VitShape
from mocov3_ds.model.stochastic_depth import draw_factors, find_branches
from mocov3_ds.model.token_dropout import draw_patch_order, keep_first, keep_tokens
from mocov3_ds.training.step import Draws, QueriesToLoss, make_both_keys

IDS = np.array([5, 99, 3, 12_345_678, 0, 41, 7])
SHAPE = EncoderShape(
    backbone=VitShape(image_size=16, patch_size=4, dim=16, depth=3, heads=2),
    hidden=24,
    out=8,
    drop_path=0.3,
    train_patch_projection=True,
)


def test_draws_belong_to_seed_step_sample_and_view() -> None:
    order_VBN = draw_patch_order(9, IDS, seed=1, step=4)
    assert torch.equal(order_VBN.sort(2).values, torch.arange(9).expand(2, 7, 9))
    assert torch.equal(draw_patch_order(9, IDS[2:5], seed=1, step=4), order_VBN[:, 2:5])
    for other in (
        draw_patch_order(9, IDS, seed=2, step=4),
        draw_patch_order(9, IDS, seed=1, step=5),
        order_VBN.flip(0),
        order_VBN.flip(1),
    ):
        assert not torch.equal(other, order_VBN)


def test_a_fast_sort_draws_what_a_stable_one_does() -> None:
    ids = np.arange(300)
    images_B = hash_words(hash_counters(3, token_dropout._STREAM, 8), ids)
    places_VN = np.arange(2 * 196, dtype=np.uint64).reshape(2, 1, 196)
    words_VBN = hash_words(0, images_B[None, :, None] + places_VN)
    order_VBN = draw_patch_order(196, ids, seed=3, step=8)
    assert np.array_equal(order_VBN, np.argsort(words_VBN, axis=2, kind="stable"))
    kept_VBK = keep_first(order_VBN, 24)
    assert kept_VBK is not None and torch.equal(kept_VBK, order_VBN[:, :, :24].sort(dim=2).values)


def test_all_patches_are_kept_equally_often_and_independently() -> None:
    kept_VBK = keep_first(draw_patch_order(8, np.arange(20_000), seed=-1, step=0), 2)
    assert kept_VBK is not None and kept_VBK.shape == (2, 20_000, 2)
    assert bool((kept_VBK[:, :, 0] < kept_VBK[:, :, 1]).all())
    pairs = torch.bincount((8 * kept_VBK[:, :, 0] + kept_VBK[:, :, 1]).flatten(), minlength=64)
    share = pairs[pairs > 0] / pairs.sum()  # of the 28 pairs, standard error 0.0009
    assert len(share) == 28
    assert float((share - 1 / 28).abs().max()) < 0.005
    views = (kept_VBK[0] == kept_VBK[1]).all(1).double().mean()  # the same pair in both views
    assert float(views) == pytest.approx(1 / 28, abs=0.006)
    assert keep_first(draw_patch_order(8, IDS, seed=0, step=0), 8) is None


def test_the_first_tokens_and_the_named_patches_stay() -> None:
    x_bTD = torch.randn(2, 7, 3, requires_grad=True)
    kept = keep_tokens(x_bTD, torch.tensor([[0, 3], [2, 4]]), before=2)
    expected = torch.stack([x_bTD[0, [0, 1, 2, 5]], x_bTD[1, [0, 1, 4, 6]]])
    assert torch.equal(kept, expected)


def plain_features(vit: VisionTransformer, x: Tensor, kept: list[list[int]]) -> Tensor:
    """Features of one image after another, through a plain writing of the first layers."""
    rows = []
    for image, places in zip(x, kept, strict=True):
        tokens = vit.patch_embed(image[None])[0] + vit.pos_embed[0, vit.num_prefix_tokens :]
        first = torch.cat([t[0] for t in (vit.cls_token, vit.reg_token) if t is not None])
        first = first + vit.pos_embed[0, : vit.num_prefix_tokens]
        sequence = torch.cat([first, torch.stack([tokens[place] for place in places])])
        rows.append(vit.forward_head(vit.norm(vit.blocks(sequence[None]))))
    return torch.cat(rows)


@pytest.mark.parametrize(
    "backbone",
    [
        SHAPE.backbone,
        VitShape(image_size=16, patch_size=4, dim=16, depth=2, heads=2, stem="conv"),
        TimmShape(
            name="vit_tiny_patch16_224",
            size=(16, 16),
            arguments=("patch_size=4", "embed_dim=16", "depth=2", "num_heads=2", "reg_tokens=2"),
        ),
    ],
)
def test_features_are_those_of_the_kept_patches(backbone: VitShape | TimmShape) -> None:
    torch.manual_seed(0)
    network = build_backbone(EncoderShape(backbone=backbone)).eval()
    assert describe_backbone(network, backbone).patches == 16
    assert isinstance(network.double(), VisionTransformer)
    torch.nn.init.normal_(network.pos_embed)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    kept = [[1, 4, 15], [0, 2, 9]]
    with shortened(network, torch.tensor(kept)):
        features = network(x)
    torch.testing.assert_close(features, plain_features(network, x, kept))
    whole = [[*range(16)]] * 2
    torch.testing.assert_close(network(x), plain_features(network, x, whole))


def test_other_networks_have_no_patches_to_leave_out() -> None:
    swin = TimmShape(
        name="swin_tiny_patch4_window7_224", size=(56, 56), arguments=("embed_dim=12",)
    )
    network = build_backbone(EncoderShape(backbone=swin))
    facts = describe_backbone(network, swin)
    assert (facts.patches, facts.patch_size) == (0, 0)


@pytest.mark.parametrize("recompute_blocks", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("chunks", [Chunks(size=2), Chunks(size=3, keep=2)])
def test_loss_and_gradients_equal_one_plain_pass_whatever_the_chunks(
    chunks: Chunks, scale: float, recompute_blocks: bool
) -> None:
    torch.manual_seed(0)
    base = BaseEncoder(SHAPE).double().train()
    momentum = MomentumEncoder(SHAPE, dtype=torch.float64)
    momentum.start_from(dict(base.named_parameters()) | dict(base.named_buffers()))
    momentum.double()
    x1, x2 = torch.randn(2, 7, 3, 16, 16, dtype=torch.float64)
    order_VBN = draw_patch_order(16 if scale == 1 else 4, IDS, seed=0, step=4)
    rates = [branch.rate for branch in find_branches(base.backbone)]
    draws = Draws(
        factors_VBM=draw_factors(rates, IDS, seed=0, step=4),
        query_patches_VBK=keep_first(order_VBN, 3),
        key_patches_VBK=keep_first(order_VBN, 2),
        patch_scale=scale,
    )

    def loss_and_gradients(chunks: Chunks, recompute_blocks: bool) -> list[Tensor]:
        base.backbone.set_grad_checkpointing(recompute_blocks)
        model = QueriesToLoss(base, ContrastiveLoss(0.2), chunks=chunks)

        def make_keys() -> tuple[ViewKeys, ViewKeys]:
            return make_both_keys(momentum, x1, x2, chunks.size, draws)

        loss = model(x1, x2, make_keys, draws).loss
        return [loss, *torch.autograd.grad(loss, [p for p in base.parameters() if p.requires_grad])]

    plain = loss_and_gradients(Chunks(), False)
    for given, expected in zip(loss_and_gradients(chunks, recompute_blocks), plain, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-10)
