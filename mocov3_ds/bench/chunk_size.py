"""What a step at batch 4096 needs: activations measured on the real networks, what chunks save.

    python -m mocov3_ds.bench fit                          the four networks of the paper, bf16
    python -m mocov3_ds.bench fit --batch 16384 --ranks 64

Activations of an image come from the same measurement that a run makes before its first step
(`fit.py`); the rest is multiplication. "One pass" keeps the activations of both views of a rank's
batch, "chunks" those of one chunk beside heads, features, logits, images and gradients. The
largest chunk that fits a card is what a run would choose there, next to weights, optimizer and
momentum encoder (ZeRO-1).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import tyro

from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.model.vit import PAPER_SHAPES
from mocov3_ds.planning import architecture
from mocov3_ds.planning.hardware import GIB
from mocov3_ds.training import chunk_size


@dataclass(frozen=True, kw_only=True)
class Options:
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
    """of the network"""


def main(options: Options) -> None:
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
    for shape in options.shapes:
        rows(shape, options)


def rows(shape: str, options: Options) -> None:
    """A network's rows, one for each number of ranks."""
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    vit = PAPER_SHAPES[shape]
    encoder_shape = EncoderShape(vit=vit)
    trained = architecture.trained(encoder_shape)
    predictor = sum(
        tensor.numbers
        for tensor in architecture.tensors(encoder_shape)
        if tensor.name.startswith("predictor.")
    )
    encoder = MomentumEncoder(encoder_shape, dtype=dtype)
    example = torch.zeros(1, 3, vit.image_size, vit.image_size, dtype=dtype)
    for world_size in options.ranks:
        batch = options.batch // world_size
        room = chunk_size.measure_room(
            encoder,
            example,
            batch=batch,
            global_batch=options.batch,
            gradient_bytes=trained * (dtype.itemsize + 4 // world_size),
        )
        states = state_bytes(trained, trained - predictor, dtype.itemsize, world_size)
        one_pass = states + room.rest + 2 * batch * room.per_image
        chunks = states + room.rest + min(options.chunk, batch) * room.per_image
        choices = []
        for card in options.cards:
            there = replace(room, free=card * 10**9 - states)
            choices.append(choice(there, batch))
        print(
            f"| {shape} | {room.per_image / 2**20:.0f} | {world_size} | {batch} "
            f"| {states / GIB:.1f} | {one_pass / GIB:.0f} | {chunks / GIB:.1f} "
            f"| {one_pass / chunks:.0f} x | {' | '.join(choices)} |",
            flush=True,
        )


def state_bytes(trained: int, followed: int, size: int, world_size: int) -> int:
    """Weights, fp32 masters and AdamW's moments (sharded), momentum encoder (whole), bytes.

    Args:
        trained: numbers in the base encoder.
        followed: of them, those that the momentum encoder has too.
        size: bytes of a number of the network.
        world_size: ranks that share masters and moments.
    """
    return trained * size + 12 * trained // world_size + followed * (4 + (size if size < 4 else 0))


def choice(room: chunk_size.Room, batch: int) -> str:
    """The chunks that a run would choose in this room, in words."""
    if room.images < 1:
        return "does not fit"
    chunks = chunk_size.choose_chunks(room.images, batch)
    if not chunks.size:
        return "one pass"
    return f"{chunks.size} (+{chunks.kept})" if chunks.kept else f"{chunks.size}"


def command() -> Any:
    """Entry of `python -m mocov3_ds.bench fit`."""
    return main(tyro.cli(Options, prog="python -m mocov3_ds.bench fit"))
