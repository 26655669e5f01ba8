"""How many images the backbone may hold at once: measured on this machine, never guessed.

The step is exact at any chunk size, so the size is a question of memory alone:

    images that fit = (free memory - what the rest of the step needs) / activations of an image

Activations come from running the network on few and on more images and taking the difference; how
chunks follow from the images that fit is `model.chunking`. An attempt that goes on under the same
conditions takes the chunks of the attempt before it, so that its bits stay the same.

Shape suffixes: B = rows, G = global batch, C H W = image, D = features, N = tokens.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mocov3_ds.config.run_config import Config
from mocov3_ds.distributed import host_memory, ranks
from mocov3_ds.model.backbones import BackboneFacts
from mocov3_ds.model.backbones import recompute_blocks as switch_recomputation
from mocov3_ds.model.chunking import MEMORY_MARGIN, Chunks, choose_chunks, reserved_logits_bytes
from mocov3_ds.model.momentum_encoder import MomentumEncoder

_log = logging.getLogger("mocov3_ds")


@dataclass(frozen=True)
class Room:
    """What was measured on this rank before its chunks were chosen, bytes."""

    free: int
    """memory that nothing uses yet"""
    reserved: int
    """of it, what a step needs beside the activations of the backbone"""
    per_image: int
    """activations of the backbone for one image of one view"""

    @property
    def images(self) -> int:
        """Images of one view whose activations fit at once."""
        return max(int((self.free * MEMORY_MARGIN - self.reserved) // max(self.per_image, 1)), 0)


def measure_room(
    encoder: MomentumEncoder,
    *,
    batch: int,
    global_batch: int,
    gradient_bytes: int,
    recompute_blocks: bool = False,
    overlap_keys: bool = False,
) -> Room:
    """Run parts of the network on a few images and look at the free memory; all ranks must call.

    Args:
        encoder: the momentum encoder, whose backbone and projector have the base encoder's shapes
            and are whole on each rank at any ZeRO stage.
        batch: images of a rank's batch.
        global_batch: images of all ranks.
        gradient_bytes: what backward and optimizer will allocate beside activations.
        recompute_blocks: whether the base encoder recomputes each of its blocks in the backward.
        overlap_keys: whether the keys of a chunk are computed beside the queries.
    """
    backbone, parameter = encoder.backbone, next(encoder.parameters())
    channels, size = encoder.shape.backbone.channels, encoder.shape.backbone.size
    example_1CHW = torch.zeros(1, channels, *size, dtype=parameter.dtype, device=parameter.device)
    if recompute_blocks:
        switch_recomputation(backbone)
    per_image = activation_bytes(backbone, example_1CHW)
    if recompute_blocks:
        switch_recomputation(backbone, False)
    features_1D = example_1CHW.new_zeros(1, encoder.facts.width)
    if example_1CHW.device.type == "cpu" or overlap_keys:
        # the allocator keeps no record here; the block at work holds about its own share twice;
        # and a block of the keys is at work beside it
        per_image += largest_block_bytes(backbone, encoder.facts, example_1CHW)
    # the predictor is smaller than the projector
    heads = 2 * activation_bytes(encoder.projector, features_1D)
    # a view, its uint8 crop, and that of the next batch, which is copied ahead
    image = example_1CHW.numel() * (example_1CHW.element_size() + 2)
    logits = reserved_logits_bytes(batch, global_batch)
    return Room(
        free=free_bytes(example_1CHW.device),
        reserved=gradient_bytes + 2 * batch * (image + heads) + logits,
        per_image=per_image,
    )


def agree_on_chunks(room: Room, batch: int, *, whole: bool = False) -> Chunks:
    """Chunks for the tightest rank, the same on all; all ranks must call.

    Args:
        room: what was measured on this rank.
        batch: images of a rank's batch.
        whole: whether the backbone must see both views of the batch in one pass each.

    Raises:
        ValueError: on some rank the activations of not even one image fit, or not those of the
            whole batch.
    """
    rooms: list[Room] = ranks.gather_objects(room)
    number, tightest = min(enumerate(rooms), key=lambda numbered: numbered[1].images)
    if tightest.images < 1:
        gib = 2**30
        raise ValueError(
            f"not one image fits: {tightest.free / gib:.2f} GiB are free on rank {number}, a step "
            f"needs {tightest.reserved / gib:.2f} GiB beside the backbone's activations and "
            f"{tightest.per_image / gib:.2f} GiB for an image; use more ranks, a smaller --batch, "
            "--recompute_blocks, or name a --chunk to try all the same."
        )
    chunks = choose_chunks(tightest.images, batch)
    if whole and chunks.size:
        gib = 2**30
        needed = tightest.reserved + 2 * batch * tightest.per_image
        raise ValueError(
            f"the {batch} images of rank {number} do not fit, and batch norm in the backbone needs "
            f"them all in one pass: {needed / gib:.2f} GiB are needed and {MEMORY_MARGIN:.0%} of "
            f"{tightest.free / gib:.2f} GiB are free; use more ranks, a smaller --batch, "
            "--recompute_blocks, or --chunk of the rank's batch to try all the same."
        )
    _log.info("%s for %s of rank %d", chunks, tightest, number)
    return chunks


def resolve_chunks(
    config: Config,
    rank_batch: int,
    conditions: Mapping[str, Any],
    saved: Mapping[str, Any],
    measure: Callable[[], Chunks],
) -> Chunks:
    """Chunks as given, as an earlier attempt chose them on ranks like these, or measured.

    Args:
        config: settings of the run.
        rank_batch: images of a rank's batch.
        conditions: what `chunk_conditions` says of this attempt.
        saved: size and kept chunks of the earlier attempt with its conditions; empty for none.
        measure: called where the chunks have to be measured, on all ranks or on none.
    """
    if config.chunk:
        size = config.chunk if config.chunk < rank_batch else 0
        return Chunks(size=size, keep=config.keep_chunks)
    if saved and all(saved.get(key) == value for key, value in conditions.items()):
        return Chunks(size=saved["size"], keep=saved["kept"])
    return measure()


def chunk_conditions(
    config: Config, engine_json: Mapping[str, Any], world_size: int, memory_bytes: int
) -> dict[str, Any]:
    """What an attempt may change that decides the chunks, as JSON values, the same on each rank.

    Args:
        config: settings of the run.
        engine_json: DeepSpeed JSON that the engine was built from.
        world_size: number of ranks of this attempt.
        memory_bytes: memory of the rank that has least, see `smallest_memory_bytes`.
    """
    keys = ("zero_optimization", "bf16", "fp16", "torch_autocast", "data_types")
    return {
        "world_size": world_size,
        "given": bool(config.chunk),
        "recompute_blocks": config.recompute_blocks,
        **({"overlap_keys": True} if config.overlap_keys else {}),  # older runs do not have it
        "engine": {key: engine_json.get(key) for key in keys},
        # drivers and kernels differ by some MiB in what they keep of the same memory
        "memory_gib": round(memory_bytes / 2**30),
    }


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
    two_rows, four_rows = (example.expand(n, *example.shape[1:]).contiguous() for n in (2, 4))
    difference = kept_bytes(module, four_rows) - kept_bytes(module, two_rows)
    if example.device.type == "cuda":
        peaks = peak_bytes(module, four_rows) - peak_bytes(module, two_rows)
        difference = max(difference, peaks)
    return max(difference // 2, 1)


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that the forward pass of `module` on `x` keeps for the backward, beside weights."""
    return sum(_tally_kept(module, x, ()).values())


def largest_block_bytes(backbone: nn.Module, facts: BackboneFacts, example: Tensor) -> int:
    """Of what one more image makes a backbone keep, the share of the block that keeps most.

    Args:
        backbone: network in the state that it trains in; it is left as it was.
        facts: what is known of it, of which the layer groups count.
        example: one image, as the backbone takes it: (1, C, H, W).
    """
    names = [f"blocks.{g[6:]}" if g.startswith("block_") else g for g in facts.groups]
    blocks = [module for name, module in backbone.named_modules() if name in names]
    four, two = (
        _tally_kept(backbone, example.expand(n, *example.shape[1:]).contiguous(), blocks)
        for n in (4, 2)
    )
    return max(((four[block] - two[block]) // 2 for block in blocks), default=0)


def _tally_kept(
    module: nn.Module, x: Tensor, blocks: Sequence[nn.Module]
) -> dict[nn.Module | None, int]:
    """Bytes kept while each of `blocks` is at work, the innermost one; None = outside of them."""
    tensors = _trainable_copies(module)
    storages = {tensor.untyped_storage().data_ptr() for tensor in (x, *tensors.values())}
    bytes_kept: dict[nn.Module | None, int] = dict.fromkeys((None, *blocks), 0)
    at_work: list[nn.Module | None] = [None]

    def enter_block(block: nn.Module, _: object) -> None:
        at_work.append(block)

    def leave_block(*_: object) -> None:
        at_work.pop()

    def count_tensor(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages.add(storage.data_ptr())
            bytes_kept[at_work[-1]] += storage.nbytes()
        return tensor

    handles = [block.register_forward_pre_hook(enter_block) for block in blocks]
    handles += [block.register_forward_hook(leave_block) for block in blocks]
    try:
        with torch.enable_grad(), saved_tensors_hooks(count_tensor, lambda tensor: tensor):
            output = torch.func.functional_call(module, tensors, (x,))
    finally:
        for handle in handles:
            handle.remove()
    assert output.requires_grad
    return bytes_kept


def peak_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that the allocator gives at most at once in both passes of `module` on `x`, on CUDA."""
    both_passes = _BothPasses(module)
    tensors = _trainable_copies(both_passes)
    for tensor in tensors.values():
        if tensor.requires_grad:
            # all of them together would be the peak, at the end, whatever the number of rows
            tensor.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    allocated = torch.cuda.memory_allocated(x.device)
    with torch.enable_grad():
        torch.func.functional_call(both_passes, tensors, (x,))
    return torch.cuda.max_memory_allocated(x.device) - allocated


def _trainable_copies(module: nn.Module) -> dict[str, Tensor]:
    """Its weights as tensors that ask for a gradient, its buffers as copies."""
    tensors = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
    return tensors | {name: buffer.clone() for name, buffer in module.named_buffers()}


def _drop_gradient(tensor: Tensor) -> None:
    tensor.grad = None


def free_bytes(device: torch.device) -> int:
    """Memory that this rank may still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return host_memory.free_bytes() // ranks.local_world_size()


def smallest_memory_bytes(device: torch.device) -> int:
    """Memory of the card, or of the machine, of the rank that has least; all ranks must call."""
    on_gpu = device.type == "cuda"
    total = torch.cuda.mem_get_info(device)[1] if on_gpu else psutil.virtual_memory().total
    return min(ranks.gather_objects(int(total)))


class _BothPasses(nn.Module):
    """Forward and backward in one call: what is recomputed must meet the same replaced weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> None:
        self.module(x).float().sum().backward()
