"""The storage benchmark: mixing is counted right, and its own clients read all of a set."""

import json
from pathlib import Path

import numpy as np
import pytest

from mocov3_ds.bench import storage
from mocov3_ds.data import manifest as manifests


def test_mixing_by_hand() -> None:
    in_order = storage.measure_mixing(np.arange(4000).reshape(4, 1000), shards=4)
    assert in_order.shards_in_batch == 1
    assert in_order.same_shard == 1
    assert in_order.neighbours_together == pytest.approx(1, abs=1e-3)
    # batch b has each fourth sample: 250 of each shard, and no two neighbours
    strided = storage.measure_mixing(np.arange(4000).reshape(1000, 4).T, shards=4)
    assert strided.shards_in_batch == 4
    assert strided.same_shard == pytest.approx(249 / 999)
    assert strided.neighbours_together == 0


def test_the_table_of_mixing(capsys: pytest.CaptureFixture[str]) -> None:
    storage.print_mixing(shards=8, batch=200, cases=((4, 1000),))
    rows = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines() if row]
    assert [row[0] for row in rows[3:]] == ["4", "all shuffled"]


@pytest.mark.parametrize("name", ["samples", "bytes"])
def test_each_client_reads_everything(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [bytes([number]) * (100 + number) for number in range(7)]
    storage.write_set(str(tmp_path), images, per_shard=3)
    assert len(manifests.load(str(tmp_path)).shards) == 3
    storage.run_client(name, str(tmp_path), "")
    seconds, total = json.loads(capsys.readouterr().out)
    assert seconds >= 0
    if name == "bytes":
        assert total > sum(map(len, images))
    else:
        assert total == sum(map(len, images))


def test_clients_that_are_missing_have_no_row() -> None:
    url, tars = "s3://bucket/set", ["s3://bucket/set/a.tar"]
    options = storage.StorageOptions(aws="/bin/aws", s3fs_python="/bin/python")
    every = storage.client_commands(options, url, "folder", tars)
    assert [name for name in every if name.startswith(("webdataset, pipe", "s3fs"))] == [
        "webdataset, pipe:aws s3 cp",
        "s3fs, 1 MB reads, no tar",
    ]
    few = storage.client_commands(storage.StorageOptions(), url, "folder", tars)
    assert "s3fs, 1 MB reads, no tar" not in few
