"""The Ray engine makes the bytes that the process pool makes, also when a node dies halfway."""

import importlib.util
import json
import subprocess
import sys

import pytest

from data_prep import engines
from data_prep.shard import Options, shard
from data_prep.sources import open_source
from tests.data_prep import forms


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra [ray]")
def test_a_node_killed_halfway_costs_nothing(tmp_path):
    images = {f"{n % 3}/{n}.png": forms.picture(n, size=160, form="PNG") for n in range(200)}
    tree = forms.write_tree(tmp_path / "tree", images)
    options = Options(shard_size="5", resize=48)
    shard(open_source(str(tree)), str(tmp_path / "pool"), options, workers=1, quiet=True)
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
        shard(
            open_source(str(tree)),
            str(tmp_path / "out"),
            Options(),
            workers=1,
            quiet=True,
            engine=engines.ray_cluster,
        )
