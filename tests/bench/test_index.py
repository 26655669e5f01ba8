"""The index benchmark: its made-up set is one that loads, and a table comes out."""

from pathlib import Path

import numpy as np
import pytest

from mocov3_ds.bench import index
from mocov3_ds.data import fetch
from mocov3_ds.data import manifest as manifests


def test_a_made_up_set_can_be_read(tmp_path: Path) -> None:
    index.make_set(str(tmp_path / "set"), 1000, per_shard=200)
    loaded = manifests.load(str(tmp_path / "set"))
    assert loaded.samples == 1000 and len(loaded.shards) == 5
    read = dict(fetch.read_samples(loaded, np.array([3, 203, 999])))
    assert read[0] == read[1] != read[2]


@pytest.mark.slow
def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index.run_bench(index.IndexBench(samples=20_000, batch=64, batches=1, folder=tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["rank 0", "rank 1"]
    assert not [*tmp_path.iterdir()]
