"""Chunks from measured memory: the measuring, the choice, and what is said when nothing fits."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mocov3_ds.config.run_config import Config
from mocov3_ds.distributed import host_memory, ranks
from mocov3_ds.model.backbones import build_backbone, describe_backbone
from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.heads import build_projector
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.model.shapes import TimmShape
from mocov3_ds.model.vit import VitShape, build_vit
from mocov3_ds.training import chunk_size
from mocov3_ds.training.chunk_size import Room
from tests.allocator import Allocator
from tests.ranks_pool import run_ranks

SHAPE = EncoderShape(
    backbone=VitShape(image_size=32, patch_size=8, dim=48, depth=3, heads=3), hidden=64, out=16
)


def test_activations_of_a_small_network_by_hand() -> None:
    network = nn.Sequential(nn.Linear(10, 30, bias=False), nn.GELU(), nn.Linear(30, 5))
    # kept for the backward: the input of GELU and the input of the second linear; not the input
    assert chunk_size.activation_bytes(network, torch.zeros(1, 10)) == 4 * (30 + 30)
    assert chunk_size.activation_bytes(network.bfloat16(), torch.zeros(1, 10).bfloat16()) == 2 * (
        30 + 30
    )


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    """`torch.cuda` as the measurement sees it, over tensors of the CPU."""
    mode = Allocator()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", mode.begin)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: mode.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: mode.peak)
    return mode


class OnGpu(Tensor):
    """Says that it lies on a GPU, and does not."""

    device = torch.device("cuda")  # type: ignore[assignment]


@pytest.mark.parametrize("recompute", [False, True])
def test_peaks_are_of_activations_and_not_of_gradients(
    allocator: Allocator, recompute: bool
) -> None:
    wide = VitShape(image_size=16, patch_size=8, dim=192, depth=4, heads=3)
    backbone = build_vit(wide, class_token_only=True).requires_grad_(False)
    backbone.set_grad_checkpointing(recompute)
    with allocator:
        peak = {
            n: chunk_size.peak_bytes(backbone, torch.zeros(n, 3, 16, 16)) for n in (2, 4, 64, 128)
        }
    weights = sum(parameter.nbytes for parameter in backbone.parameters())
    slope = (peak[128] - peak[64]) / 64
    assert weights > 4 * 4 * slope  # all gradients together would hide the activations of four
    assert (peak[4] - peak[2]) / 2 == pytest.approx(slope, rel=0.1)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_a_large_weight_does_not_hide_the_activations_of_a_head(allocator: Allocator) -> None:
    projector = build_projector(64, 512, 32).requires_grad_(False)
    with allocator:
        few, more = (chunk_size.peak_bytes(projector, torch.zeros(n, 64)) for n in (1024, 2048))
        measured = chunk_size.activation_bytes(projector, torch.zeros(1, 64).as_subclass(OnGpu))
        of_few = (chunk_size.peak_bytes(projector, torch.zeros(n, 64)) for n in (2, 4))
    slope = (more - few) / 1024
    assert -next(of_few) + next(of_few) < 0.1 * slope  # the peak of few rows says nothing
    assert 0.5 * slope < measured < slope  # what is kept, without what a layer needs at work


def test_measuring_leaves_the_encoder_as_it_was() -> None:
    encoder = MomentumEncoder(SHAPE)
    before = {name: tensor.clone() for name, tensor in encoder.full_state()}
    sizes = {"batch": 8, "global_batch": 16, "gradient_bytes": 1000}
    room = chunk_size.measure_room(encoder, **sizes)
    for name, tensor in encoder.full_state():
        assert torch.equal(tensor, before[name]), name
    assert not any(p.requires_grad or p.grad is not None for p in encoder.parameters())
    tokens = 17
    # a block keeps about 32 x tokens x width numbers in low precision (flash attention): within a
    # factor of two, and the other parts of the room are what was asked for
    assert 0.5 < room.per_image / (4 * 16 * 3 * tokens * 48) < 2.5
    assert room.reserved > 1000 + 2 * 8 * 3 * 32 * 32 * 5
    small = chunk_size.measure_room(encoder, **sizes, recompute_blocks=True)
    assert small.per_image < room.per_image / 1.5


def test_too_little_memory_says_so_with_numbers() -> None:
    room = Room(free=2**30, reserved=2**29, per_image=2**29)
    words = r"not one image fits: 1\.00 GiB are free on rank 0.*0\.50 GiB"
    with pytest.raises(ValueError, match=words):
        chunk_size.agree_on_chunks(room, batch=4)


def refusal() -> str:
    free = 2**29 if ranks.rank() == 1 else 20 * 2**30
    with pytest.raises(ValueError, match="not one image fits") as found:
        chunk_size.agree_on_chunks(Room(free=free, reserved=2**28, per_image=2**29), batch=4)
    return str(found.value)


def test_the_tightest_rank_is_named_on_all() -> None:
    first, second = run_ranks(2, refusal)
    assert first == second
    assert "0.50 GiB are free on rank 1" in first


CONFIG = Config(batch=32)
MEASURED = Chunks(size=5, keep=1)
STAGE_1 = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}


@pytest.mark.parametrize(
    ("before", "after", "engine", "total", "reused"),
    [
        ({}, {}, STAGE_1, 80.0, True),
        ({}, {}, STAGE_1, 80.1, True),  # another driver
        ({}, {}, STAGE_1, 40.0, False),
        ({"recompute_blocks": True}, {}, STAGE_1, 80.0, False),
        ({}, {"recompute_blocks": True}, STAGE_1, 80.0, False),
        ({}, {}, {**STAGE_1, "zero_optimization": {"stage": 3}}, 80.0, False),
        ({}, {}, {**STAGE_1, "bf16": {"enabled": False}}, 80.0, False),
        ({"chunk": 8}, {}, STAGE_1, 80.0, False),
    ],
)
def test_a_resumed_run_takes_the_chunks_that_were_chosen_under_the_same_conditions(
    before: dict[str, Any],
    after: dict[str, Any],
    engine: dict[str, Any],
    total: float,
    reused: bool,
) -> None:
    def conditions(flags: dict[str, Any], engine: dict[str, Any], total: float) -> dict[str, Any]:
        config = replace(CONFIG, **flags)
        return chunk_size.chunk_conditions(config, engine, 1, round(total * GIB))

    def resolve(flags: dict[str, Any], engine: dict[str, Any], saved: dict[str, Any]) -> Chunks:
        present = conditions(flags, engine, total)
        return chunk_size.resolve_chunks(
            replace(CONFIG, **flags), CONFIG.batch, present, saved, lambda: MEASURED
        )

    earlier = conditions(before, STAGE_1, 80.0)
    saved = json.loads(json.dumps({"size": 3, "kept": 2, **earlier}))
    assert resolve(after, engine, saved) == (Chunks(size=3, keep=2) if reused else MEASURED)
    # a checkpoint of before these were noted, and none
    for saved in ({"size": 3, "kept": 2, "world_size": 1}, {}):
        assert resolve({}, STAGE_1, saved) == MEASURED


def test_given_chunks_are_taken_and_one_of_the_whole_batch_is_one_pass() -> None:
    def resolve(**flags: int) -> Chunks:
        return chunk_size.resolve_chunks(replace(CONFIG, **flags), 32, {}, {}, lambda: MEASURED)

    assert resolve(chunk=8, keep_chunks=2) == Chunks(size=8, keep=2)
    assert resolve(chunk=32) == resolve(chunk=99) == Chunks()


GIB = 2**30


def test_the_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 9)
    monkeypatch.setattr(ranks, "local_world_size", lambda: 2)
    assert chunk_size.free_bytes(torch.device("cpu")) == 4


def test_a_batch_whose_rows_know_each_other_goes_in_one_pass_or_not_at_all() -> None:
    gib = 2**30
    roomy = Room(free=100 * gib, reserved=gib, per_image=gib)
    assert chunk_size.agree_on_chunks(roomy, 16, whole=True) == Chunks()
    tight = Room(free=20 * gib, reserved=gib, per_image=gib)
    assert chunk_size.agree_on_chunks(tight, 16).size
    with pytest.raises(ValueError, match=r"33\.00 GiB are needed and 90% of 20\.00 GiB are free"):
        chunk_size.agree_on_chunks(tight, 16, whole=True)


def test_the_block_that_keeps_most_is_found_in_any_backbone() -> None:
    shape = TimmShape(name="resnet18", size=(32, 32), arguments=("layers=[1,1,1,1]",))
    backbone = build_backbone(EncoderShape(backbone=shape))
    facts, image = describe_backbone(backbone, shape), torch.zeros(1, 3, 32, 32)
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    largest = chunk_size.largest_block_bytes(backbone, facts, image)
    # layer1.0 keeps seven maps of 64 x 8 x 8 numbers: what its convolutions and norms are given
    # (the first is the pooling's), and the two results of ReLU
    assert 4 * 64 * 8 * 8 * 4 <= largest <= 7 * 64 * 8 * 8 * 4
    assert largest < chunk_size.activation_bytes(backbone, image)
    for name, buffer in backbone.named_buffers():
        assert torch.equal(buffer, before[name]), name
