"""Runs whose sequences are shorter at first: their operations, hours and cost."""

from dataclasses import replace

import pytest

from mocov3_ds.config.compression import READY, StepLength
from mocov3_ds.planning import architecture
from mocov3_ds.planning.command import launch_command, plan_run, run_plan
from mocov3_ds.planning.flags import PlanOptions
from mocov3_ds.planning.hardware import read_cluster
from mocov3_ds.planning.options import rank_options
from mocov3_ds.planning.pace import DECODE_CPU_S, IMAGE_BYTES, STORAGE_CPU_S
from mocov3_ds.planning.plan_text import data_line
from mocov3_ds.planning.run_time import plan_run_time

CLUSTER = read_cluster("8xA100-80GB")


def plain_operations(length: StepLength) -> float:
    """ViT-B/16 with its heads, two views, written out product by product (2 for a multiply-add)."""
    dim, hidden, out, blocks = 768, 4096, 256, 12

    def passes(patches: int) -> float:
        tokens = patches + 1
        qkv_proj_mlp = tokens * dim * (3 * dim + dim + 4 * dim + 4 * dim)
        scores_values = 2 * tokens * tokens * dim
        last = tokens * dim * 3 * dim + dim * (dim + 8 * dim) + 2 * tokens * dim
        return 2 * ((blocks - 1) * (qkv_proj_mlp + scores_values) + last)

    projection = 2 * 196 * (16 * 16 * 3) * dim
    projector = 2 * (dim * hidden + hidden * hidden + hidden * out)
    predictor = 2 * (out * hidden + hidden * out)
    queries = projection + 3 * passes(length.query_patches) + 3 * (projector + predictor)
    return 2 * (queries + projection + passes(length.key_patches) + projector)


@pytest.mark.parametrize("patches", [(196, 196), (49, 98), (24, 24)])
def test_operations_are_those_of_the_patches_that_take_part(patches: tuple[int, int]) -> None:
    queries, keys = patches
    length = StepLength(patches=196, query_patches=queries, key_patches=keys, patch_scale=1)
    shape = plan_run("vit_b16").shape
    counted = architecture.model_operations(shape, length)
    assert counted == pytest.approx(plain_operations(length), rel=1e-12)
    if patches == (196, 196):
        assert counted == architecture.model_operations(shape)


@pytest.mark.parametrize("recipe", ["vit_s16", "vit_b16", "vit_h14"])
@pytest.mark.parametrize(("name", "times"), [("2x", 2), ("4x", 4)])
def test_ready_schedules_save_what_their_names_say(recipe: str, name: str, times: int) -> None:
    pace = rank_options(plan_run(recipe, compress=name), CLUSTER, (1,))[0].pace
    assert pace is not None
    operations = sum(phase.share * phase.operations for phase in pace.phases)
    assert pace.operations / operations == pytest.approx(times, rel=0.1)
    assert sum(phase.share for phase in pace.phases) == pytest.approx(1)


def test_hours_are_those_of_the_phases() -> None:
    planned = plan_run("vit_s16", compress="0:q0.25,k1,p2 0.5:1,p1")
    option = rank_options(planned, CLUSTER, (1,))[0]
    pace = option.pace
    assert pace is not None
    first, last = pace.phases[0], pace.phases[-1]
    assert (first.length.patches, first.length.query_patches, first.length.key_patches) == (
        49,
        12,
        49,
    )
    assert last.length.query_patches == 196
    assert last.step_s == pytest.approx(pace.step_s)
    assert first.step_s < 0.3 * pace.step_s

    def hours(cores: int) -> float:
        return plan_run_time(
            planned, pace, CLUSTER, epochs=300, images=1_281_167, cores=cores
        ).hours

    plain = plan_run("vit_s16")
    whole_pace = rank_options(plain, CLUSTER, (1,))[0].pace
    assert whole_pace is not None
    whole = plan_run_time(plain, whole_pace, CLUSTER, epochs=300, images=1_281_167, cores=0).hours
    assert 0.4 < hours(0) / whole < 0.8
    # the loader is as slow as ever: it holds up the short steps alone
    assert hours(0) < hours(4) < hours(2)
    assert "--compress '0:q0.25,k1,p2 0.5:1,p1'" in launch_command(planned, CLUSTER, option)


def test_what_cannot_be_compressed_is_refused() -> None:
    with pytest.raises(ValueError, match="timm:resnet50 has none that can be left out"):
        plan_run("r50", compress="2x")
    with pytest.raises(ValueError, match="ViT 384 x 11 blocks on convolutions cannot have patches"):
        plan_run("vit_conv_s16", compress="0:0.5,p2 0.9:1,p1")
    with pytest.raises(ValueError, match=r"possible scales are 1, 1\.75, 2, 3\.5"):
        plan_run("vit_s16", compress="0:0.5,p1.5 0.9:1,p1")
    with pytest.raises(ValueError, match="is no schedule"):
        plan_run("vit_s16", compress="8x")


def test_a_counted_backbone_is_counted_at_each_length() -> None:
    planned = plan_run("vit_conv_s16", compress="2x")
    pace = rank_options(planned, CLUSTER, (1,))[0].pace
    assert pace is not None
    first = pace.phases[0]
    stem = architecture.forward_work(planned.shape, 1).operations
    whole = architecture.forward_work(planned.shape).operations
    quarter = architecture.forward_work(planned.shape, first.length.query_patches).operations
    # linear layers by tokens (50 of 197) and attention by their square, beside the stem
    assert 0.22 < (quarter - stem) / (whole - stem) < 0.27
    assert list(READY) == ["off", "2x", "4x"]


def test_the_loader_is_that_of_the_shortest_steps() -> None:
    pace = rank_options(plan_run("vit_s16", compress="4x"), CLUSTER, (1,))[0].pace
    assert pace is not None
    shortest = min(phase.step_s for phase in pace.phases)
    assert pace.read_mb_per_s == pytest.approx(4096 / shortest * IMAGE_BYTES / 1e6)
    assert pace.loader_cores > 5 * 4096 / pace.step_s * (DECODE_CPU_S + STORAGE_CPU_S)
    assert "to read and decode while the sequences are shortest (" in data_line(pace, CLUSTER)
    assert "to read and decode (" in data_line(replace(pace, phases=()), CLUSTER)


def test_a_run_that_is_too_short_is_refused_as_training_does() -> None:
    short = PlanOptions(recipe="tiny", gpus="1x24GB", compress="2x", images=40, batch=32, epochs=1)
    with pytest.raises(ValueError, match="2x does not come to full length in the 1 steps of this"):
        run_plan(short)
