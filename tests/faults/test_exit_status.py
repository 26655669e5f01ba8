"""The real command under real launchers, struck from outside: all ends, and the command goes on."""

import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.data.sets import make_set
from tests.test_train import LAUNCHERS, SMALL, TRAIN, broken_picture, environment, rows_of

pytestmark = pytest.mark.slow
AGAIN = "The same command continues from the newest checkpoint."


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
    for each in started:
        each.clean_up()


DIED = r"rank {} \(host \S+, pid \d+\) died without a word in (step \d+, \w+|the start): killed"
SILENT = (
    r"rank {} \(host \S+, pid \d+\) has been silent for \d+ s in (step \d+, \w+|the start): "
    r"its process is"
)


@pytest.mark.parametrize(
    ("launcher", "struck", "by", "words"),
    [
        ("torchrun", 1, signal.SIGKILL, DIED.format(1)),
        ("torchrun", 0, signal.SIGSTOP, SILENT.format(0)),
        ("deepspeed", 0, signal.SIGKILL, DIED.format(0)),
        ("deepspeed", 1, signal.SIGSTOP, SILENT.format(1)),
    ],
)
def test_a_rank_that_is_struck_is_named_and_the_same_command_goes_on(
    launch: Launch, shards: list[str], launcher: str, struck: int, by: signal.Signals, words: str
) -> None:
    job = launch(LAUNCHERS[launcher], *shards, "--epochs", "3000")
    job.wait_for_step(4)
    job.ranks[struck].send_signal(by)
    status, said = job.end()
    assert status != 0
    sentences = [line for line in said.splitlines() if line.startswith("train.py: error: ")]
    assert len(sentences) == 1, said
    assert re.search(words, sentences[0]), said
    assert sentences[0].endswith(AGAIN), said
    reached = rows_of(job.run)[-1]["step"]
    again = launch(LAUNCHERS[launcher], *shards, "--epochs", "3000")
    again.wait_for_step(reached + 1)
    assert [row["step"] for row in rows_of(job.run)][: reached + 1] == list(range(1, reached + 2))


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_ranks_do_not_outlive_their_launcher(
    launch: Launch, shards: list[str], launcher: str
) -> None:
    job = launch(LAUNCHERS[launcher], *shards, "--epochs", "3000")
    job.wait_for_step(2)
    job.launcher.kill()
    status, said = job.end()
    assert status == -signal.SIGKILL
    assert re.search(rf"its launcher, {launcher} \(pid {job.launcher.pid}\), is gone\.", said), said


def test_unreadable_data_of_one_rank_ends_both(launch: Launch, tmp_path: Path) -> None:
    make_set(str(tmp_path / "some"), [20, 12], image=broken_picture)
    job = launch(LAUNCHERS["deepspeed"], "--data.shards", "some", "--knn.probes", "0")
    status = job.launcher.wait(240)
    said = job.output.read_text()
    assert status == 1, said
    sentences = [line for line in said.splitlines() if line.startswith("train.py: error: ")]
    assert len(sentences) == 1, said
    assert re.search(r"rank [01], step [12]: 1 unreadable sample in some, more", sentences[0]), said
    assert "t-000.tar" in sentences[0]
    assert sentences[0].endswith(AGAIN)


def test_torchrun_starts_the_ranks_again(launch: Launch, shards: list[str]) -> None:
    launcher = ["torchrun", "--max-restarts", "1", *LAUNCHERS["torchrun"][1:]]
    job = launch(launcher, *shards, "--epochs", "8")
    job.wait_for_step(4)
    job.ranks[1].kill()
    status = job.launcher.wait(240)
    said = job.output.read_text()
    assert status == 0, said
    assert re.search(DIED.format(1), said), said
    assert "finished; checkpoint in" in said
    assert [row["step"] for row in rows_of(job.run)] == list(range(1, 25))
