"""Chunks: the same gradients as in one pass, the choice of their size, what the loss holds."""

import pytest
import torch

from mocov3_ds.model import chunking
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.chunking import Chunks, chunked_features, count_kept_chunks
from mocov3_ds.model.loss import ContrastiveLoss
from mocov3_ds.model.vit import VitShape
from tests.allocator import Allocator

SHAPE = EncoderShape(
    backbone=VitShape(image_size=16, patch_size=8, dim=16, depth=2, heads=2), hidden=24, out=8
)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("keep", [0, 1, 2])
@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_chunked_gradients_equal_the_plain_pass(chunk: int, drop_path: float, keep: int) -> None:
    torch.manual_seed(0)
    shape = EncoderShape(backbone=SHAPE.vit, hidden=24, out=8, drop_path=drop_path)
    base = BaseEncoder(shape).double().train()
    images = torch.randn(7, 3, 16, 16, dtype=torch.float64)

    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        if checkpointed:
            features = chunked_features(base.backbone, images, chunk, keep=keep)
        else:  # the same pieces, so the same draws, with all activations kept
            pieces = torch.split(images, chunk)
            features = torch.cat([base.backbone(piece) for piece in pieces])
        loss = base.predictor(base.projector(features)).square().mul(torch.arange(8)).sum()
        trained = [p for p in base.parameters() if p.requires_grad]
        return list(torch.autograd.grad(loss, trained))

    for ours, plain in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)  # fp64


def test_a_filled_last_chunk_changes_nothing() -> None:
    """11 images in chunks of at most 5 are three of 4; the draws beside them are filled as well."""
    torch.manual_seed(0)
    backbone = BaseEncoder(SHAPE).backbone.double()
    images, weights = torch.randn(2, 11, 3, 16, 16, dtype=torch.float64)
    beside = torch.rand(11, dtype=torch.float64)
    sizes: list[int] = []

    def features(x_bCHW: torch.Tensor, beside_b: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x_bCHW))
        assert len(beside_b) == len(x_bCHW)
        result: torch.Tensor = backbone(x_bCHW) * beside_b[:, None]
        return result

    def gradients(fill: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        found = chunked_features(features, images, 5, 1, beside, fill=fill)
        loss = (found * weights.flatten(1)[:, : SHAPE.vit.dim]).square().sum()
        trained = [p for p in backbone.parameters() if p.requires_grad]
        return found, list(torch.autograd.grad(loss, trained))

    plain, plain_gradients = gradients(False)
    assert sizes[:3] == [5, 5, 1]
    sizes.clear()
    filled, filled_gradients = gradients(True)
    assert set(sizes) == {4} and len(filled) == 11
    torch.testing.assert_close(filled, plain, rtol=1e-12, atol=1e-12)  # fp64
    for ours, others in zip(filled_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(ours, others, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_chunk_leaves_class_tokens_behind_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, gradients: bool
) -> None:
    backbone = BaseEncoder(SHAPE).backbone
    joined: list[torch.Tensor] = []
    join = torch.cat

    def spy(tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
        joined.extend(tensors)
        return join(tensors, dim)

    monkeypatch.setattr("mocov3_ds.model.chunking.torch.cat", spy)
    with torch.set_grad_enabled(gradients):
        chunked_features(backbone, torch.randn(6, 3, 16, 16), chunk=2)
    features = [tensor for tensor in joined if tensor.shape == (2, SHAPE.vit.dim)]
    assert len(features) == 3
    for tensor in features:  # a view would hold the tokens of all patches as well
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize(
    ("images", "batch", "chunks"),
    [
        (16, 8, Chunks()),
        (15, 8, Chunks(size=4, keep=2)),  # 7 and 1 would be 8 as well
        (2, 8, Chunks(size=1, keep=1)),
        (1, 8, Chunks(size=1, keep=0)),
        (200, 512, Chunks(size=64, keep=2)),
        (1000, 512, Chunks(size=64, keep=14)),
        (84, 512, Chunks(size=40, keep=1)),  # 42 would leave a last chunk of 8
    ],
)
def test_the_choice(images: int, batch: int, chunks: Chunks) -> None:
    assert chunking.choose_chunks(images, batch) == chunks
    if chunks.size:  # never more at once than fits: the chunk at work and the kept ones
        assert chunks.size * (chunks.keep + 1) <= images


def test_key_blocks_bound_the_logits() -> None:
    assert chunking.choose_key_block(512, 4096) == 0
    block = chunking.choose_key_block(4096, 32768)
    assert 0 < 24 * 4096 * block <= 512 * 2**20
    assert chunking.choose_key_block(10**9, 10**9) == 1


@pytest.mark.parametrize(
    ("chunks", "batch", "kept"),
    [
        (Chunks(), 8, (0, 1)),
        (Chunks(size=3), 8, (0, 1)),
        (Chunks(size=3, keep=1), 8, (0, 2)),
        (Chunks(size=3, keep=3), 8, (1, 3)),
        (Chunks(size=3, keep=99), 8, (3, 3)),
    ],
)
def test_kept_chunks_are_counted_from_the_end(
    chunks: Chunks, batch: int, kept: tuple[int, int]
) -> None:
    assert count_kept_chunks(chunks, batch) == kept


@pytest.mark.parametrize(("key_block", "alive"), [(0, chunking.LOGITS_ALIVE), (128, 3)])
def test_logits_that_are_alive_at_once(key_block: int, alive: int) -> None:
    """Of both views, from the first product to the last gradient."""
    loss = ContrastiveLoss(0.2, key_block)
    keys, allocator = torch.randn(1024, 2), Allocator()
    queries = [torch.randn(512, 2, requires_grad=True) for _ in range(2)]
    with allocator:
        total = loss(queries[0], keys, 0) + loss(queries[1], keys, 0)
        total.backward()
    logits = 4 * 512 * (key_block or 1024)
    assert alive <= allocator.peak / logits < alive + 0.25
    assert allocator.peak / logits < chunking.LOGITS_RESERVED


@pytest.mark.parametrize("share", [0.99, 15 / 16, 0.75, 0.55, 0.5, 0.25, 0.06])
def test_chunks_of_shorter_sequences_are_never_smaller(share: float) -> None:
    for batch in (1, 2, 60, 100, 256, 1000):
        for size in {1, 7, 60, 64, 200, batch - 1} - {0}:
            for keep in (0, 1, 7):
                whole = Chunks(size=size, keep=keep)
                shorter = chunking.shorter_chunks(whole, batch, share)
                if not shorter.size:  # both views at once
                    assert 2 * batch * share <= size * (keep + 1)
                    continue
                assert shorter.size >= size
                assert bool(shorter.keep) <= bool(keep)
                if size < batch:
                    assert shorter.size < batch
                    assert shorter.size * (shorter.keep + 1) * share <= size * (keep + 1)


def test_what_was_given_grows_in_proportion() -> None:
    assert chunking.shorter_chunks(Chunks(size=64), 256, 0.75) == Chunks(size=64)
    assert chunking.shorter_chunks(Chunks(size=64), 256, 0.5) == Chunks(size=128)
    assert chunking.shorter_chunks(Chunks(size=64), 1024, 0.25) == Chunks(size=256)
