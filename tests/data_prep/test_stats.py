"""Classes and sizes of a set in numbers and in a picture."""

import numpy as np
from PIL import Image

from data_prep.shard import make_shards
from data_prep.shard_options import ShardOptions
from data_prep.sources import list_images
from data_prep.stats import draw_histograms, set_stats
from mocov3_ds.data import manifest
from mocov3_ds.data.manifest import Shard
from tests.data_prep import forms


def test_a_picture_of_many_classes(tmp_path):
    names = {f"{n:04d}/{n}.png": forms.picture(n, size=4, form="PNG") for n in range(900)}
    listing = list_images(str(forms.write_tree(tmp_path / "t", names)))
    make_shards(listing, str(tmp_path / "o"), ShardOptions(), workers=1, quiet=True)
    stats = set_stats(str(tmp_path / "o"))
    draw_histograms(stats, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size == (1440, 240)
        colours = picture.convert("RGB").getcolors(1 << 20)
    bars = sum(count for count, colour in colours if colour == (70, 110, 160))
    assert bars > 400 * 150, "900 equal classes fill their panel"
    assert "900 classes" in str(stats) and stats.as_json()["samples"] == 900


def test_the_numbers_are_those_of_the_manifest(tmp_path):
    index_N = np.zeros(4, manifest.ROW)
    index_N["offset"], index_N["size"] = 512, [10, 20, 30, 40]
    index_N["label"] = [0, 0, 2, -1]
    index_N["height"], index_N["width"] = [5, 7, 0, 9], [6, 6, 0, 3]  # the third is not known
    shards = [Shard("a.tar", 9000, 4, "0" * 64)]
    manifest.write(str(tmp_path), shards, index_N, classes=["cat", "dog"])
    stats = set_stats(str(tmp_path))
    assert stats.classes == {"cat": 2, "dog": 0, "2": 1} and stats.unlabelled == 1
    assert stats.short_N.tolist() == [5, 6, 3] and stats.long_N.tolist() == [6, 7, 9]
    assert stats.as_json()["image_bytes"] == [10, 13, 25, 37, 40]
    assert "3 classes: 0 (dog) to 2 (cat) samples each" in str(stats)
