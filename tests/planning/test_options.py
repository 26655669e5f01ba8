"""Options stay within the card, fill it, and are ranked by speed."""

from dataclasses import replace

import pytest

from mocov3_ds.model.chunking import Chunks
from mocov3_ds.planning.cards import PRESETS
from mocov3_ds.planning.command import plan_run
from mocov3_ds.planning.hardware import read_cluster
from mocov3_ds.planning.memory import plan_memory
from mocov3_ds.planning.options import rank_options
from tests.ds_configs import FOLDER


def test_each_card_runs_the_smallest_recipe() -> None:
    for card in PRESETS.values():
        precision = "bf16" if card.bf16 else "fp16"
        planned = plan_run("vit_s16", deepspeed_config=FOLDER / f"zero1_adamw_{precision}.json")
        best = rank_options(planned, read_cluster(f"8x{card.name}"))[0]
        assert best.fits, card.name
        assert best.pace is not None
        assert 0 < best.pace.mfu < card.reach.products, card.name


@pytest.mark.parametrize("recipe", ["vit_s16", "vit_b16", "vit_l16", "vit_h14"])
@pytest.mark.parametrize("gpus", ["1x80GB", "4x40GB", "8x24GB", "1024xH100"])
def test_plans_stay_within_the_card(recipe: str, gpus: str) -> None:
    cluster = read_cluster(gpus)
    for option in rank_options(plan_run(recipe), cluster):
        setup = option.setup
        assert option.fits == (option.memory.peak_bytes <= cluster.usable_bytes)
        if option.fits and setup.chunks.size:  # and they leave no room for another kept chunk
            more = Chunks(size=setup.chunks.size, keep=setup.chunks.keep + 2)
            larger = plan_memory(replace(setup, chunks=more))
            enough = more.keep * more.size >= 2 * setup.images
            assert enough or larger.peak_bytes > cluster.usable_bytes


def test_what_fits_comes_first_and_of_that_the_fastest() -> None:
    planned = plan_run("vit_h14", overrides=("bf16.enabled=false",))
    options = rank_options(planned, read_cluster("8xT4"))
    assert [option.setup.stage for option in options].count(0) == 2
    fits = [option.fits for option in options]
    assert fits == sorted(fits, reverse=True) and not all(fits)
    seconds = [round(option.pace.step_s, 3) for option in options if option.pace is not None]
    assert seconds == sorted(seconds)
    assert options[0].why == "the fastest that fits"
    for option in options:
        assert option.why.startswith("does not fit: an image at a time") == (not option.fits)


def test_fp16_has_no_stage_0() -> None:
    planned = plan_run("vit_s16", overrides=("bf16.enabled=false", "fp16.enabled=true"))
    assert planned.precision == "fp16"
    options = rank_options(planned, read_cluster("8xT4"))
    assert {option.setup.stage for option in options} == {1, 2, 3}
    with pytest.raises(ValueError, match="fp16 has no stage 0"):
        rank_options(planned, read_cluster("8xT4"), (0,))


def test_tf32_is_planned_as_it_is_trained() -> None:
    fp32 = ("bf16.enabled=false",)
    cluster = read_cluster("8xA100-80GB")
    plain, rounded = (
        rank_options(plan_run("vit_b16", overrides=fp32, tf32=tf32), cluster, (1,))[0]
        for tf32 in (False, True)
    )
    assert plain.memory.peak_bytes == rounded.memory.peak_bytes
    assert plain.pace is not None and rounded.pace is not None
    # 19.5 and 156 TFLOP/s, NVIDIA A100 data sheet
    assert plain.pace.compute_s == pytest.approx(8 * rounded.pace.compute_s)
    for planned, gpus in (
        (plan_run("vit_b16", tf32=True), "8xA100"),
        (plan_run("vit_b16", overrides=fp32, tf32=True), "8xT4"),
    ):
        with pytest.raises(ValueError, match="--tf32 would have no effect"):
            rank_options(planned, read_cluster(gpus))
