"""Kill -9 at any moment, run again: the same bytes as a run that nothing stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data_prep import forms


def program(*arguments):
    return [sys.executable, "-m", *map(str, arguments)]


def test_killed_at_random_moments_the_result_has_the_same_bytes(tmp_path):
    tree = forms.write_tree(tmp_path / "tree", forms.imagenet(20))
    (tree / "n01440764" / "broken.jpg").write_bytes(b"x")
    folder = tmp_path / "sets"
    command = program("tests.data_prep.killing", tree, folder, 20)
    done = subprocess.run(command, check=True, capture_output=True, timeout=300)
    finished = json.loads(done.stdout)
    assert len(finished) >= 20 and sum(0 < count < 31 for count in finished) >= 10
    wanted = forms.files_of(folder / "unbroken")
    assert "rejects.jsonl" in wanted and len(wanted) == 31 + 31 + 4
    rounds = [*folder.glob("round*")]
    assert rounds and all(forms.files_of(path) == wanted for path in rounds)


@pytest.mark.slow
def test_the_command_killed_with_and_without_its_workers(tmp_path):
    images = {f"{n % 3}/{n}.png": forms.picture(n, size=200, form="PNG") for n in range(150)}
    tree = forms.write_tree(tmp_path / "tree", images)

    def command(out):
        options = ("--resize", 64, "--shard-size", 3, "--workers", 2)
        return program("data_prep", "shard", tree, out, *options)

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True, timeout=240)
    wanted = forms.files_of(tmp_path / "whole")
    chance = random.Random(0)
    kills = 0
    while kills < 20:
        out = tmp_path / f"out{kills}"
        while True:
            before = len([*out.glob("receipts/*.json")])
            process = subprocess.Popen(command(out), start_new_session=True)
            deadline = time.monotonic() + 240
            more = chance.randint(1, 12)
            while len([*out.glob("receipts/*.json")]) < before + more and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.05))
            alone = chance.random() < 0.5
            if process.poll() is None:
                (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
            if process.wait() == 0:
                break
            kills += 1
            while group_lives(process.pid):  # workers end when their parent has
                assert time.monotonic() < deadline, "workers outlive a killed parent"
                time.sleep(0.01)
        assert forms.files_of(out) == wanted


def group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def children(process):
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


@pytest.fixture
def ctrl_c_is_heard():
    """Also where the tests run in the background of a script, whose commands are deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_is_heard")
@pytest.mark.parametrize("when", ["workers are starting", "three shards are finished"])
def test_ctrl_c_ends_in_one_sentence_and_the_next_run_goes_on(tmp_path, when):
    images = {f"{n % 3}/{n}.png": forms.picture(n, size=200, form="PNG") for n in range(150)}
    tree = forms.write_tree(tmp_path / "tree", images)
    out = tmp_path / "out"
    command = program(
        *("data_prep", "shard", tree, out, "--resize", 384, "--shard-size", 3, "--workers", 2)
    )

    def begun(process):
        if when == "workers are starting":
            return len(children(process)) > 2  # the resource tracker of Python is one
        return len([*out.glob("receipts/*.json")]) >= 3

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        deadline = time.monotonic() + 240
        while not begun(process):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=240)
    assert process.returncode == 130
    assert said == "data_prep: interrupted; the same command goes on from here.\n"
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0
    assert when == "workers are starting" or "finished before and are whole" in done.stdout
