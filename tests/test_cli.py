"""The mocov3 command: what it prints and writes, and one sentence for what cannot be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mocov3_ds import cli
from mocov3_ds.data import manifest as manifests
from mocov3_ds.distributed import ranks
from mocov3_ds.encoders.load import load_encoder
from mocov3_ds.evaluation import finetune, linear
from tests.data.sets import make_set
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
    assert call(monkeypatch, "knn", run, "--k", 5, "--batch", 8) == 0
    said = capsys.readouterr().out
    expected = plain_knn(run, train, val, 5)
    assert f"{expected:.2f} % of 37 held-out images, bank of 61" in said
    assert f"| run (base encoder, step 7) | {expected:.2f} % | - | - |" in said
    entry = json.loads((run / "results.json").read_text())["knn base"]
    assert (entry["top1"], entry["k"]) == (pytest.approx(expected), 5)
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


def test_bad_input_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = make_splits(tmp_path)
    run = make_run(tmp_path / "run", train=train, val=val)
    unlabelled = make_set(str(tmp_path / "bare"), [4])
    rows = unlabelled.index_N.copy()
    rows["label"] = -1
    manifests.write(unlabelled.url, unlabelled.shards, rows)
    lone = make_run(tmp_path / "lone", train=train)
    for arguments, sentence in [
        (("knn", tmp_path / "nothing"), "there is no"),
        (("knn", lone), "names no held-out shards"),
        (("knn", run, "--val", unlabelled.url), "4 of 4 samples in"),
        (("knn", run, "--val", tmp_path), "holds no manifest.json; make shards with python -m"),
        (("knn", run, "--image_size", 15), "image size 15 is not a multiple of the patch size 4"),
        (("knn", run, "--k", 0), "k 0, batch 256, temperature 0.07 must be positive"),
        (("look", run, "--images", 0), "images 0"),
        (("export", tmp_path), "it is no run"),
        (("export", run, "--out", tmp_path), "is not empty"),
    ]:
        assert call(monkeypatch, *arguments) == 2
        told = capsys.readouterr().err
        assert told.startswith("mocov3: error: ")
        assert sentence in told
        assert told.count("\n") == 1


def test_a_path_that_cannot_be_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--recipe", "vit_l16", "--data.shards", "s3://bucket/set"]
    assert call(monkeypatch, "launch", "slurm", "--out", "/proc/foo", "--", *flags) == 2
    assert capsys.readouterr().err == "mocov3: error: /proc/foo: No such file or directory.\n"


@pytest.mark.parametrize("arguments", [["plan", "--list"], ["plan", "--help"]])
def test_a_reader_that_leaves_early(arguments: list[str]) -> None:
    """As `mocov3 ... | head`: silence, and the status of a tool that SIGPIPE ended."""
    command = [sys.executable, "-m", "mocov3_ds.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    read, write = os.pipe()
    os.close(read)
    try:
        ended = subprocess.run(
            command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, env=environment
        )
    finally:
        os.close(write)
    assert ended.returncode == 141
    assert "Broken" not in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_modules_are_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Help that teaches, one sentence and status 2 for bad input."""
    for name, module in (("linear", linear), ("finetune", finetune)):
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 0
        assert "the paper" in capsys.readouterr().out
        monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "nothing")])
        assert module.main() == 2
        assert capsys.readouterr().err == f"{name}: error: there is no {tmp_path / 'nothing'}.\n"


def test_started_as_a_user_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mocov3_ds.evaluation.finetune", str(tmp_path / "nothing")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert refused.returncode == 2
    assert f"finetune: error: there is no {tmp_path / 'nothing'}." in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_accelerate_launches_two_ranks(tmp_path: Path) -> None:
    train, val = make_splits(tmp_path)
    run = make_run(tmp_path / "run", train=train, val=val)
    options = ["--epochs", "2", "--batch", "16", "--workers", "0"]
    alone = linear.train_probe(linear.LinearConfig(run=run, epochs=2, batch=16, workers=0))
    ranks.stop()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    out = ["--out", str(tmp_path / "two")]
    # without what this process joined a group of one rank with
    environment = {n: v for n, v in os.environ.items() if n not in ranks.LAUNCHER_VARIABLES}
    subprocess.run(
        [*launch, "-m", "mocov3_ds.evaluation.linear", str(run), *options, *out],
        check=True,
        timeout=300,
        env=environment,
    )
    entry = json.loads((tmp_path / "two/results.json").read_text())["linear base"]
    assert entry == alone
