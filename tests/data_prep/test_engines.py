"""Who runs the tasks: a pool of processes or a Ray cluster; both survive what can be survived."""

import importlib.util
import json
import os
import signal
import subprocess
import sys

import pytest

from data_prep import engines
from data_prep.shard import make_shards
from data_prep.shard_options import ShardOptions
from data_prep.sources import list_images
from tests.data_prep import forms


def square(number):
    return number * number


def fail_at_three(number):
    if number == 3:
        raise ValueError("three")
    return number


def kill_itself(number):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_has_a_result(workers):
    tasks = iter(range(9))
    assert sorted(engines.process_pool(square, tasks, workers)) == [n * n for n in range(9)]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_task_raises_is_raised(workers):
    with pytest.raises(ValueError, match="three"):
        list(engines.process_pool(fail_at_three, range(9), workers))


def test_a_killed_worker_is_reported():
    with pytest.raises(ValueError, match="a worker process was killed, most likely for lack of"):
        list(engines.process_pool(kill_itself, range(3), 2))


def test_there_is_a_worker_for_each_core():
    assert 1 <= engines.default_workers() <= os.cpu_count()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra [ray]")
def test_a_node_killed_halfway_costs_nothing(tmp_path):
    images = {f"{n % 3}/{n}.png": forms.picture(n, size=160, form="PNG") for n in range(200)}
    tree = forms.write_tree(tmp_path / "tree", images)
    options = ShardOptions(shard_size="5", resize=48)
    make_shards(list_images(str(tree)), str(tmp_path / "pool"), options, workers=1, quiet=True)
    command = [sys.executable, "-m", "tests.data_prep.on_ray", tree, tmp_path / "ray"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert 8 <= report["killed_at"][0] < 40 and report["alive"] == 2
    assert forms.files_of(tmp_path / "ray") == forms.files_of(tmp_path / "pool")


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    tree = forms.write_tree(tmp_path / "tree", forms.imagenet(1))
    with pytest.raises(ValueError, match=r"pip install 'mocov3-ds\[ray\]'"):
        make_shards(
            list_images(str(tree)),
            str(tmp_path / "out"),
            ShardOptions(),
            workers=1,
            quiet=True,
            engine=engines.ray_cluster,
        )
