"""What is said of cards that cannot be used, or not for this: one sentence and a status each."""

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from data_prep.drawn_samples import ensure_samples
from tests.fake_gpu.card import FakeGpu
from tests.fake_gpu.process import run_on_fake_gpu

pytestmark = pytest.mark.slow

End = tuple[int, str, str]
"""status, last line, whole output"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of two small steps."""
    folder = tmp_path_factory.mktemp("samples")
    train, _ = ensure_samples(folder / "samples", {"train": 64, "test": 16})
    small = ["--batch", "16", "--knn.probes", "0", "--stop_after_steps", "2"]
    return [*small, "--data.shards", train, "--runs", str(folder / "runs")]


def run_each(
    commands: Mapping[str, Sequence[str]], changes: Mapping[str, str] | None = None
) -> dict[str, End]:
    """How trainers with these flags end, in one process."""
    from tests.fake_gpu import inside

    os.environ |= changes or {}
    ends = {}
    for name, arguments in commands.items():
        finished = inside.train([*arguments, "--name", name])
        ends[name] = (finished.status, finished.last_line, finished.output)
    return ends


def test_an_old_driver_ends_the_run_and_the_cpu_can_be_insisted_on(flags: list[str]) -> None:
    commands = {"old": flags, "insists": [*flags, "--device", "cpu"]}
    ends = run_on_fake_gpu(run_each, commands, gpu=FakeGpu(driver=12040))
    status, sentence, _ = ends["old"]
    assert status == 2
    assert "speaks CUDA 12.4" in sentence and "driver 580 or newer" in sentence
    assert "--device cpu" in sentence
    assert ends["insists"][0] == 0 and "on cpu" in ends["insists"][2]


def test_without_a_driver_only_a_run_of_days_is_refused(flags: list[str]) -> None:
    long = [*flags, "--recipe", "vit_s16", "--stop_after_steps", "0", "--epochs", "300000"]
    ends = run_on_fake_gpu(run_each, {"long": long, "short": flags}, gpu=FakeGpu(driver=0))
    status, sentence, _ = ends["long"]
    assert status == 2 and "no GPU is seen" in sentence and "days or more" in sentence
    assert ends["short"][0] == 0 and "on cpu" in ends["short"][2]


@pytest.mark.parametrize(
    ("capability", "said"),
    [
        ((7, 0), "has compute capability 7.0, and this torch"),
        ((7, 5), "has no bf16, which torch would emulate slowly; use --deepspeed_config"),
    ],
)
def test_a_card_without_kernels_or_without_bf16(
    flags: list[str], capability: tuple[int, int], said: str
) -> None:
    commands = {"bf16": [*flags, "--ds", "bf16.enabled=true"]}
    commands["fp16"] = [*flags, "--ds", "fp16.enabled=true"]
    ends = run_on_fake_gpu(run_each, commands, gpu=FakeGpu(capability=capability, name="Old Card"))
    status, sentence, _ = ends["bf16"]
    assert status == 2 and "Old Card" in sentence and said in sentence
    assert ends["fp16"][0] == (2 if capability == (7, 0) else 0), ends["fp16"][2][-2000:]


def test_a_card_without_fp8(flags: list[str]) -> None:
    fp8 = [*flags, "--ds", "bf16.enabled=true", "--model.fp8"]
    gpu = FakeGpu(capability=(8, 6), name="Old Card")
    status, sentence, _ = run_on_fake_gpu(run_each, {"fp8": fp8}, gpu=gpu)["fp8"]
    assert status == 2 and "Old Card has compute capability 8.6; leave the flag out" in sentence
    ends = run_on_fake_gpu(run_each, {"fp8": fp8}, gpu=FakeGpu(capability=(9, 0)))
    assert ends["fp8"][0] == 0, ends["fp8"][2][-2000:]


def test_more_ranks_than_cards(flags: list[str]) -> None:
    ranks_of = {"RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "8"}
    ranks_of |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    ends = run_on_fake_gpu(run_each, {"sixth": flags}, ranks_of, gpu=FakeGpu(count=2))
    status, sentence, _ = ends["sixth"]
    assert status == 2
    assert "LOCAL_RANK=5, but this process sees 2 devices: start at most 2 ranks" in sentence


def use_usable_card(flags: list[str]) -> dict[str, Any]:
    """One card a task, the CPU beside a good card, and a card that fills up in the third step."""
    import torch

    from mocov3_ds.distributed import ranks
    from tests.fake_gpu import inside

    os.environ["LOCAL_RANK"] = "3"
    found: dict[str, Any] = {"one card": str(ranks.this_device())}
    del os.environ["LOCAL_RANK"]

    def fill_card(step: int) -> None:
        if step == 2:
            torch.cuda.empty_cache()
            inside.set_card("HELD_GB", 79.0)

    full = inside.train([*flags, "--name", "full"], before_step=fill_card)
    found["full"] = (full.status, full.last_line, len(full.steps))
    ranks.stop()
    with inside.counted() as use:
        cpu = inside.train([*flags, "--name", "cpu", "--device", "cpu"])
    found["cpu"] = (cpu.status, cpu.output, use.launches)
    return found


def test_one_card_a_task_a_full_card_and_the_cpu_beside_a_card(flags: list[str]) -> None:
    found = run_on_fake_gpu(use_usable_card, flags)
    assert found["one card"] == "cuda:0"
    status, sentence, steps = found["full"]
    assert (status, steps) == (1, 2)
    assert "out of memory" in sentence and "--chunk" in sentence
    assert "other programs hold 79.0 GiB of the card: end them" in sentence
    status, output, launches = found["cpu"]
    assert status == 0 and "on cpu" in output and launches == 0


def test_without_a_compiler_the_torch_kernels_are_used(tmp_path: Path, flags: list[str]) -> None:
    changes = {"FAKE_GPU_TRITON": "real", "PATH": "/nonexistent"}
    changes |= {"TRITON_CACHE_DIR": str(tmp_path), "CC": "", "TRITON_HOME": str(tmp_path)}
    ends = run_on_fake_gpu(run_each, {"slow": flags}, changes=changes)
    status, _, output = ends["slow"]
    assert status == 0, output[-4000:]
    assert output.count("Triton cannot be used") == 1
    assert "install gcc and Python's headers (python3-dev)" in output


def train_beside_another(flags: list[str], meeting: str, name: str) -> End:
    """How a run ends that has planned with memory which another one has planned with as well."""
    from tests.fake_gpu import inside

    def wait_for_the_other(step: int) -> None:
        Path(meeting, f"{name}-{step}").touch()
        deadline = time.monotonic() + 120
        while len(list(Path(meeting).glob(f"*-{step}"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
            if list(Path(meeting).glob("ended-*")):
                return

    ended = inside.train([*flags, "--name", name], before_step=wait_for_the_other)
    Path(meeting, f"ended-{name}").touch()
    return ended.status, ended.last_line, ended.output


def test_two_runs_on_one_card_do_not_both_fit(tmp_path: Path, flags: list[str]) -> None:
    """Each finds the card nearly free and plans to fill it; who comes too late says so and ends."""
    many = [*flags, "--batch", "64"]
    card = FakeGpu(memory_gb=0.4)
    changes = {"FAKE_GPU_CARD": str(tmp_path / "card")}
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(
                run_on_fake_gpu, train_beside_another, many, str(tmp_path), name,
                gpu=card, changes=changes,
            )
            for name in ("first", "second")
        ]  # fmt: skip
        ends = [run.result() for run in runs]
    failed = [(status, line, output) for status, line, output in ends if status]
    assert failed, [output[-1000:] for _, _, output in ends]
    for status, line, output in failed:
        assert status == 1 and "out of memory" in line and "--chunk" in line, line
        assert "Traceback" not in output
