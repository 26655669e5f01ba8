"""Multi-label k-NN: lists in shards, scores on several ranks, average precision, the command."""

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data_prep.commands import ShardCommand
from data_prep.shard_options import ShardOptions
from mocov3_ds import cli
from mocov3_ds.data import manifest as manifests
from mocov3_ds.distributed import ranks
from mocov3_ds.evaluation.label_lists import (
    average_precisions,
    open_listed_splits,
    parse_label_list,
    read_label_lists,
    score_classes,
    write_precisions,
)
from tests.evaluation.runs import coloured, make_run
from tests.ranks_pool import run_ranks

NAMES = ("red", "green", "7")


def make_listed_set(folder: Path, images: int, *, first: int = 0, absent: int = -1) -> str:
    """Shards of samples whose JSON lists the class of the colour, and `even` or nothing."""
    folder.mkdir()
    with tarfile.open(folder / "source.tar", "w") as tar:
        for number in range(first, first + images):
            labels = [int(NAMES[number % 3]) if number % 3 == 2 else NAMES[number % 3]]
            labels += ["even"] if number % 2 == 0 else []
            tree = {"labels": [] if number % 10 == 9 else labels} if number != absent else {}
            members = {"jpg": coloured(number), "json": json.dumps(tree).encode()}
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    url = str(folder / "shards")
    options = ShardOptions(shard_size="20KB")
    ShardCommand(
        source=str(folder / "source.tar"), destination=url, options=options, workers=1
    ).run()
    return url


def test_lists_come_back_in_the_order_of_the_samples(tmp_path: Path) -> None:
    manifest = manifests.load(make_listed_set(tmp_path / "a", 23))
    assert len(manifest.shards) > 1
    lists = read_label_lists(manifest, "labels")
    assert sorted(map(tuple, lists)) == sorted(
        () if number % 10 == 9 else (NAMES[number % 3], *(["even"] if number % 2 == 0 else []))
        for number in range(23)
    )
    with pytest.raises(ValueError, match=r"23 of 23 samples in .* no KEY.json with a list 'tags'"):
        read_label_lists(manifest, "tags")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "the file is no JSON"),
        ('{"x": "cat"}', "is 'cat'; a list of names or whole numbers"),
        ('{"x": ["cat", 1.5]}', "holds 1.5, neither a name nor a whole number"),
        ('{"x": [true]}', "holds True"),
    ],
)
def test_what_is_no_list_of_classes_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_label_list(text.encode(), "x", "'x' of a.json")


def test_classes_must_be_those_of_training(tmp_path: Path) -> None:
    train, val = (make_listed_set(tmp_path / n, c) for n, c in (("train", 2), ("val", 12)))
    with pytest.raises(ValueError, match=r"1 classes of which .* has none: '7'"):
        open_listed_splits(train, val, "labels")
    splits = open_listed_splits(val, train, "labels")
    assert splits.classes == ("7", "even", "green", "red")
    assert splits.has_train_NC.sum(0).tolist() == [4, 6, 4, 3]
    broken = make_listed_set(tmp_path / "broken", 5, absent=3)
    with pytest.raises(ValueError, match="1 of 5 samples"):
        open_listed_splits(val, broken, "labels")


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    bank, probes = torch.randn(40, 6, generator=g), torch.randn(11, 6, generator=g)
    return bank, torch.rand(40, 5, generator=g) < 0.3, probes


def scores_of_this_rank(k: int) -> torch.Tensor:
    bank, has, probes = example()
    own = slice(ranks.rank(), None, ranks.world_size())
    rows = torch.arange(40)[own]
    return score_classes(bank[own], rows, has, probes, k=k, temperature=0.2, block=4)


@pytest.mark.parametrize("k", [1, 7, 100])
def test_scores_equal_a_plain_vote(k: int) -> None:
    bank, has, probes = example()
    for score_C, probe in zip(scores_of_this_rank(k), probes, strict=True):
        cosines = F.cosine_similarity(bank, probe[None])
        near = cosines.argsort(descending=True)[:k]
        votes = (cosines[near] / 0.2).exp()
        expected = torch.stack([votes[has[near, c]].sum() / votes.sum() for c in range(5)])
        torch.testing.assert_close(score_C, expected)


def test_two_ranks_score_as_one() -> None:
    for score_PC in run_ranks(2, scores_of_this_rank, 7):
        torch.testing.assert_close(score_PC, scores_of_this_rank(7))


def test_average_precision_by_hand() -> None:
    has_PC = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]).bool()
    score_PC = torch.tensor([[0.9, 0.1, 0.3, 0.5]] * 4)
    score_PC[:, 0] = torch.tensor([0.9, 0.8, 0.7, 0.6])
    score_PC[:, 1] = torch.tensor([0.1, 0.4, 0.3, 0.2])
    found = average_precisions(score_PC, has_PC)
    # hits at ranks 1 and 3; at 1 and 4; none; and all of one score: 2 of 4 at full recall
    expected = [(1 + 2 / 3) / 2, (1 + 2 / 4) / 2, float("nan"), 0.5]
    torch.testing.assert_close(found, torch.tensor(expected).double(), equal_nan=True)


def test_no_name_of_a_class_becomes_a_formula(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    write_precisions(table, ["=1+1", "b"], torch.ones(2, 2).bool(), torch.tensor([1.0, 0.5]))
    assert table.read_text().splitlines()[1:] == ["'=1+1,2,100.00", "b,2,50.00"]


def test_the_command_records_the_mean_average_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = make_listed_set(tmp_path / "train", 40)
    val = make_listed_set(tmp_path / "val", 15, first=100)
    run = make_run(tmp_path / "run", train=train, val=val)
    table = tmp_path / "table.csv"
    flags = ["--k", "5", "--labels", "labels", "--per_class", str(table)]
    monkeypatch.setattr(sys, "argv", ["mocov3", "knn", str(run), *flags])
    assert cli.main() == 0
    entry = json.loads((run / "results.json").read_text())["multilabel base"]
    rows = [line.split(",") for line in table.read_text().splitlines()]
    assert rows[0] == ["class", "images", "average_precision"]
    assert [(row[0], int(row[1])) for row in rows[1:]] == [
        *(("7", 5), ("even", 8), ("green", 4), ("red", 5))
    ]
    mean = sum(float(row[2]) for row in rows[1:]) / 4
    assert entry["mean_ap"] == pytest.approx(mean, abs=0.01)
    said = capsys.readouterr().out
    assert f"mean average precision {entry['mean_ap']:.2f} % on 15 held-out images" in said
    assert (
        "| encoder | k-NN top-1 | linear top-1 | fine-tune top-1 | multi-label k-NN mAP |" in said
    )
    assert f"| - | - | - | {entry['mean_ap']:.2f} % |" in said
