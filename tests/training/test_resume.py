"""A run goes on wherever it is started again: other ranks, stage, precision; after any kill."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from mocov3_ds import train
from mocov3_ds.checkpoints import run_folder
from mocov3_ds.checkpoints.checkpoint import Checkpoint
from mocov3_ds.data.loader import Batch
from mocov3_ds.distributed import ranks
from mocov3_ds.recipes import parse
from mocov3_ds.training import advance
from mocov3_ds.training.run import Run
from tests.checkpoints.test_run_folder import end, hold
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL, TRAIN, digests_of, environment, outcomes, rows_of, start

Ids = dict[int, list[int]]
"""step -> sorted ids of its global batch"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small run on a training set of 50 samples: 3 steps an epoch, 2 samples left over."""
    folder = str(tmp_path_factory.mktemp("shards") / "train")
    make_set(folder, [20, 7, 23])
    return [*SMALL, "--data.shards", folder, "--knn.probes", "0", "--save.keep", "9"]


# --------------------------------------------------------------------------------- another layout


@dataclass(frozen=True)
class Attempt:
    """A part of a run in a folder of its own, from a checkpoint of another folder's on."""

    name: str
    stage: int = 1
    precision: str = "fp32"
    source: str = "home"
    first: int = 0
    """step of that checkpoint; 0 = from the start"""
    last: int = 6

    @property
    def layout(self) -> list[str]:
        """Flags of the ZeRO stage and the precision."""
        bf16 = ["--ds", 'bf16={"enabled":true}'] if self.precision == "bf16" else []
        return ["--ds", f"zero_optimization.stage={self.stage}", *bf16]


def in_each_layout(prefix: str) -> list[Attempt]:
    """From home's checkpoint of step 2 to step 4, at each stage and precision."""
    return [
        Attempt(f"{prefix}-zero{stage}-{precision}", stage, precision, first=2, last=4)
        for stage in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
    ]


def train_attempts(folder: str, flags: list[str], attempts: list[Attempt]) -> list[Ids]:
    """Train each by the main command itself; what its global batches were."""
    os.chdir(folder)
    ids_by_attempt: list[Ids] = []
    next_batch = advance.next_batch

    def record_batch(run: Run) -> Batch:
        batch = next_batch(run)
        rank_ids = ranks.gather_objects(batch.sample_ids_B.tolist())
        ids_by_attempt[-1][run.step + 1] = sorted(i for ids in rank_ids for i in ids)
        return batch

    advance.next_batch = record_batch
    for attempt in attempts:
        ranks.run_on_first(partial(copy_start, attempt))
        ids_by_attempt.append({})
        end = ["--name", attempt.name, "--stop_after_steps", str(attempt.last)]
        train.train(parse([*flags, *attempt.layout, *end]))
    return ids_by_attempt


def run_attempts(
    world_size: int, folder: Path, flags: list[str], attempts: list[Attempt]
) -> list[Ids]:
    """The same on so many ranks: what the first of them saw."""
    return run_ranks(world_size, train_attempts, str(folder), flags, attempts, timeout=900)[0]


def copy_start(attempt: Attempt) -> None:
    """Make a folder as another run had left it when it was at a checkpoint."""
    if attempt.first:
        source, copy = Path("runs", attempt.source), Path("runs", attempt.name)
        checkpoint = f"checkpoints/step-{attempt.first:08d}"
        shutil.copytree(source / checkpoint, copy / checkpoint)
        for name in ("config.json", "metrics.jsonl"):
            shutil.copy(source / name, copy)


Read = Callable[[str], Tensor]


def distance(got: Read, want: Read, names: Iterable[str]) -> float:
    """Norm of the difference over all tensors."""
    return sum(float((got(n) - want(n)).double().square().sum()) for n in names) ** 0.5


def errors(folder: Path, name: str, step: int, since: int) -> dict[str, float]:
    """How far a run is from home at `step`, relative to home's way since `since`."""
    got, want, origin = (
        Checkpoint(folder / "runs" / run / f"checkpoints/step-{number:08d}")
        for run, number in ((name, step), ("home", step), ("home", since))
    )
    steps = "optimizer_steps"
    assert got.state_value(steps) == want.state_value(steps) == step
    moments = want.tensor_names("optimizer")
    assert got.tensor_names("optimizer") == moments
    trained = {key.partition("/")[2].removeprefix("base.") for key in moments}
    found = {"rest": 0.0}
    for group in ("base", "momentum"):
        names = want.tensor_names(group)
        assert got.tensor_names(group) == names
        ours, home, first = (partial(c.read_tensor, group) for c in (got, want, origin))
        moved = [n for n in names if n in trained]
        found[group] = distance(ours, home, moved) / distance(home, first, moved)
        found[f"{group} size"] = distance(ours, home, moved) / size_of(home, moved)
        for n in {*names} - trained:
            off = distance(ours, home, [n])
            if "running" in n:  # batch-norm statistics, of numbers that are about 1
                found["rest"] = max(found["rest"], off / home(n).numel() ** 0.5)
            else:
                assert off == 0, (name, group, n)  # frozen, or a count
    ours, home = (partial(c.read_tensor, "optimizer") for c in (got, want))
    return {**found, "moments": distance(ours, home, moments) / size_of(home, moments)}


def size_of(read: Read, names: list[str]) -> float:
    return distance(read, lambda name: torch.zeros_like(read(name)), names)


# Rounding: gradients differ by the order of fp32 sums (another number of ranks, of chunks) and by
# bf16 activations. Adam's moments are averages of gradients and of their squares and show just
# that. Its steps do not: where a gradient is nothing but rounding (the key's bias, what a batch
# norm takes out), its sign is chance and the weight still moves by the full rate. The momentum
# encoder follows what the engine computes with, so in bf16 the rounded weights; two steps move it
# by less than that rounding, and only its size is a measure.
BOUNDS = {
    "fp32": {"base": 0.1, "momentum": 0.1, "moments": 1e-4, "rest": 1e-4},
    "bf16": {"base": 0.5, "momentum size": 1e-4, "moments": 0.4, "rest": 0.01},
}


def check(folder: Path, attempt: Attempt, ids: Ids, home: Ids) -> None:
    """The same global batches as at home, and the same state within rounding."""
    steps = range(attempt.first + 1, attempt.last + 1)
    assert ids == {step: home[step] for step in steps}, attempt
    precision = "bf16" if "bf16" in attempt.name else "fp32"
    found = errors(folder, attempt.name, attempt.last, 2)
    for what, bound in BOUNDS[precision].items():
        assert found[what] <= bound, (attempt, what, found)


def test_other_stages_ranks_and_precisions_go_on(tmp_path: Path, flags: list[str]) -> None:
    two = [
        Attempt("home", stage=2, last=4),
        Attempt("two-zero3-fp32", 3, first=2, last=4),
        Attempt("two-zero1-bf16", 1, "bf16", first=2, last=4),
    ]
    home, *ids = run_attempts(2, tmp_path, flags, two)
    one = [Attempt("one-zero1-fp32", 1, first=2, last=4)]
    ids += run_attempts(1, tmp_path, flags, one)
    for attempt, found in zip([*two[1:], *one], ids, strict=True):
        check(tmp_path, attempt, found, home)


@pytest.mark.slow
def test_each_layout_goes_on_from_one_rank_and_back(tmp_path: Path, flags: list[str]) -> None:
    """1 <-> 1, 2 and 4 ranks, each with ZeRO 0 to 3 in fp32 and bf16."""
    there = {world_size: in_each_layout(f"{world_size}-ranks") for world_size in (1, 2, 4)}
    home, *ids = run_attempts(1, tmp_path, flags, [Attempt("home"), *there[1]])
    for world_size in (2, 4):
        ids += run_attempts(world_size, tmp_path, flags, there[world_size])
    attempts = [attempt for of_world in there.values() for attempt in of_world]
    back = [Attempt(f"from-{s.name}", source=s.name, first=4) for s in attempts]
    ids += run_attempts(1, tmp_path, flags, back)
    for attempt, found in zip([*attempts, *back], ids, strict=True):
        check(tmp_path, attempt, found, home)


# ------------------------------------------------------------------------------------ twenty kills

KILLS = 20


class Lives:
    """Two ranks under a launcher that starts them again whenever they are killed."""

    def __init__(self, command: list[str], folder: Path, run: Path) -> None:
        self.run, self._metrics = run, run / "metrics.jsonl"
        self._deadline = time.monotonic() + 2400
        self._former: set[int] = set()
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def until(self, come: Callable[[], bool], pause: float = 0.001) -> None:
        while not come():
            assert self.process.poll() is None, "the launcher has ended"
            assert time.monotonic() < self._deadline
            time.sleep(pause)

    def rows(self) -> int:
        return self._metrics.read_bytes().count(b"\n") if self._metrics.exists() else 0

    def inode(self) -> int:
        return self._metrics.stat().st_ino if self._metrics.exists() else 0

    def half_written(self) -> bool:
        return any((self.run / "checkpoints").glob("writing-*"))

    def next(self) -> list[int]:
        """Process ids of the ranks of the next life, when its first step begins."""
        found: list[int] = []
        inode = self.inode()

        def begun() -> bool:
            children = psutil.Process(self.process.pid).children()
            found[:] = [c.pid for c in children if c.pid not in self._former]
            # rows that will be done again have just been dropped, by a rename
            return len(found) == 2 and self.inode() != inode

        self.until(begun, 0.005)
        self._former |= {*found}
        return found

    def kill(self, victims: list[int]) -> None:
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        for pid in victims:
            self.until(partial(_is_dead, pid))


def _is_dead(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.mark.slow
def test_twenty_kills_change_no_number(tmp_path: Path, flags: list[str], free_port: int) -> None:
    chance = random.Random(7)
    launch = ["torchrun", "--nproc-per-node", "2", "--monitor-interval", "0.1"]
    command = [TRAIN, *flags, "--epochs", "60", "--save.every_steps", "3", "--save.keep", "1"]
    whole = start([*launch, "--master-port", str(free_port), *command, "--name", "whole"], tmp_path)
    assert whole.returncode == 0, whole.stderr

    again = ["--max-restarts", "40", "--master-port", str(free_port)]
    run = tmp_path / "runs/killed"
    lives = Lives([*launch, *again, *command, "--name", "killed"], tmp_path, run)
    in_first_step = in_write = alone = kills = 0
    try:
        while kills < KILLS or in_write < 2 or in_first_step < 2:
            assert kills < 2 * KILLS
            victims = lives.next()
            rows = lives.rows()
            moment = ("first step", "write", "later")[kills % 3]
            if moment == "write":
                wanted = rows + chance.randrange(3)
                lives.until(lambda: lives.rows() >= wanted and lives.half_written(), 0)  # noqa: B023
            elif moment == "later":
                wanted = rows + 1 + chance.randrange(5)
                lives.until(lambda: lives.rows() >= wanted)  # noqa: B023
            time.sleep(chance.random() * (0.005 if moment == "write" else 0.03))
            if chance.random() < 0.2:
                victims = [chance.choice(victims)]
                alone += 1
            lives.kill(victims)
            kills += 1
            in_first_step += moment == "first step" and lives.rows() == rows
            in_write += lives.half_written()
        assert lives.process.wait(timeout=600) == 0
    finally:
        end_family(lives.process)
    print(f"{kills} kills: {in_first_step} in a first step, {in_write} in a write, {alone} alone")
    assert alone
    assert rows_of(run) == rows_of(tmp_path / "runs/whole")
    assert digests_of(run) == digests_of(tmp_path / "runs/whole")
    assert not lives.half_written()


def end_family(process: subprocess.Popen[bytes]) -> None:
    """A launcher and its ranks, whatever state they are in."""
    if process.poll() is None:
        launcher = psutil.Process(process.pid)
        for member in [launcher, *launcher.children(recursive=True)]:
            member.kill()
    process.wait()


# -------------------------------------------------------------------- other machines, other trouble


def started(folder: str, command_lines: list[list[str]]) -> list[tuple[int, str]]:
    """Exit status and words of the main job for each command line, in one process."""
    run_folder.enter_folder = partial(run_folder.enter_folder, wait_s=0.2)
    return outcomes(folder, command_lines)


def test_a_fresh_machine_goes_on_from_the_mirror_bit_for_bit(
    tmp_path: Path, flags: list[str], s3: str
) -> None:
    mirrored = [*flags, "--name", "run", "--save.mirror", f"{s3}/{tmp_path.name}/run"]
    cases = [
        [*flags, "--name", "run", "--runs", "unbroken", "--stop_after_steps", "5"],
        [*mirrored, "--runs", "first", "--stop_after_steps", "3"],
        [*mirrored, "--runs", "second", "--stop_after_steps", "5"],
        [*mirrored, "--runs", "third", "--model.dim", "48"],
    ]
    *good, (status, words) = run_ranks(1, started, str(tmp_path), cases, timeout=600)[0]
    assert [status for status, _ in good] == [0, 0, 0], good
    unbroken, second = tmp_path / "unbroken/run", tmp_path / "second/run"
    of_store = "store_bytes"  # what came from object storage, here from the mirror
    assert [{**row, of_store: 0} for row in rows_of(second)] == [
        {**row, of_store: 0} for row in rows_of(unbroken)
    ]
    assert digests_of(second) == digests_of(unbroken)
    assert sorted(p.name for p in (second / "checkpoints").iterdir()) == [
        *("latest", "step-00000003", "step-00000004", "step-00000005")
    ]
    assert status == 2
    assert f"{s3}/{tmp_path.name}/run holds another run: model.dim is 24 there, 48" in words
    assert not (tmp_path / "third").exists()


def test_what_cannot_go_on_says_so_and_loses_nothing(tmp_path: Path, flags: list[str]) -> None:
    run = [*flags, "--stop_after_steps", "2"]
    made = [[*run, "--name", "one"], [*run, "--name", "other", "--model.dim", "48"]]
    assert [s for s, _ in run_ranks(1, started, str(tmp_path), made, timeout=600)[0]] == [0, 0]
    runs = tmp_path / "runs"
    for name in ("damaged", "busy"):
        shutil.copytree(runs / "one", runs / name)
    for file in runs.glob("damaged/checkpoints/*/base-0.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    shutil.rmtree(runs / "one/checkpoints")
    shutil.copytree(runs / "other/checkpoints", runs / "one/checkpoints")
    before = contents(runs)
    holder = hold(runs / "busy")
    try:
        cases = [[*run, "--name", name] for name in ("one", "damaged", "busy")]
        found = run_ranks(1, started, str(tmp_path), cases, timeout=600)[0]
    finally:
        end(holder)
    assert [status for status, _ in found] == [2, 2, 2], found
    one, damaged, busy = (words for _, words in found)
    assert "is of another model" in one
    assert "none of the 1 checkpoints of runs/damaged is whole" in damaged
    assert f"runs/busy is in use by process {holder.pid}" in busy
    assert contents(runs) == before


def contents(runs: Path) -> dict[str, bytes]:
    """Each file of a run but its lock."""
    files = [path for path in runs.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(runs)): path.read_bytes() for path in files}
