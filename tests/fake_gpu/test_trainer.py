"""The trainer on the fake card: stages, optimizers, precisions, chunks, offload, a world of 8."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_prep.drawn_samples import ensure_samples
from tests.fake_gpu.card import FakeGpu
from tests.fake_gpu.process import run_on_fake_gpu

pytestmark = pytest.mark.slow

MOST_SYNCS = 4
"""times that the host may wait for the card in a step in which nothing is measured or saved"""
MOST_SYNCS_OF_OFFLOAD = 200
"""the same where DeepSpeed takes gradients to the host, one tensor at a time, each waited for"""
MOST_LAUNCHES = 1700
"""kernels, products and Triton kernels of a step of the tiny recipe on one rank, ZeRO-2, bf16"""
PLAN_BOUND = 0.12
"""share by which what the allocator reserves may differ from the plan"""

CONFIGS = Path(__file__).parents[2] / "ds_configs"


@dataclass
class Outcome:
    """What is compared of one run on the card."""

    status: int
    output: str
    syncs: list[int]
    """of each step"""
    launches: list[int]
    mistakes: list[str]
    retries: int
    allocations: list[int]
    """of each step: times that the allocator went to the driver"""
    collectives: int
    """of the last step"""
    reserved_gb: float
    places: dict[str, int]
    """waits of the last step"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of drawn images: 256 to train on, 64 held out."""
    folder = tmp_path_factory.mktemp("samples") / "samples"
    train, test = ensure_samples(folder, {"train": 256, "test": 64})
    return ["--data.shards", train, "--data.probe_shards", test]


def run_all(folder: str, commands: Mapping[str, Sequence[str]], world_size: int) -> dict[str, Any]:
    """Train once for each name, in one process, one after another."""
    import contextlib

    from tests.fake_gpu import inside

    outcomes = {}
    world = inside.pretended_world(world_size) if world_size > 1 else contextlib.nullcontext()
    with world:
        for name, flags in commands.items():
            finished = inside.train(["--runs", folder, "--name", name, *flags])
            steps = finished.steps
            outcomes[name] = Outcome(
                status=finished.status,
                output=finished.output,
                syncs=[step.syncs for step in steps],
                launches=[step.launches for step in steps],
                mistakes=[mistake for step in steps for mistake in step.mistakes],
                retries=sum(step.retries for step in steps),
                allocations=[step.allocations for step in steps],
                collectives=steps[-1].collectives if steps else 0,
                reserved_gb=max((step.reserved_gb for step in steps), default=0.0),
                places=dict(steps[-1].places) if steps else {},
            )
    return outcomes


def ds(name: str, *flags: str) -> list[str]:
    return ["--deepspeed_config", str(CONFIGS / f"{name}.json"), *flags]


QUIET = ["--batch", "32", "--knn.probes", "0", "--stop_after_steps", "3"]
CASES = {
    "zero0_fp32": ds("zero0_adamw_fp32"),
    "zero1_bf16_chunks": ds("zero1_adamw_bf16", "--chunk", "12", "--keep_chunks", "1"),
    "zero1_fp16_profile": ds("zero1_adamw_fp16", "--profile", "1", "--stop_after_steps", "4"),
    "zero1_lamb_recompute": ds("zero1_lamb_bf16", "--recompute_blocks"),
    "zero1_overlap_keys": ds("zero1_adamw_bf16", "--overlap_keys"),
    "zero2_bf16": ds("zero1_adamw_bf16", "--ds", "zero_optimization.stage=2"),
    "zero2_offload": ds("zero2_adamw_bf16_offload"),
    "zero3_bf16": ds("zero3_adamw_bf16"),
    "zero3_lamb": ds("zero3_lamb_bf16", "--deterministic"),
    "zero3_each_weight": ds(
        "zero3_adamw_bf16",
        *("--ds", "zero_optimization.stage3_param_persistence_threshold=0"),
        *("--ds", "zero_optimization.stage3_prefetch_bucket_size=1000"),
    ),
    "tf32": ds("zero1_adamw_fp32", "--tf32"),
}


def most_syncs(name: str) -> int:
    """The bound that holds for a case."""
    return MOST_SYNCS_OF_OFFLOAD if "offload" in name else MOST_SYNCS


def judge(name: str, outcome: Outcome, syncs: int) -> None:
    """What holds for every run on the card."""
    assert outcome.status == 0, outcome.output[-4000:]
    assert outcome.mistakes == [] and outcome.retries == 0, name
    # the third step: nothing is built, tuned or allocated any more
    assert outcome.syncs[2] <= syncs, (name, outcome.places)
    assert outcome.allocations[2] == 0, name


def test_every_stage_and_precision_stays_on_the_card(tmp_path: Path, shards: list[str]) -> None:
    commands = {name: [*QUIET, *shards, *flags] for name, flags in CASES.items()}
    outcomes = run_on_fake_gpu(run_all, str(tmp_path), commands, 1)
    for name, outcome in outcomes.items():
        judge(name, outcome, most_syncs(name))
    assert outcomes["zero2_bf16"].launches[2] <= MOST_LAUNCHES


def test_rank_0_of_a_world_of_8(tmp_path: Path, shards: list[str]) -> None:
    """All that it measures is measured: k-NN, features, attention, and a checkpoint."""
    every = ["--batch", "64", "--stop_after_steps", "4", "--knn.every_steps", "4"]
    every += ["--signals.features_every", "4", "--signals.attention_every", "4"]
    stages = {
        "zero1": ds("zero1_adamw_bf16"),
        "zero2": ds("zero1_adamw_bf16", "--ds", "zero_optimization.stage=2"),
        "zero3": ds("zero3_lamb_bf16"),
    }
    commands = {name: [*every, *shards, *flags] for name, flags in stages.items()}
    outcomes = run_on_fake_gpu(run_all, str(tmp_path), commands, 8)
    for name, outcome in outcomes.items():
        assert outcome.status == 0, outcome.output[-4000:]
        assert outcome.mistakes == [] and outcome.retries == 0
        # batch norm of the heads in both directions, keys, loss, gradient, norms, preemption
        assert 0 < outcome.collectives <= (400 if name == "zero3" else 60), name
        assert outcome.syncs[2] <= most_syncs(name), (name, outcome.syncs)


# ---------------------------------------------------------------------------------------- memory

PLANNED = re.compile(r"memory ([\d.]+) GiB planned, ([\d.]+) measured \([^;]*; ([\d.]+) reserved\)")


def train_unsaved(folder: str, flags: Sequence[str]) -> Outcome:
    """A run without its checkpoint, which would be gigabytes."""
    from unittest import mock

    from mocov3_ds.training.run import Run

    with mock.patch.object(Run, "save_checkpoint"):
        return run_all(folder, {"run": flags}, 1)["run"]


@pytest.mark.parametrize(
    ("recipe", "batch", "gpu", "in_chunks"),
    [
        ("vit_s16", 128, FakeGpu(), False),
        # another process has a third of the card
        ("vit_b16", 128, FakeGpu(memory_gb=23.6, held_gb=8, capability=(8, 9)), True),
    ],
)
def test_what_the_allocator_reserves_is_what_was_planned(
    tmp_path: Path, shards: list[str], recipe: str, batch: int, gpu: FakeGpu, in_chunks: bool
) -> None:
    flags = ["--recipe", recipe, "--batch", str(batch), *shards[:2], "--stop_after_steps", "3"]
    outcome = run_on_fake_gpu(train_unsaved, str(tmp_path), [*flags, "--knn.probes", "0"], gpu=gpu)
    judge(recipe, outcome, MOST_SYNCS)
    assert ("each view in one pass" in outcome.output) is not in_chunks
    found = PLANNED.search(outcome.output)
    assert found is not None, outcome.output[-2000:]
    planned, measured, reserved = map(float, found.groups())
    assert measured <= reserved <= gpu.memory_gb - gpu.held_gb
    assert abs(measured / planned - 1) < PLAN_BOUND and abs(reserved / planned - 1) < PLAN_BOUND
