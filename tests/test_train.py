"""The real command as a subprocess: it runs, stops, resumes bit for bit, and says what is wrong."""

import contextlib
import copy
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mocov3_ds import train
from mocov3_ds.monitoring.metrics_file import read_rows
from mocov3_ds.recipes import parse
from mocov3_ds.training.advance import advance_run
from mocov3_ds.training.build import build_run
from tests.data.sets import make_set, picture
from tests.ranks_pool import run_ranks

ROOT = Path(__file__).parents[1]
TRAIN = str(ROOT / "mocov3_ds" / "train.py")
BIN = Path(sys.executable).parent
SMALL = [
    *("--batch", "16", "--epochs", "4", "--warmup_epochs", "1", "--views.image_size", "16"),
    *("--model.dim", "24", "--model.depth", "2", "--model.heads", "2", "--model.hidden", "32"),
    *("--model.out", "16", "--data.threads", "2", "--data.lanes", "4", "--save.every_steps", "2"),
    *("--knn.every_steps", "3", "--knn.probes", "30", "--knn.bank", "32"),
]
_OF_THE_CLOCK = {"images_per_s", "cpu_s", "data_wait_s", "save_s", "memory_gib"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that name a training set of 50 samples (3 steps an epoch, 2 left over) and probes."""
    folder = tmp_path_factory.mktemp("shards")
    make_set(str(folder / "train"), [20, 7, 23])
    make_set(str(folder / "probes"), [33])
    return [
        *("--data.shards", str(folder / "train")),
        *("--data.probe_shards", str(folder / "probes")),
    ]


def environment() -> dict[str, str]:
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **settings, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def start(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,  # the run without arguments takes two minutes of a quiet core
        check=False,
    )


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Metrics without what the clock decides."""
    rows = read_rows(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in _OF_THE_CLOCK} for row in rows]


def digests_of(run: Path) -> dict[str, str]:
    """sha256 of each file of the newest checkpoint."""
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    files: dict[str, str] = json.loads((folder / "state.json").read_text())["files"]
    return files


def test_stop_and_the_same_command_again_equal_an_unbroken_run(
    tmp_path: Path, shards: list[str]
) -> None:
    command = [sys.executable, TRAIN, *SMALL, *shards]
    unbroken = start([*command, "--name", "unbroken"], tmp_path)
    assert unbroken.returncode == 0, unbroken.stderr
    said = unbroken.stdout + unbroken.stderr
    for words in ("k-NN of the random initialisation", "finished; checkpoint in", "mocov3 export"):
        assert words in said
    run = tmp_path / "runs/unbroken"
    rows = rows_of(run)
    assert [row["step"] for row in rows] == list(range(13))
    assert {"loss", "chance_loss", "lr", "momentum", "grad_norm"} <= {*rows[1]}
    assert {"knn_full", "knn_chance"} <= {*rows[0]}
    assert "knn" in rows[3]
    assert "knn_full" in rows[12]
    assert list((run / "tensorboard").iterdir())

    for stop in ("5", "7"):  # behind a checkpoint, and in the middle of an epoch
        part = start([*command, "--name", "broken", "--stop_after_steps", stop], tmp_path)
        assert part.returncode == 0, part.stderr
        assert f"stopped at step {stop} of 12" in part.stdout
    rest = start([*command, "--name", "broken"], tmp_path)
    assert rest.returncode == 0, rest.stderr
    again = [
        {k: v for k, v in row.items() if k != "knn_full"}
        for row in rows_of(tmp_path / "runs/broken")
    ]
    assert again == [{k: v for k, v in row.items() if k != "knn_full"} for row in rows]
    assert digests_of(tmp_path / "runs/broken") == digests_of(run)

    finished = start([*command, "--name", "broken"], tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "finished" in finished.stdout
    assert digests_of(tmp_path / "runs/broken") == digests_of(run)


def outcomes(folder: str, command_lines: list[list[str]]) -> list[tuple[int, str]]:
    """Exit status and last words of the real entry point, one rank, for each command line."""
    os.chdir(folder)
    found = []
    for command_line in command_lines:
        words = io.StringIO()
        sys.argv = ["train.py", *command_line]
        with contextlib.redirect_stderr(words), contextlib.redirect_stdout(words):
            try:
                status = train.main()
            except SystemExit as end:  # tyro's own, or with words: status 1
                status = end.code if isinstance(end.code, int) else 1
                words.write("" if isinstance(end.code, int) else str(end.code))
        found.append((status, words.getvalue()))
    return found


def test_bad_input_gets_one_sentence_and_leaves_everything_as_it_was(
    tmp_path: Path, shards: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    make_set(str(tmp_path / "few"), [9])
    taken = tmp_path / "runs/taken"
    taken.mkdir(parents=True)
    (taken / "config.json").write_text('{"config": {"batch": 99}, "deepspeed": {}}')
    good = [*SMALL, *shards]
    cases = [
        (["--recipe", "vit_b", *good], "no recipe 'vit_b' (did you mean vit_b16?)"),
        ([*good, "--bacth", "8"], "bacth"),
        ([*good, "--batch", "eight"], "batch"),
        ([*good, "--data.shards", "nowhere"], "nowhere holds no manifest.json"),
        ([*good, "--data.shards", "empty"], "empty holds no manifest.json"),
        (
            [*SMALL, "--data.shards", "few"],
            "few holds 9 samples, fewer than one global batch of 16",
        ),
        (["--recipe", "vit_s16"], "recipe vit_s16 needs images: --data.images FOLDER"),
        ([*good, "--ds", "optimizer.type=SGDM"], "optimizer type 'SGDM' is unknown"),
        ([*good, "--ds", "optimizer.params.lamda=1"], "has no parameter 'lamda'"),
        ([*good, "--ds", "train_batch_size=32"], "train_batch_size = 32, but --batch 16"),
        ([*good, "--views.image_size", "20"], "image size 20 is not a multiple of the patch"),
        ([*good, "--views.crop_min", "1.5"], "crops from 1.5 to 1.0 of the image area"),
        ([*good, "--model.patch_lr", "2"], "--model.patch_lr 2.0 cannot be; it must be 0 to 1"),
        ([*good, "--chunk", "-1"], "--chunk -1 cannot be; it must be 0 or more"),
        ([*good, "--keep_chunks", "2"], "--keep_chunks 2 has no effect without --chunk"),
        ([*good, "--deepspeed_config", "none.json"], "there is no DeepSpeed config none.json"),
        ([*good, "--name", "taken"], "holds another run: batch is 99 there, 16 here"),
    ]
    found = run_ranks(1, outcomes, str(tmp_path), [case for case, _ in cases])[0]
    for (command_line, words), (status, said) in zip(cases, found, strict=True):
        assert status == 2, (command_line, said)
        assert words in said.replace("\n", " "), (command_line, said)
        assert "Traceback" not in said, said
    assert (taken / "config.json").read_text() == '{"config": {"batch": 99}, "deepspeed": {}}'
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["taken"]


def test_colour_work_in_the_decode_threads_trains_the_same(
    tmp_path: Path, shards: list[str]
) -> None:
    good = [*SMALL, *shards, "--stop_after_steps", "2"]
    ways = ["device", "threads"]
    cases = [[*good, "--name", way, "--views.colour", way] for way in ways]
    assert [status for status, _ in run_ranks(1, outcomes, str(tmp_path), cases)[0]] == [0, 0]
    device, threads = ([r["loss"] for r in rows_of(tmp_path / "runs" / way)[1:]] for way in ways)
    assert device == pytest.approx(threads, rel=1e-6)  # fp32 operations in another order


def broken_picture(number: int) -> bytes:
    data: bytes = picture(number)
    return data[:-40] if number == 4 else data


def test_an_unreadable_sample_is_listed_and_stops_the_run_beyond_the_budget(
    tmp_path: Path, shards: list[str]
) -> None:
    make_set(str(tmp_path / "some"), [20, 12], image=broken_picture)
    command = [*SMALL, "--data.shards", "some", "--knn.probes", "0", "--stop_after_steps", "4"]
    patient = [*command, "--name", "patient", "--data.max_bad_samples", "1"]
    halves = [[*patient, "--name", "halves", "--stop_after_steps", step] for step in ("2", "4")]
    cases = [command, patient, *halves]
    (stopped, words), *others = run_ranks(1, outcomes, str(tmp_path), cases)[0]
    assert stopped == 1
    assert "train.py: error: rank 0, step" in words
    assert "t-000.tar" in words
    assert [status for status, _ in others] == [0, 0, 0]
    listed = (tmp_path / "runs/patient/bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in listed] == ["img4.jpg"]
    rows = rows_of(tmp_path / "runs/patient")
    assert sum(row["stand_ins"] for row in rows if row["step"]) == 2  # met once in each epoch
    assert rows_of(tmp_path / "runs/halves") == rows


def failure_beside_a_slow_mirror(folder: str, command: list[str]) -> tuple[int, str, bool]:
    """Status and words of a run that fails at step 5, and whether it waited for the mirror."""
    from mocov3_ds.checkpoints import mirror
    from mocov3_ds.training import advance

    released, waited = threading.Event(), threading.Event()

    def copy(*_: Any, **__: Any) -> None:
        if not released.wait(300):
            waited.set()

    next_batch = advance.next_batch

    def fails(job: Any) -> Any:
        if job.step == 4:
            raise SystemExit("step 5: no more data")
        return next_batch(job)

    mirror.copy_checkpoint = copy
    advance.next_batch = fails
    ((status, words),) = outcomes(folder, [command])
    released.set()
    return status, words, waited.is_set()


def test_a_run_that_fails_says_so_before_its_mirror_is_done(
    tmp_path: Path, shards: list[str]
) -> None:
    command = [*SMALL, *shards, "--knn.probes", "0", "--save.mirror", str(tmp_path / "mirror")]
    status, words, waited = run_ranks(
        1, failure_beside_a_slow_mirror, str(tmp_path), command, timeout=600
    )[0]
    assert status == 1
    assert "train.py: error: step 5: no more data" in words
    assert not waited
    assert (tmp_path / "runs/tiny/checkpoints/latest").read_text() == "step-00000004\n"


def queues_of_a_step(folder: Path, flags: list[str]) -> list[bool]:
    """Whether each k-NN queue holds what its encoder makes of view 1."""
    run = build_run(parse([*flags, "--runs", str(folder)]), torch.device("cpu"))
    advance_run(run)
    base = copy.deepcopy(run.base.backbone)  # as it is before the step that is looked at
    step = advance_run(run)
    train.update_knn_monitor(run, step)
    run.close()
    monitor, momentum = run.knn_monitor, run.momentum_encoder.backbone
    assert monitor is not None and monitor.momentum_queue is not None
    assert not torch.allclose(base(step.x1_BCHW), momentum(step.x1_BCHW), rtol=1e-4)
    return [
        torch.allclose(queue.filled()[0], backbone(step.x1_BCHW), rtol=1e-5, atol=1e-6)
        for queue, backbone in ((monitor.queue, base), (monitor.momentum_queue, momentum))
    ]


def test_both_knn_queues_are_fed_the_same_view(tmp_path: Path, shards: list[str]) -> None:
    flags = [*SMALL, *shards, "--warmup_epochs", "0"]
    assert run_ranks(1, queues_of_a_step, tmp_path, flags) == [[True, True]]


LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port"],
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port"],
    "accelerate": ["accelerate", "launch", "--cpu", "--num_processes", "1", "--main_process_port"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(tmp_path: Path, shards: list[str], launcher: str, free_port: int) -> None:
    command = [*LAUNCHERS[launcher], str(free_port), TRAIN, *SMALL, *shards]
    done = start([*command, "--stop_after_steps", "2"], tmp_path)
    assert done.returncode == 0, done.stderr
    ranks = 1 if launcher == "accelerate" else 2
    assert f"on {ranks} rank" in done.stdout + done.stderr
    assert [row["step"] for row in rows_of(tmp_path / "runs/tiny")] == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("asks", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_with_a_checkpoint(
    tmp_path: Path, shards: list[str], asks: signal.Signals
) -> None:
    command = [
        sys.executable,
        TRAIN,
        *SMALL,
        *shards,
        "--epochs",
        "200",
        "--save.every_steps",
        "9999",
    ]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    run = tmp_path / "runs/tiny"
    deadline = time.monotonic() + 240
    while len(rows_of(run)) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(asks)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "stopped at step" in said
    step = rows_of(run)[-1]["step"]
    assert (run / "checkpoints/latest").read_text().strip() == f"step-{step:08d}"


def kill_with_children(process: subprocess.Popen[bytes]) -> None:
    """Launcher and ranks at once; torchrun puts its ranks into sessions of their own."""
    launcher = psutil.Process(process.pid)
    family = [launcher, *launcher.children(recursive=True)]
    for member in family:
        member.suspend()  # so that none sees another die
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family[1:], timeout=30)


@pytest.mark.slow
def test_kill_9_of_two_ranks_then_the_same_command_again(
    tmp_path: Path, shards: list[str], free_port: int
) -> None:
    launch = ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port), TRAIN]
    command = [*launch, *SMALL, *shards, "--epochs", "12"]
    whole = start([*command, "--name", "whole"], tmp_path)
    assert whole.returncode == 0, whole.stderr
    command += ["--name", "killed"]
    metrics = tmp_path / "runs/killed/metrics.jsonl"
    for rows in (5, 20):
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 240
        while not (metrics.exists() and metrics.read_text().count("\n") > rows):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        kill_with_children(process)
    rest = start(command, tmp_path)
    assert rest.returncode == 0, rest.stderr
    assert rows_of(tmp_path / "runs/killed") == rows_of(tmp_path / "runs/whole")
    assert digests_of(tmp_path / "runs/killed") == digests_of(tmp_path / "runs/whole")


@pytest.mark.slow
def test_the_run_without_arguments_learns(tmp_path: Path, free_port: int) -> None:
    done = start(["deepspeed", "--master_port", str(free_port), TRAIN], tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "runs/tiny/metrics.jsonl")
    random_weights, chance = rows[0]["knn_full"], rows[0]["knn_chance"]
    # 10 points are 8 standard errors of an accuracy on 1000 probes
    assert rows[-1]["knn_full"] > random_weights + 10
    assert random_weights > chance - 5
    assert any("knn" in row for row in rows[1:-1])
