"""What a grid can tell is said before it runs: lengths, evaluations, and differences by seeds."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from mocov3_ds.recipes import parse
from mocov3_ds.stability import paired
from mocov3_ds.stability.comparisons import list_pairs
from mocov3_ds.stability.grid import Grid, lay_out, list_grids, load_grid, tomllib
from mocov3_ds.stability.grid_outlook import (
    CellLength,
    count_images,
    count_pairs,
    estimate_spread,
    foresee,
    measure_length,
)
from mocov3_ds.training.build import count_steps
from tests.data.sets import make_set
from tests.stability.judged_runs import judged_run

PLAN = """
title = "Two rates"
twins = false
seeds = 5
effect = 4
[base]
batch = 128
epochs = 8
warmup_epochs = 0.8
"data.limit" = 2000
"knn.every_steps" = 10
[axes]
lr = [1e-3, 2e-3, 4e-3]
[[comparisons]]
question = "Is a higher rate better?"
reference = "lr 0.001"
arms = ["lr 0.002", "lr 0.004"]
"""


def laid_out(text: str = PLAN, seeds: int | None = None) -> Grid:
    return lay_out(tomllib.loads(text), "mine", "tiny", seeds)


def test_steps_and_evaluations_of_a_cell(tmp_path: Path) -> None:
    config = parse(["--batch", "30", "--epochs", "2.5", "--warmup_epochs", "0"]).config
    drawn = measure_length(config)
    assert drawn == CellLength(steps=340, evaluations=17, probes=1000)  # 4,096 images, every 20
    train = make_set(str(tmp_path / "train"), [20, 7, 23])
    data = replace(config.data, shards=str(tmp_path / "train"))
    on_shards = replace(config, data=data, batch=20)
    # without probe shards there is no k-NN curve
    assert measure_length(on_shards) == CellLength(count_steps(on_shards, train)[0], 0, 0)
    probed = replace(on_shards, data=replace(data, probe_shards="probes", limit=41))
    assert count_images(probed) == 41
    assert measure_length(probed) == CellLength(5, 0, config.knn.probes)
    elsewhere = replace(data, shards="s3://bucket/train")
    assert count_images(replace(config, data=elsewhere)) is None
    assert count_images(replace(config, data=replace(elsewhere, limit=7))) == 7
    assert count_images(replace(config, data=replace(data, shards=str(tmp_path / "no")))) is None
    assert count_images(replace(config, recipe="vit_b16")) is None  # which draws no images


def test_a_question_says_what_so_many_seeds_tell() -> None:
    outlook = foresee(laid_out())
    assert (outlook.cells, outlook.arms, outlook.seeds) == (15, 3, 5)
    assert outlook.lengths == (CellLength(120, 12, 1000),)
    (question,) = outlook.questions
    assert question.deviations == paired.smallest_difference(1.0, 5, 2)
    assert question.points == pytest.approx(question.deviations * 100 * (0.5 / 1000) ** 0.5)
    assert question.seeds_for_effect == paired.count_seeds(4, 100 * (0.5 / 1000) ** 0.5, 2)
    assert not outlook.can_tell
    assert outlook.describe() == [
        "15 cells: 3 arms, 5 seeds; 120 steps and 12 k-NN evaluations in a cell",
        "detectors need 8 evaluations for falls and 32 logged steps for spikes: every cell has "
        "them",
        f"Is a higher rate better? With 5 seeds and 2 comparisons about {question.points:.1f} "
        f"points are told in four of five studies; it wants 4: CANNOT TELL, --seeds "
        f"{question.seeds_for_effect}.",
    ]
    enough = foresee(laid_out(seeds=question.seeds_for_effect))
    assert enough.can_tell
    assert enough.describe()[-1].endswith("four of five studies; it wants 4.")
    assert not foresee(laid_out(seeds=question.seeds_for_effect - 1)).can_tell
    alone = foresee(laid_out(seeds=1))
    assert not alone.can_tell
    assert alone.describe()[-1] == "Is a higher rate better? Cannot be told with one seed."


def test_runs_that_vary_more_than_their_probes() -> None:
    assert estimate_spread(1000) == pytest.approx(100 * (0.5 / 1000) ** 0.5)
    assert estimate_spread(1000, 4.5) == estimate_spread(0, 4.5) == 4.5
    assert estimate_spread(1000, 0.1) == estimate_spread(1000)
    assert math.isnan(estimate_spread(0))
    (question,) = foresee(
        laid_out(PLAN.replace("effect = 4", "effect = 4\nspread = 4.5"))
    ).questions
    assert question.points == pytest.approx(4.5 * question.deviations)
    assert question.seeds_for_effect == paired.count_seeds(4, 4.5, 2)


def test_what_the_detectors_lack() -> None:
    text = PLAN.replace("effect = 4", "effect = 60").replace("epochs = 8", "epochs = 2", 1)
    outlook = foresee(laid_out(text))
    assert outlook.lengths == (CellLength(30, 3, 1000),)
    assert not outlook.can_tell
    assert outlook.describe()[1].endswith(
        "for spikes: a cell has 3 evaluations only and a cell has 30 steps only"
    )
    assert foresee(laid_out(PLAN.replace("effect = 4", "effect = 60"))).can_tell


def test_steps_that_are_not_known() -> None:
    grid = laid_out(PLAN.replace('"data.limit" = 2000\n', ""))
    outlook = foresee(grid, ["--data.shards", "s3://b"])
    assert outlook.lengths == ()
    assert "follow from the number of training images" in outlook.describe()[0]
    # without probes nothing is known of the noise, either
    assert outlook.questions[0].seeds_for_effect is None
    probed = foresee(grid, ["--data.shards", "s3://b", "--data.probe_shards", "s3://c"])
    assert probed.questions[0].seeds_for_effect == paired.count_seeds(4, 100 * 0.0005**0.5, 2)


def test_other_metrics_have_no_known_noise() -> None:
    text = PLAN + 'metric = "jumps"\n'
    (question,) = foresee(laid_out(text)).questions
    assert question.describe(5, 4.0).endswith(
        f"{question.deviations:.1f} standard deviations of a paired difference are told in four of "
        "five studies."
    )


def test_without_a_plan_all_pairs_are_tested() -> None:
    """As many as the page compares (`comparisons.list_pairs`), in three metrics."""
    grid = laid_out(PLAN[: PLAN.index("[[comp")].replace("twins = false", "twins = true"))
    arms = {
        label: [judged_run(label, 0, 30.0, twin="" if "frozen" in label else f"{label}, frozen")]
        for label in dict.fromkeys(cell.label for cell in grid.cells)
    }
    assert count_pairs(grid.cells) == len(list_pairs(arms)) == 7
    (question,) = foresee(grid).questions
    assert question.comparisons == 21
    assert foresee(laid_out("twins = false", seeds=3)).questions == ()


@pytest.mark.parametrize("name", list_grids())
def test_a_ready_grid_can_tell_on_a_cpu_or_says_that_it_cannot(name: str) -> None:
    grid = load_grid(name, "tiny")
    outlook = foresee(grid)
    assert grid.planned
    assert outlook.lengths[0].evaluations >= 8
    assert outlook.lengths[0].steps >= 32
    assert outlook.can_tell != ("cannot tell" in grid.about)


def test_cures_at_scale_tiny_has_cures_of_each_kind_in_an_hour() -> None:
    tiny, paper = load_grid("cures", "tiny"), load_grid("cures", "imagenet")
    labels = {cell.label for cell in tiny.cells}
    new = {"ZClip", "LayerScale", "sigma-reparametrisation", "stem of convolutions", "Muon"}
    assert {*new, "Muon and frozen"} <= labels
    # 18 CPU seconds of a cell, 0.31 of an evaluation and 0.35 of a step (BENCHMARKS.md)
    (length,) = foresee(tiny).lengths
    seconds = 18 + 0.31 * length.evaluations + 0.35 * length.steps
    assert len(tiny.cells) * seconds < 3600 and foresee(tiny).can_tell
    scaled = [cell for cell in paper.cells if cell.label == "momentum scaled with the batch"]
    flags = scaled[0].flags()
    assert flags[flags.index("--moco.momentum_batch") + 1] == "1024"
    assert parse(flags).config.moco.momentum_batch == 1024
