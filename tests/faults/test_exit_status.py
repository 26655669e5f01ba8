"""Exit status and message of each kind of failure, and the real command under real launchers.

Under a launcher ranks are struck from outside: all of them end, and the same command goes on.
"""

import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
from torch.distributed import DistBackendError

from mocov3_ds.checkpoints.run_status import describe_status
from mocov3_ds.distributed import collective_errors, heartbeat, ranks
from mocov3_ds.faults import exit_status
from mocov3_ds.faults.preemption import AskedToStopError, Stop
from tests.data.sets import make_set
from tests.distributed.test_collective_errors import NCCL_MEMORY, OWN_FAULTS
from tests.test_train import LAUNCHERS, SMALL, TRAIN, broken_picture, environment, rows_of

AGAIN = r"[Tt]he same command continues from the newest checkpoint, (step-\d{8})\D"
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB\nmore")
DISK_FULL = OSError(28, "No space left on device", "runs/a")
FAILURES = [
    (ValueError("batch 7 cannot be."), 2, "batch 7 cannot be."),
    (DISK_FULL, 2, "[Errno 28] No space left on device: 'runs/a'"),
    (SystemExit("rank 1: shard-7.tar is damaged"), 1, "rank 1: shard-7.tar is damaged"),
    (FloatingPointError("step 9: the loss is nan"), 3, "step 9: the loss is nan"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (
        AskedToStopError("SIGTERM", 75),
        75,
        "asked to stop by SIGTERM before the first step of this start; nothing is lost",
    ),
    (
        OUT_OF_MEMORY,
        1,
        "out of memory (CUDA out of memory. Tried to allocate 7 GiB); a smaller --chunk helps.",
    ),
    (MemoryError(), 1, "out of memory (of the host); a smaller --chunk helps."),
    (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        1,
        "out of memory (CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling "
        "`cublasCreate(handle)`); a smaller --chunk helps.",
    ),
    (
        DistBackendError(NCCL_MEMORY),
        1,
        "out of memory (NCCL: unhandled cuda error (NCCL 2.30.7): Cuda failure 2 'out of memory'); "
        "a smaller --chunk helps.",
    ),
    (
        DistBackendError(OWN_FAULTS["NVIDIA/nccl#1410"][0]),
        2,  # no heart has begun to beat, so no collective has worked
        "NCCL: unhandled cuda error (NCCL 2.20.5): Cuda failure 1 'invalid argument'.",
    ),
    (
        DistBackendError(OWN_FAULTS["vllm-project/vllm#14537"][0]),
        2,
        "NCCL: unhandled system error (NCCL 2.21.5): Error while creating shared memory segment "
        "/dev/shm/nccl-EoOvZr (size 7340384); give the container more shared memory: docker run "
        "--shm-size=8g, or --ipc=host.",
    ),
    (KeyError("weight"), 1, "KeyError: 'weight'"),
]


@pytest.mark.parametrize(("error", "status", "sentence"), FAILURES)
def test_each_kind_of_failure_has_a_status_and_a_sentence(
    error: BaseException, status: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status.report_failure(error) == status
    output = capsys.readouterr().err
    assert output.splitlines()[-1] == f"train.py: error: {sentence}"
    # a fault of the program is reported with its traceback
    assert (len(output.splitlines()) > 1) == isinstance(error, KeyError)


def test_a_fault_of_nccl_in_a_run_that_beats_is_no_wrong_start(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It has worked before, so the same command may help: status 1, and no waiting for a peer."""
    heartbeat.start()
    try:
        error = DistBackendError(OWN_FAULTS["NVIDIA/nccl#1410"][0])
        with mock.patch.object(ranks, "world_size", lambda: 8):
            assert not collective_errors.is_peer_failure(error)
        assert exit_status.report_failure(error) == 1
    finally:
        heartbeat.stop()
    said = capsys.readouterr().err
    assert (
        "NCCL: unhandled cuda error (NCCL 2.20.5): Cuda failure 1 'invalid argument'. Once" in said
    )


@pytest.mark.parametrize("code", [0, 2, None])
def test_what_the_parser_has_said_is_not_said_again(code: int | None) -> None:
    with pytest.raises(SystemExit):
        exit_status.report_failure(SystemExit(code))


def test_a_lost_launcher_is_said_behind_the_save(capsys: pytest.CaptureFixture[str]) -> None:
    lost = Stop("rank 1: its launcher, torchrun (pid 7), is gone.", launcher_is_lost=True)
    assert exit_status.report_stop(lost, 0, "step-00000012") == 75
    assert capsys.readouterr().err == (
        "train.py: error: rank 1: its launcher, torchrun (pid 7), is gone. The same command "
        "continues from the newest checkpoint, step-00000012.\n"
    )
    asked = Stop("asked to stop by SIGTERM", launcher_is_lost=False)
    assert exit_status.report_stop(asked, 9, "step-00000012") == 9
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that name a training set of 50 samples, 3 steps an epoch."""
    folder = tmp_path_factory.mktemp("shards")
    make_set(str(folder / "train"), [20, 7, 23])
    return ["--data.shards", str(folder / "train"), "--knn.probes", "0"]


class Launched:
    """A launcher that was started with the real command, and the ranks below it."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.output, self.run = folder / "output", folder / "runs/tiny"
        with self.output.open("w") as file:
            self.launcher = subprocess.Popen(
                command, cwd=folder, env=environment(), stdout=file, stderr=subprocess.STDOUT
            )
        self.ranks: dict[int, psutil.Process] = {}

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 240
        while not (rows := rows_of(self.run)) or rows[-1]["step"] < step:
            assert self.launcher.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.05)
        for process in psutil.Process(self.launcher.pid).children(recursive=True):
            words = process.cmdline()
            if TRAIN in words[:3]:  # behind the interpreter: no launcher
                self.ranks[int(process.environ()["RANK"])] = process
        assert sorted(self.ranks) == [0, 1]

    def end(self) -> tuple[int, str]:
        """Exit status of the launcher and all output, once all have ended."""
        deadline = time.monotonic() + 240  # a quiet machine takes half a minute, a busy one longer
        try:
            status = self.launcher.wait(240)
        except subprocess.TimeoutExpired:
            below = psutil.Process(self.launcher.pid).children(recursive=True)
            states = [(process.pid, process.status(), process.cmdline()[:5]) for process in below]
            raise AssertionError(f"{states}\n{self.output.read_text()[-5000:]}") from None
        _, alive = psutil.wait_procs(self.ranks.values(), timeout=deadline - time.monotonic())
        assert not alive, self.output.read_text()
        return status, self.output.read_text()

    def clean_up(self) -> None:
        for process in self.ranks.values():
            if process.is_running():
                process.kill()
        self.launcher.kill()
        self.launcher.wait()


Launch = Callable[..., Launched]


@pytest.fixture
def launch(tmp_path: Path, free_port: int) -> Iterator[Launch]:
    """Starts the command under a launcher on two ranks; what still runs at the end is killed."""
    started = []

    def start(launcher: list[str], *flags: str) -> Launched:
        command = [*launcher, str(free_port), TRAIN, *SMALL, "--knn.every_steps", "0", *flags]
        started.append(Launched(command, tmp_path))
        return started[-1]

    yield start
    for launched in started:
        launched.clean_up()


DIED = r"rank {} \(host \S+, pid \d+\) died without a word in (step \d+, \w+|the start): killed"
SILENT = (
    r"rank {} \(host \S+, pid \d+\) has been silent for \d+ s in (step \d+, \w+|the start): "
    r"its process is"
)


def assert_names_newest(run: Path, sentence: str, *, exact: bool = True) -> None:
    """The exit message names the newest checkpoint; without rank 0, that of half a second ago."""
    named = re.search(AGAIN, sentence)
    assert named, sentence
    newest = (run / "checkpoints/latest").read_text().strip()
    assert named[1] == newest if exact else named[1] <= newest, sentence


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "struck", "by", "words"),
    [
        ("torchrun", 0, signal.SIGKILL, DIED.format(0)),
        ("deepspeed", 1, signal.SIGSTOP, SILENT.format(1)),
    ],
)
def test_a_rank_that_is_struck_is_named_and_the_same_command_goes_on(
    launch: Launch, shards: list[str], launcher: str, struck: int, by: signal.Signals, words: str
) -> None:
    launched = launch(LAUNCHERS[launcher], *shards, "--epochs", "3000")
    launched.wait_for_step(60)  # the others have heard of a checkpoint by then
    launched.ranks[struck].send_signal(by)
    status, said = launched.end()
    assert status != 0
    sentences = [line for line in said.splitlines() if line.startswith("train.py: error: ")]
    assert len(sentences) == 1, said
    assert re.search(words, sentences[0]), said
    assert_names_newest(launched.run, sentences[0], exact=False)
    reached = rows_of(launched.run)[-1]["step"]
    second = launch(LAUNCHERS[launcher], *shards, "--epochs", "3000")
    second.wait_for_step(reached + 1)
    assert [row["step"] for row in rows_of(launched.run)][: reached + 1] == list(
        range(1, reached + 2)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "by", "inner"),
    [
        ("torchrun", signal.SIGKILL, False),
        ("deepspeed", signal.SIGTERM, False),  # what systemd or a person does
        ("deepspeed", signal.SIGTERM, True),  # it passes the signal on to one rank after another
        ("deepspeed", signal.SIGKILL, True),  # what the out-of-memory killer does
        ("deepspeed", signal.SIGHUP, None),  # all of them, as a closed terminal does
    ],
)
def test_what_ends_a_launcher_lets_the_ranks_save(
    launch: Launch, shards: list[str], launcher: str, by: signal.Signals, inner: bool | None
) -> None:
    flags = ("--epochs", "3000", "--save.every_steps", "1000")
    launched = launch(LAUNCHERS[launcher], *shards, *flags)
    launched.wait_for_step(2)
    above = psutil.Process(launched.launcher.pid)
    (below,) = above.children() if launcher == "deepspeed" else (above,)
    struck = {False: [above], True: [below], None: [above, below, *launched.ranks.values()]}[inner]
    for process in struck:
        process.send_signal(by)
    status, said = launched.end()
    reached = rows_of(launched.run)[-1]["step"]
    assert (launched.run / f"checkpoints/step-{reached:08d}/state.json").exists(), said
    lost = [line for line in said.splitlines() if "is gone" in line and "error: " in line]
    asked = f"asked to stop by {by.name}: checkpoint runs/tiny/checkpoints/step-{reached:08d}"
    if by == signal.SIGTERM and inner:
        assert asked in said and not lost
    elif by == signal.SIGHUP and not lost:  # it came to the ranks before they missed a launcher
        assert asked in said
    else:
        assert len(lost) == 1, said
        assert_names_newest(launched.run, lost[0])
    assert status == (0 if (inner, by) == (True, signal.SIGKILL) else status)  # hence `status`
    assert describe_status(launched.run, wait_s=60)[0] == 1


@pytest.mark.slow
def test_unreadable_data_of_one_rank_ends_both(launch: Launch, tmp_path: Path) -> None:
    make_set(str(tmp_path / "some"), [20, 12], image=broken_picture)
    launched = launch(LAUNCHERS["deepspeed"], "--data.shards", "some", "--knn.probes", "0")
    status = launched.launcher.wait(240)
    said = launched.output.read_text()
    assert status == 1, said
    sentences = [line for line in said.splitlines() if line.startswith("train.py: error: ")]
    assert len(sentences) == 1, said
    assert re.search(r"rank [01], step [12]: 1 unreadable sample in \S*some, more", sentences[0]), (
        said
    )
    assert "t-000.tar" in sentences[0]
    assert "the same command starts from the beginning: there is no checkpoint yet" in sentences[0]


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again(launch: Launch, shards: list[str]) -> None:
    launcher = ["torchrun", "--max-restarts", "1", *LAUNCHERS["torchrun"][1:]]
    launched = launch(launcher, *shards, "--epochs", "8")
    launched.wait_for_step(4)
    launched.ranks[1].kill()
    status = launched.launcher.wait(240)
    said = launched.output.read_text()
    assert status == 0, said
    assert re.search(DIED.format(1), said), said
    assert "finished; checkpoint in" in said
    assert [row["step"] for row in rows_of(launched.run)] == list(range(1, 25))
