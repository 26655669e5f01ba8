"""Compressed runs: the same on any number of ranks, with any chunk, after a resume; refusals."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mocov3_ds import train
from mocov3_ds.config.run_config import Config
from mocov3_ds.model.backbones import BackboneFacts
from mocov3_ds.model.chunking import Chunks, choose_chunks, shorter_chunks
from mocov3_ds.recipes import parse
from mocov3_ds.training import advance
from mocov3_ds.training.advance import draw_step
from mocov3_ds.training.compression import check_compression, length_of_step
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL, digests_of, rows_of

SCHEDULE = "0:q0.5,k0.25,p2 0.4:0.5,p1 0.8:1"
FACTS = BackboneFacts(
    width=8, groups=("cls",), rows_know_each_other=False, patches=16, patch_size=8
)


def config_of(*flags: str) -> Config:
    return parse(["--recipe", "tiny", "--views.image_size", "32", *flags]).config


def draw(
    step: int,
    ids: list[int],
    chunks: Chunks = Chunks(),  # noqa: B008
    schedule: str = SCHEDULE,
) -> Any:
    run: Any = SimpleNamespace(
        config=config_of("--compress", schedule),
        step=step,
        total_steps=100,
        start=SimpleNamespace(schedule_begins=lambda _config: 0),
        base=SimpleNamespace(backbone=torch.nn.Identity(), facts=FACTS),
        model=SimpleNamespace(chunks=chunks),
        device=torch.device("cpu"),
    )
    return draw_step(run, torch.tensor(ids))


def test_a_step_draws_by_seed_step_and_sample_what_its_length_asks_for() -> None:
    first = draw(0, [*range(20)])
    assert (first.query_patches_VBK.shape, first.key_patches_VBK.shape) == ((2, 20, 2), (2, 20, 1))
    assert (first.patch_scale, int(first.query_patches_VBK.max())) == (2.0, 3)
    part = draw(0, [7, 8])
    assert torch.equal(part.query_patches_VBK, first.query_patches_VBK[:, 7:9])
    assert torch.equal(part.key_patches_VBK, first.key_patches_VBK[:, 7:9])
    later = draw(50, [*range(20)], Chunks(size=4, keep=1))
    assert later.query_patches_VBK.shape == (2, 20, 10)
    assert later.chunks == choose_chunks(12, 20)  # eight whole images take as much, 11 of 17 tokens
    whole = draw(80, [*range(20)], Chunks(size=4, keep=1))
    assert (whole.query_patches_VBK, whole.key_patches_VBK) == (None, None)
    assert (whole.patch_scale, whole.chunks) == (1.0, Chunks(size=4, keep=1))


def test_a_step_that_drops_no_patch_draws_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advance, "draw_patch_order", lambda *_args, **_kwargs: pytest.fail("drawn"))
    for step in (0, 99):
        drawn = draw(step, [3, 8], schedule="0:p2 0.9:p1")
        assert (drawn.query_patches_VBK, drawn.key_patches_VBK) == (None, None)
        assert drawn.patch_scale == (1.0 if step else 2.0)


def test_without_compression_nothing_is_drawn_or_told() -> None:
    assert length_of_step(config_of(), FACTS, 0, 100) is None


def test_chunks_grow_as_images_need_less() -> None:
    whole = choose_chunks(200, 4096)
    for share in (0.9, 0.5, 0.25):
        shorter = shorter_chunks(whole, 4096, share)
        images = shorter.size * (shorter.keep + 1)
        assert images * share <= whole.size * (whole.keep + 1)
        assert shorter.size > 0.7 * whole.size / share
    assert shorter_chunks(whole, 4096, 1.0) == whole
    assert shorter_chunks(Chunks(), 4096, 0.5) == Chunks()
    assert shorter_chunks(choose_chunks(100, 60), 60, 0.5) == Chunks()


def test_runs_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="does not end at full length"):
        config_of("--compress", "0:0.5")
    convnet = BackboneFacts(width=8, groups=("conv1",), rows_know_each_other=True)
    with pytest.raises(ValueError, match="has none that can be left out"):
        check_compression(config_of("--compress", "2x"), convnet)
    with pytest.raises(ValueError, match="possible scales are 1, 2, 4"):
        check_compression(config_of("--compress", "0:0.5,p3 0.9:1,p1"), FACTS)


# ------------------------------------------------------------------------------- whole runs


def train_run(folder: Path, *flags: str) -> None:
    shards = ["--data.shards", str(folder / "train"), "--runs", str(folder / "runs"), "--log"]
    run = ["--compress", SCHEDULE, "--model.patch_size", "4", "--model.drop_path", "0.2"]
    train.train(parse([*SMALL, *shards, *run, "--knn.probes", "0", *flags]))


@pytest.mark.slow
def test_ranks_chunks_and_a_resume_change_nothing(tmp_path: Path) -> None:
    """One rank at ZeRO-1 in one pass, against two at ZeRO-3 with chunks, and against a resume."""
    make_set(str(tmp_path / "train"), [20, 7, 23])
    run_ranks(1, train_run, tmp_path, "--name", "whole")
    run_ranks(1, train_run, tmp_path, "--name", "parts", "--stop_after_steps", "4")
    run_ranks(1, train_run, tmp_path, "--name", "parts")
    many = ("--name", "many", "--chunk", "3", "--ds", "zero_optimization.stage=3")
    run_ranks(2, train_run, tmp_path, *many)
    rows = {name: rows_of(tmp_path / "runs" / name) for name in ("whole", "parts", "many")}
    columns = ("query_patches", "key_patches", "patch_scale")
    lengths = [tuple(row[column] for column in columns) for row in rows["whole"]]
    assert lengths[:5] == [(2, 1, 2.0)] * 2 + [(2, 2, 2.0)] * 3
    assert lengths[-2:] == [(16, 16, 1.0)] * 2
    assert rows["whole"][0]["operations"] < 0.7 * rows["whole"][-1]["operations"]
    assert rows["parts"] == rows["whole"]
    of_parts, of_whole = digests_of(tmp_path / "runs/parts"), digests_of(tmp_path / "runs/whole")
    assert of_parts == of_whole
    for one, other in zip(rows["whole"], rows["many"], strict=True):
        assert one["query_patches"] == other["query_patches"]
        # sums in another order: a step's rounding grows over twelve steps of AdamW
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=5e-3)
