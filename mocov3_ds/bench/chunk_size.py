"""What does a step at batch 4096 need: activations measured on the real networks, what chunks save.

    python -m mocov3_ds.bench chunk_size                   the four networks of the paper, bf16
    python -m mocov3_ds.bench chunk_size --batch 16384 --ranks 64

The activations of an image come from the measurement that a run makes before its first step
(`training/chunk_size.py`); the rest is multiplication. "One pass" keeps the activations of both
views of a rank's batch. "Chunks" keeps those of one chunk, beside heads, features, logits, images
and gradients. The largest chunk that fits a card is what a run would choose there, next to weights,
optimizer and momentum encoder (ZeRO-1).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.chunking import choose_chunks
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.model.vit import PAPER_SHAPES, VitShape
from mocov3_ds.planning import architecture
from mocov3_ds.planning.cards import GIB
from mocov3_ds.training.chunk_size import Room, measure_room


@dataclass(frozen=True, kw_only=True)
class ChunkSizeOptions:
    """Memory of a rank at a global batch, with and without chunks."""

    shapes: tuple[Literal["vit_s16", "vit_b16", "vit_l16", "vit_h14"], ...] = (
        *("vit_s16", "vit_b16", "vit_l16", "vit_h14"),
    )
    """networks of the paper"""
    batch: int = 4096
    """global batch"""
    ranks: tuple[int, ...] = (1, 8)
    """numbers of ranks that share it"""
    cards: tuple[int, ...] = (24, 40, 80)
    """memory of a card, GB"""
    chunk: int = 32
    """images of a chunk in the memory columns"""
    precision: Literal["fp32", "bf16"] = "bf16"
    """precision of the network"""


def run_bench(options: ChunkSizeOptions) -> None:
    """Print the table."""
    for world_size in options.ranks:
        if options.batch % world_size:
            raise ValueError(f"--batch {options.batch} cannot be shared by {world_size} ranks.")
    cards = " | ".join(f"{card} GB" for card in options.cards)
    print(
        f"{options.precision}, ZeRO-1 with AdamW, global batch {options.batch}; GiB of a rank; a ",
        end="",
    )
    print("card's column: images of a chunk (and chunks that keep their activations)\n")
    print("| network | MiB an image | ranks | images each | states | one pass | chunks of ", end="")
    print(f"{options.chunk} | saved | {cards} |")
    print("|---" * (8 + len(options.cards)) + "|")
    for name in options.shapes:
        print_rows(name, PAPER_SHAPES[name], options)


def print_rows(name: str, vit: VitShape, options: ChunkSizeOptions) -> None:
    """Print the rows of a network, one for each number of ranks."""
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    shape = EncoderShape(backbone=vit)
    trained = architecture.count_trained(shape)
    predictor = sum(
        tensor.numbers
        for tensor in architecture.list_tensors(shape)
        if tensor.name.startswith("predictor.")
    )
    encoder = MomentumEncoder(shape, dtype=dtype)
    for world_size in options.ranks:
        batch = options.batch // world_size
        room = measure_room(
            encoder,
            batch=batch,
            global_batch=options.batch,
            gradient_bytes=trained * (dtype.itemsize + 4 // world_size),
        )
        states = state_bytes(trained, trained - predictor, dtype.itemsize, world_size)
        one_pass = states + room.reserved + 2 * batch * room.per_image
        chunks = states + room.reserved + min(options.chunk, batch) * room.per_image
        choices = [
            describe_choice(replace(room, free=card * 10**9 - states), batch)
            for card in options.cards
        ]
        print(
            f"| {name} | {room.per_image / 2**20:.0f} | {world_size} | {batch} "
            f"| {states / GIB:.1f} | {one_pass / GIB:.0f} | {chunks / GIB:.1f} "
            f"| {one_pass / chunks:.0f} x | {' | '.join(choices)} |",
            flush=True,
        )


def state_bytes(trained: int, followed: int, number_bytes: int, world_size: int) -> int:
    """Bytes of weights, fp32 masters, AdamW's state (both sharded) and momentum encoder of a rank.

    Args:
        trained: trained numbers of the base encoder.
        followed: trained numbers that the momentum encoder has as well.
        number_bytes: bytes of one number of the network.
        world_size: number of ranks that share masters and optimizer state.
    """
    copy_bytes = number_bytes if number_bytes < 4 else 0
    return trained * number_bytes + 12 * trained // world_size + followed * (4 + copy_bytes)


def describe_choice(room: Room, batch: int) -> str:
    """The chunks that a run would choose in this room, in words."""
    if room.images < 1:
        return "does not fit"
    chunks = choose_chunks(room.images, batch)
    if not chunks.size:
        return "one pass"
    return f"{chunks.size} (+{chunks.keep})" if chunks.keep else f"{chunks.size}"
