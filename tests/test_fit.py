"""Chunks from measured memory: the measuring, the choice, and what is said when nothing fits."""

import pytest
import torch
from torch import nn

from mocov3_ds import fit
from mocov3_ds.fit import Room
from mocov3_ds.model.moco import Chunks, EncoderShape
from mocov3_ds.model.momentum import MomentumEncoder
from mocov3_ds.model.vit import VitShape
from mocov3_ds.step import kept_of_each_view

SHAPE = EncoderShape(
    vit=VitShape(image_size=32, patch_size=8, dim=48, depth=3, heads=3), hidden=64, out=16
)


def test_activations_of_a_small_network_by_hand() -> None:
    network = nn.Sequential(nn.Linear(10, 30, bias=False), nn.GELU(), nn.Linear(30, 5))
    # kept for the backward: the input of GELU and the input of the second linear; not the input
    assert fit.activation_bytes(network, torch.zeros(1, 10)) == 4 * (30 + 30)
    assert fit.activation_bytes(network.bfloat16(), torch.zeros(1, 10).bfloat16()) == 2 * (30 + 30)


def test_measuring_leaves_the_encoder_as_it_was() -> None:
    encoder = MomentumEncoder(SHAPE)
    before = {name: tensor.clone() for name, tensor in encoder.full_state()}
    room = fit.measure_room(
        encoder, torch.zeros(1, 3, 32, 32), batch=8, global_batch=16, gradient_bytes=1000
    )
    for name, tensor in encoder.full_state():
        assert torch.equal(tensor, before[name]), name
    assert not any(p.requires_grad or p.grad is not None for p in encoder.parameters())
    tokens = 17
    # a block keeps about 32 x tokens x width numbers in low precision (flash attention): within a
    # factor of two, and the other parts of the room are what was asked for
    assert 0.5 < room.per_image / (4 * 16 * 3 * tokens * 48) < 2.5
    assert room.rest > 1000 + 2 * 8 * 3 * 32 * 32 * 5
    small = fit.measure_room(
        encoder,
        torch.zeros(1, 3, 32, 32),
        batch=8,
        global_batch=16,
        gradient_bytes=1000,
        recompute_blocks=True,
    )
    assert small.per_image < room.per_image / 1.5


@pytest.mark.parametrize(
    ("images", "batch", "chunks"),
    [
        (16, 8, Chunks()),
        (15, 8, Chunks(size=7, kept=1)),
        (2, 8, Chunks(size=1, kept=1)),
        (1, 8, Chunks(size=1, kept=0)),
        (200, 512, Chunks(size=64, kept=2)),
        (1000, 512, Chunks(size=64, kept=14)),
    ],
)
def test_the_choice(images: int, batch: int, chunks: Chunks) -> None:
    assert fit.choose_chunks(images, batch) == chunks
    if chunks.size:  # never more at once than fits: the chunk at work and the kept ones
        assert chunks.size * (chunks.kept + 1) <= images


def test_too_little_memory_says_so_with_numbers() -> None:
    room = Room(free=2**30, rest=2**29, per_image=2**29)
    with pytest.raises(ValueError, match=r"not one image fits: 1\.00 GiB are free.*0\.50 GiB"):
        fit.fitting_chunks(room, batch=4)


def test_key_blocks_bound_the_logits() -> None:
    assert fit.fitting_key_block(512, 4096) == 0
    block = fit.fitting_key_block(4096, 32768)
    assert 0 < 24 * 4096 * block <= 512 * 2**20
    assert fit.fitting_key_block(10**9, 10**9) == 1


@pytest.mark.parametrize(
    ("chunks", "batch", "kept"),
    [
        (Chunks(), 8, (0, 1)),
        (Chunks(size=3), 8, (0, 1)),
        (Chunks(size=3, kept=1), 8, (0, 2)),
        (Chunks(size=3, kept=3), 8, (1, 3)),
        (Chunks(size=3, kept=99), 8, (3, 3)),
    ],
)
def test_kept_chunks_are_counted_from_the_end(
    chunks: Chunks, batch: int, kept: tuple[int, int]
) -> None:
    assert kept_of_each_view(chunks, batch) == kept
