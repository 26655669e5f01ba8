"""How many images the backbone may hold at once: measured on this machine, never guessed.

The step is exact at any chunk size, so the size is a question of memory alone:

    images that fit = (free memory - what the rest of the step needs) / activations of an image

Activations come from running the network on few and on more images and taking the difference. A
batch that fits runs in one pass. Otherwise half of the room goes to the chunk at work and the rest
buys back recomputation: chunks at the end of the batch keep their activations.

Shape suffixes: B = rows, G = global batch, C H W = image, D = features.
"""

import logging
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mocov3_ds.distributed import host_memory, ranks
from mocov3_ds.model.base_encoder import Chunks
from mocov3_ds.model.momentum_encoder import MomentumEncoder

_log = logging.getLogger("mocov3_ds")

_LARGEST_CHUNK = 64
"""images that keep a device busy; beyond this, room is better spent on kept chunks"""
_MARGIN = 0.9
"""share of the free memory that is used: allocators fragment"""
_LOGITS_BYTES = 512 * 2**20
"""the logits of a view are streamed over blocks of keys where they would need more than this"""
_LOGITS_COPIES = 6
"""fp32 tensors of the logits' size that are alive at once"""


@dataclass(frozen=True)
class Room:
    """What was measured on this rank before its chunks were chosen, bytes."""

    free: int
    """memory that nothing uses yet"""
    rest: int
    """of it, what a step needs beside the activations of the backbone"""
    per_image: int
    """activations of the backbone for one image of one view"""

    @property
    def images(self) -> int:
        """Images of one view whose activations fit at once."""
        return max(int((self.free * _MARGIN - self.rest) // max(self.per_image, 1)), 0)


def measure_room(
    encoder: MomentumEncoder,
    example_1CHW: Tensor,
    *,
    batch: int,
    global_batch: int,
    gradient_bytes: int,
    recompute_blocks: bool = False,
) -> Room:
    """Run parts of the network on a few images and look at the free memory; all ranks must call.

    Args:
        encoder: the momentum encoder, whose backbone and projector have the base encoder's shapes
            and are whole on each rank at any ZeRO stage.
        example_1CHW: an image as a step gets it, (1, C, H, W) on the device.
        batch: images of a rank.
        global_batch: images of all ranks.
        gradient_bytes: what backward and optimizer will allocate beside activations.
        recompute_blocks: the base encoder recomputes each of its blocks.
    """
    backbone = encoder.backbone
    backbone.set_grad_checkpointing(recompute_blocks)
    per_image = activation_bytes(backbone, example_1CHW)
    backbone.set_grad_checkpointing(False)
    with torch.no_grad():
        tokens_1ND = backbone.patch_embed(example_1CHW)
        features_1D = backbone(example_1CHW)
    if example_1CHW.device.type == "cpu":
        # the allocator keeps no record here; the block at work holds about its own share twice
        per_image += activation_bytes(backbone.blocks[0], tokens_1ND)
    # the predictor is smaller than the projector
    heads = 2 * activation_bytes(encoder.projector, features_1D)
    image = example_1CHW.numel() * (example_1CHW.element_size() + 1)  # and its uint8 crop
    logits = min(_LOGITS_COPIES * 4 * batch * global_batch, 2 * _LOGITS_BYTES)
    return Room(
        free=free_bytes(example_1CHW.device),
        rest=gradient_bytes + 2 * batch * (image + heads) + logits,
        per_image=per_image,
    )


def fitting_chunks(room: Room, batch: int) -> Chunks:
    """Chunks for the tightest rank, the same on all; all ranks must call.

    Raises:
        ValueError: on some rank the activations of not even one image fit.
    """
    rooms = ranks.gather_objects(room)
    number, tightest = min(enumerate(rooms), key=lambda of_rank: of_rank[1].images)
    if tightest.images < 1:
        gib = 2**30
        raise ValueError(
            f"not one image fits: {tightest.free / gib:.2f} GiB are free on rank {number}, a step "
            f"needs {tightest.rest / gib:.2f} GiB beside the backbone's activations and "
            f"{tightest.per_image / gib:.2f} GiB for an image; use more ranks, a smaller --batch, "
            "--recompute_blocks, or name a --chunk to try all the same."
        )
    chunks = choose_chunks(tightest.images, batch)
    _log.info("%s for %s of rank %d", chunks, tightest, number)
    return chunks


def choose_chunks(images: int, batch: int) -> Chunks:
    """Chunks of a rank's batch when the activations of `images` (>= 1) images fit at once."""
    if images >= 2 * batch:
        return Chunks()
    size = min(max(images // 2, 1), _LARGEST_CHUNK, batch)
    return Chunks(size=size, kept=max(images // size - 1, 0))


def fitting_key_block(batch: int, global_batch: int) -> int:
    """Keys per block of the loss: 0 (all at once) where the logits are small enough."""
    row = _LOGITS_COPIES * 4 * batch
    return 0 if row * global_batch <= _LOGITS_BYTES else max(_LOGITS_BYTES // row, 1)


def activation_bytes(module: nn.Module, example: Tensor) -> int:
    """Memory that one more row costs a forward and backward pass of `module`.

    The tensors that the forward pass keeps for the backward are counted with four and two rows. On
    a GPU the allocator's peak of both passes is compared as well, and the larger difference counts:
    the kept tensors leave out what a layer needs while it works, and the peak of so few rows may
    lie where the gradient of a large weight is made and few activations are left.

    Args:
        module: needs no gradient of its own, is left as it was.
        example: one row of its input.
    """
    few, more = (example.expand(rows, *example.shape[1:]).contiguous() for rows in (2, 4))
    of_two = _kept_bytes(module, more) - _kept_bytes(module, few)
    if example.device.type == "cuda":
        of_two = max(of_two, _peak_bytes(module, more) - _peak_bytes(module, few))
    return max(of_two // 2, 1)


def _with_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Its weights as tensors that ask for a gradient, its buffers as copies."""
    tensors = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
    return tensors | {name: buffer.clone() for name, buffer in module.named_buffers()}


def _kept_bytes(module: nn.Module, x: Tensor) -> int:
    tensors = _with_gradients(module)
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *tensors.values())}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(count, lambda tensor: tensor):
        output = torch.func.functional_call(module, tensors, (x,))
    assert output.requires_grad
    return sum(kept.values())


def _peak_bytes(module: nn.Module, x: Tensor) -> int:
    both_passes = _BothPasses(module)
    tensors = _with_gradients(both_passes)
    for tensor in tensors.values():
        if tensor.requires_grad:
            # all of them together would be the peak, at the end, whatever the number of rows
            tensor.register_post_accumulate_grad_hook(_let_go)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    before = torch.cuda.memory_allocated(x.device)
    with torch.enable_grad():
        torch.func.functional_call(both_passes, tensors, (x,))
    return torch.cuda.max_memory_allocated(x.device) - before


def _let_go(tensor: Tensor) -> None:
    tensor.grad = None


def free_bytes(device: torch.device) -> int:
    """Memory that this rank may still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return host_memory.free_bytes() // ranks.local_world_size()


def total_bytes(device: torch.device) -> int:
    """Memory of this rank's card, or of its machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return int(psutil.virtual_memory().total)


class _BothPasses(nn.Module):
    """Forward and backward in one call: what is recomputed must meet the same replaced weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> None:
        self.module(x).float().sum().backward()
