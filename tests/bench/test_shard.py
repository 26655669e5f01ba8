"""The sharding benchmark: every variant runs on a small source, and its nested tar is one."""

from pathlib import Path

import pytest

from data_prep.sources import list_images
from mocov3_ds.bench import shard
from tests.data.pictures import encode_image, picture


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for number, label in enumerate(("cat", "cat", "dog", "dog")):
        (tmp_path / "source" / label).mkdir(parents=True, exist_ok=True)
        content = encode_image(picture(40, 50, number))
        (tmp_path / "source" / label / f"{number}.jpg").write_bytes(content)
    return tmp_path / "source"


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
def test_each_variant_has_a_row(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = shard.ShardBenchOptions(
        source=str(source), images=20, resized=10, nested=100, rounds=1
    )
    shard.run_bench(options)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| ") and "---" not in line]
    assert len(rows) == 3 + 3 + 5 + 3  # three heads
    assert all(float(row[1]) >= 0 for row in rows if row[1].strip() != "ms")


def test_the_nested_tar_has_its_images(tmp_path: Path) -> None:
    listing = list_images(str(shard.write_nested_tar(tmp_path / "nested.tar", 300)))
    assert len(listing) == 300
    assert len({name.rpartition("/")[0] for name in listing.names}) == 100


def test_images_are_repeated(source: Path, tmp_path: Path) -> None:
    listing = list_images(str(source))
    tree = shard.copy_images(listing, tmp_path / "tree", 10)
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    assert len(files) == 10
    assert len({path.read_bytes() for path in files}) == len(listing)
