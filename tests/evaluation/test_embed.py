"""Features of a whole set: the same on one rank and on three, from shards and from a folder."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.fetch import read_sample
from mocov3_ds.distributed import ranks
from mocov3_ds.encoders.load import load_encoder
from mocov3_ds.evaluation.embed import embed_images
from mocov3_ds.evaluation.features import split_features
from mocov3_ds.evaluation.flags import EmbedOptions
from tests.evaluation.runs import SIZE, make_labelled_run
from tests.ranks_pool import run_ranks


def embed(folder: Path) -> list[str]:
    """What is said of a set of shards and of a folder, without the name of the file."""
    lines = []
    for images in ("train", "images"):
        out = folder / f"{images}-{ranks.world_size()}.npz"
        line = embed_images(folder / "run", str(folder / images), out, EmbedOptions(batch=7))
        lines.append(line.split(":")[1])
    return lines


def test_three_ranks_equal_one(tmp_path: Path) -> None:
    run = make_labelled_run(tmp_path)
    manifest = manifests.load(str(tmp_path / "train"))
    for sample_id in range(20):  # the same images, not sharded
        image_bytes = read_sample(manifest, sample_id)
        assert isinstance(image_bytes, bytes)
        path = tmp_path / f"images/c{sample_id // 7}/{sample_id:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes)
    features_GD, labels_G, ids_G = split_features(load_encoder(run), manifest, image_size=SIZE)
    lines = embed(tmp_path)
    ranks.stop()
    assert run_ranks(3, embed, tmp_path) == [lines] * 3
    for images, count, line in zip(("train", "images"), (61, 20), lines, strict=True):
        assert f"{count} rows of 32 features (fp32) of run (base encoder, step 7)" in line
        for world in (1, 3):
            with np.load(tmp_path / f"{images}-{world}.npz") as arrays:
                assert arrays["id"].tolist() == ids_G[:count].tolist()
                stored = torch.from_numpy(arrays["feature"])
                torch.testing.assert_close(stored, features_GD[:count], atol=1e-5, rtol=1e-5)
                if images == "train":
                    assert arrays["label"].tolist() == labels_G.tolist()
                    assert arrays["name"][30] == "t-001.tar/0"
                else:
                    assert arrays["label"].tolist() == [i // 7 for i in range(20)]
                    assert arrays["name"][8] == "c1/08.png"


def test_what_is_refused(tmp_path: Path) -> None:
    run, out = make_labelled_run(tmp_path), tmp_path / "x.npz"

    def refuses(sentence: str, images: str = "train", out: Path = out, **options: int) -> None:
        with pytest.raises(ValueError, match=sentence):
            embed_images(run, str(tmp_path / images), out, EmbedOptions(**options))

    refuses("must end in", out=tmp_path / "x.csv")
    refuses("there is no folder .*gone for --out", out=tmp_path / "gone/x.npz")
    refuses("there is no folder .* with images or shards", "nothing")
    refuses("batch must be 1 at least", batch=0)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no")
    refuses("1 unreadable images, more than --max_unreadable 0", "broken")
    assert not out.exists()
    out.write_text("mine")
    refuses(r"x\.npz exists; give another --out")
    assert out.read_text() == "mine"
