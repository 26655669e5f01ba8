"""Commands on an encoder: what they print and write, beside a plain k-NN."""

import json
import sys
from pathlib import Path

import pytest
import torch

from mocov3_ds import cli
from mocov3_ds.data import manifest as manifests
from mocov3_ds.distributed import ranks
from mocov3_ds.encoders.load import load_encoder
from tests.evaluation.runs import make_run, make_splits


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mocov3", *map(str, arguments)])
    return cli.main()


def plain_knn(run: Path, train: str, val: str, k: int) -> float:
    """One vote at a time, features one image at a time."""
    from mocov3_ds.data.views.photometric import normalise_crops
    from mocov3_ds.data.views.spec import ViewSpec
    from mocov3_ds.evaluation.labelled_images import CentreCrop, draw_epoch_order, read_batches

    encoder, spec = load_encoder(run), ViewSpec()

    @torch.no_grad()
    def rows(url: str) -> list[tuple[torch.Tensor, int]]:
        manifest = manifests.load(url)
        order = draw_epoch_order(manifest.samples, 0, 0)
        found = []
        passes = [[place] for place in range(len(order))]
        for crop, label, _ in read_batches(manifest, CentreCrop(16), order, passes):
            feature = encoder(normalise_crops(crop, spec.mean, spec.std, torch.float32))[0]
            found.append((feature / feature.norm(), int(label)))
        return found

    bank, right = rows(train), 0
    probes = rows(val)
    for feature, target in probes:
        near = sorted(((float(feature @ row), label) for row, label in bank), reverse=True)[:k]
        votes = [sum(torch.tensor(s / 0.07).exp() for s, lb in near if lb == c) for c in range(3)]
        right += votes.index(max(votes)) == target
    return 100 * right / len(probes)


def test_knn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = make_splits(tmp_path)
    run = make_run(tmp_path / "run", train=train, val=val)
    table = tmp_path / "classes.csv"
    assert call(monkeypatch, "knn", run, "--k", 5, "--batch", 8, "--per_class", table) == 0
    said = capsys.readouterr().out
    expected = plain_knn(run, train, val, 5)
    assert f"{expected:.2f} % of 37 held-out images, bank of 61" in said
    assert f"| run (base encoder, step 7) | {expected:.2f} % | - | - |" in said
    entry = json.loads((run / "results.json").read_text())["knn base"]
    assert (entry["top1"], entry["k"]) == (pytest.approx(expected), 5)
    rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
    assert [row[:2] for row in rows] == [["0", "13"], ["1", "12"], ["2", "12"]]
    right = sum(int(row[1]) * float(row[2]) for row in rows) / 37
    assert right == pytest.approx(expected, abs=0.01)
    assert ranks.world_size() == 1
    assert not torch.distributed.is_initialized()
    # a foreign file, its results beside it
    file = tmp_path / "other.pth.tar"
    state = {f"module.base_encoder.{n}": t for n, t in load_encoder(run).state_dict().items()}
    torch.save({"state_dict": state}, file)
    foreign = ["--heads", 4, "--train", train, "--val", val, "--k", 5]
    assert call(monkeypatch, "knn", file, *foreign) == 0
    entry = json.loads((tmp_path / "other.pth.tar-evaluation/results.json").read_text())
    assert entry["knn base"]["top1"] == pytest.approx(expected)


def test_export_and_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = make_splits(tmp_path)
    run = make_run(tmp_path / "run", train=train, val=val)
    assert call(monkeypatch, "export", run, "--to", "deit", "--which", "momentum") == 0
    assert (tmp_path / "run-deit-momentum/model.pth").exists()
    assert "same features within" in capsys.readouterr().out
    assert call(monkeypatch, "look", run, "--images", 2, "--neighbours", 2) == 0
    assert len(list((run / "look-base").glob("*.png"))) == 3
