"""A folder belongs to one run, and one process at a time works on it."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mocov3_ds.checkpoints import run_folder


def resolved(**changes: object) -> dict[str, object]:
    config = {"batch": 8, "epochs": 3, "model": {"dim": 16}, "data": {"threads": 1, "lanes": 4}}
    return {"config": {**config, **changes}, "deepspeed": {"optimizer": {"type": "AdamW"}}}


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_folder.claim_folder(run, resolved(), "data")
    run_folder.claim_folder(run, resolved(save={"keep": 9}), "data")  # decides no number
    run_folder.claim_folder(run, resolved(data={"threads": 7, "lanes": 4}), "data")
    before = (run / "config.json").read_text()
    with pytest.raises(ValueError, match=r"epochs is 3 there, 5 here.*--name .* --extend goes on"):
        run_folder.claim_folder(run, resolved(epochs=5), "data")
    with pytest.raises(ValueError, match=r"model\.dim is 16 there, 32 here.*started with\.$"):
        run_folder.claim_folder(run, resolved(model={"dim": 32}), "data")
    with pytest.raises(ValueError, match="training shards is data there, other here"):
        run_folder.claim_folder(run, resolved(), "other")
    assert (run / "config.json").read_text() == before
    assert json.loads(before)["data_digest"] == "data"


def test_a_knob_that_an_older_version_did_not_have_stands_at_its_default(tmp_path: Path) -> None:
    run_folder.claim_folder(tmp_path, resolved(), "data")
    run_folder.claim_folder(tmp_path, resolved(lr_schedule="cosine"), "data")
    with pytest.raises(ValueError, match="lr_schedule is cosine there, constant here"):
        run_folder.claim_folder(tmp_path, resolved(lr_schedule="constant"), "data")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compress": "4x"}, "compress is off there, 4x here"),
        ({"rate_rule": "sqrt"}, "rate_rule is linear there, sqrt here"),
        ({"moco": {"momentum_batch": 256}}, "moco.momentum_batch is 0 there, 256 here"),
        ({"model": {"dim": 16, "layer_scale": 0.1}}, "model.layer_scale is 0.0 there, 0.1 here"),
        ({"model": {"dim": 16, "sigma_reparam": True}}, "model.sigma_reparam is False there, True"),
    ],
)
def test_what_moves_the_numbers_of_a_run_stays(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    run_folder.claim_folder(tmp_path, resolved(), "data")
    with pytest.raises(ValueError, match=words):
        run_folder.claim_folder(tmp_path, resolved(**changes), "data")


def test_the_clip_of_a_run_stays(tmp_path: Path) -> None:
    run_folder.claim_folder(tmp_path, resolved(), "data")
    clipped = resolved() | {"deepspeed": {"optimizer": {"type": "AdamW", "clip": "adagc"}}}
    with pytest.raises(ValueError, match=r"optimizer\.clip is None there, adagc here"):
        run_folder.claim_folder(tmp_path, clipped, "data")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": 3}', "\xff"])
def test_a_damaged_config_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json of .* is damaged; move the folder away"):
        run_folder.enter_folder(tmp_path, resolved(), "data")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_what_signs_in_is_not_written(tmp_path: Path) -> None:
    addresses = {"shards": "http://me:SECRET@host/set?sig=HIDDEN&v=1", "threads": 1, "lanes": 4}
    run_folder.claim_folder(tmp_path / "run", resolved(data=addresses), "data")
    text = (tmp_path / "run/config.json").read_text()
    assert "SECRET" not in text and "HIDDEN" not in text
    assert json.loads(text)["config"]["data"]["shards"] == "http://host/set?sig=...&v=1"
    run_folder.claim_folder(tmp_path / "run", resolved(data=addresses), "data")  # the same run


@pytest.mark.parametrize("name", ["lock", "config.json.tmp", "config.json"])
def test_links_in_a_run_folder_are_not_followed(tmp_path: Path, name: str) -> None:
    theirs, run = tmp_path / "authorized_keys", tmp_path / "run"
    theirs.write_text("theirs")
    run.mkdir()
    (run / name).symlink_to(theirs)
    with contextlib.suppress(ValueError, OSError):
        run_folder.enter_folder(run, resolved(), "data")
    run_folder.unlock_folder(run)
    assert theirs.read_text() == "theirs"


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty and holds no config\.json"):
        run_folder.enter_folder(tmp_path, resolved(), "data")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


# --------------------------------------------------------------------------- one process at a time

HOLDER = """
import fcntl, json, os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX)
os.ftruncate(file, 0)
os.pwrite(file, sys.argv[2].encode() or json.dumps(
    {"host": sys.argv[3], "pid": os.getpid(), "since": "noon"}).encode(), 0)
print(flush=True)
sys.stdin.read()
"""


def hold(run: Path, content: str = "", host: str = "") -> subprocess.Popen[bytes]:
    """A process that holds a run's lock until it is killed."""
    run.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run / "lock"), content, host or socket.gethostname()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    with process:  # closes the pipes
        process.kill()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "run"
    run_folder.unlock_folder(tmp_path / "run")


def test_a_second_process_is_refused_and_changes_nothing(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_folder.claim_folder(run, resolved(), "data")
    holder = hold(run)
    try:
        words = (
            rf"in use by process {holder.pid} on {socket.gethostname()} since noon.*"
            rf"end it \(kill {holder.pid}; .*--name"
        )
        with pytest.raises(ValueError, match=words):
            run_folder.enter_folder(run, resolved(), "data", wait_s=0.3)
        assert "waiting 0 s for its end" in caplog.text
        assert json.loads((run / "lock").read_text())["pid"] == holder.pid
    finally:
        end(holder)
    run_folder.enter_folder(run, resolved(), "data")
    assert json.loads((run / "lock").read_text())["pid"] == os.getpid()
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "lock"]


def test_a_job_on_another_host_is_named(run: Path) -> None:
    holder = hold(run, host="node7")
    try:
        with pytest.raises(ValueError, match=rf"kill {holder.pid} on node7;"):
            run_folder.lock_folder(run, wait_s=0)
    finally:
        end(holder)


@pytest.mark.parametrize("content", ["not json", "{}", '{"host": 1, "pid": "x", "since": 0}'])
def test_a_holder_without_a_name(run: Path, content: str) -> None:
    holder = hold(run, content)
    try:
        with pytest.raises(ValueError, match="in use by another process"):
            run_folder.lock_folder(run, wait_s=0)
    finally:
        end(holder)


def test_a_predecessor_that_is_just_dying_is_waited_for(run: Path) -> None:
    holder = hold(run)
    killer = threading.Timer(0.3, holder.kill)
    killer.start()
    run_folder.lock_folder(run, wait_s=60)
    killer.join()
    end(holder)


def test_one_process_may_lock_again_and_let_go(run: Path) -> None:
    run_folder.lock_folder(run)
    run_folder.lock_folder(run)
    run_folder.unlock_folder(run)
    run_folder.unlock_folder(run)
    end(hold(run))


def test_a_forked_child_does_not_keep_the_lock(run: Path) -> None:
    run_folder.lock_folder(run)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(write)
        os.read(read, 1)  # until the parent closes its end
        os._exit(0)
    os.close(read)
    # the child's copy is closed before fork returns there, so at the latest when it reads
    run_folder.unlock_folder(run)
    run_folder.lock_folder(run, wait_s=30)
    os.close(write)
    os.waitpid(child, 0)


def test_a_folder_that_was_replaced_is_noticed(run: Path) -> None:
    run_folder.check_lock_held(run)
    run_folder.lock_folder(run)
    run_folder.check_lock_held(run)
    (run / "lock").unlink()
    with pytest.raises(ValueError, match="was removed or replaced"):
        run_folder.check_lock_held(run)
    (run / "lock").write_text("")
    with pytest.raises(ValueError, match="was removed or replaced"):
        run_folder.check_lock_held(run)


def test_a_file_system_without_locks_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    run_folder.lock_folder(run)
    assert "no locks here (No locks available); start no second process" in caplog.text
