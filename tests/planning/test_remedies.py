"""Where nothing fits: the remedies that are named do fit, and none that is tried is forgotten."""

import re
from dataclasses import replace

import pytest

from mocov3_ds.planning.cards import GIB
from mocov3_ds.planning.command import plan_run
from mocov3_ds.planning.hardware import Cluster, read_cluster
from mocov3_ds.planning.options import PlannedRun, rank_options
from mocov3_ds.planning.remedies import fitting_options, suggest_remedy

FP32 = ("bf16.enabled=false",)


def numbers(pattern: str, text: str) -> list[int]:
    match = re.search(pattern, text)
    assert match is not None, text
    return [int(group) for group in match.groups()]


def with_memory(cluster: Cluster, gib: int) -> Cluster:
    return replace(cluster, card=replace(cluster.card, memory_bytes=gib * GIB))


def test_the_remedy_fits() -> None:
    small, planned = read_cluster("1x16GB"), plan_run("vit_h14", overrides=FP32)
    remedy = suggest_remedy(planned, small)
    [cards] = numbers(r"(\d+) of these cards", remedy)
    [memory_gb] = numbers(r"cards of (\d+) GB", remedy)
    for cluster in (replace(small, cards=cards), with_memory(small, memory_gb)):
        assert rank_options(planned, cluster)[0].fits
    assert not rank_options(planned, replace(small, cards=cards // 2))[0].fits
    with pytest.raises(ValueError, match="vit_h14 at batch 4096 does not fit on 1 x 16GB") as error:
        fitting_options(planned, small)
    assert f"what would fit: {remedy}." in str(error.value)


def test_the_remedy_keeps_the_fixed_stage() -> None:
    """8 T4 hold ViT-H in fp32 at no batch with the optimizer's state whole, but in parts."""
    planned = plan_run("vit_h14", overrides=FP32)
    cluster = read_cluster("8xT4")

    def fits(batch: int, cards: int, stages: tuple[int, ...]) -> bool:
        smaller = replace(planned, batch=batch)
        return rank_options(smaller, replace(cluster, cards=cards), stages)[0].fits

    assert not any(fits(batch, 8, (0,)) for batch in (8, 2048, 4096))
    assert not any(fits(4096, cards, (0,)) for cards in (16, 32, 1024))
    assert fits(4096, 8, (1,))
    remedy = suggest_remedy(planned, cluster, (0,))
    assert "--batch" not in remedy
    assert "of these cards" not in remedy
    assert "ZeRO-1 (without --stage" in remedy
    [memory_gb] = numbers(r"cards of (\d+) GB", remedy)
    assert rank_options(planned, with_memory(cluster, memory_gb), (0,))[0].fits
    assert "without --stage" not in suggest_remedy(planned, read_cluster("1xT4"))


def widen(planned: PlannedRun, times: int) -> PlannedRun:
    """The same with a backbone of that many times the width."""
    vit = replace(planned.shape.vit, dim=planned.shape.vit.dim * times)
    return replace(planned, shape=replace(planned.shape, backbone=vit))


def test_what_was_tried_is_said() -> None:
    small = read_cluster("8x16GB")
    planned = plan_run("vit_h14", overrides=FP32)
    giant, combined = widen(planned, 64), widen(planned, 7)
    assert suggest_remedy(giant, small) == (
        "nothing that was tried (batches down to 8, up to 1024 of these cards, cards of up to "
        "288 GB, more and bigger cards together)"
    )
    # neither more of these cards nor eight larger ones hold it
    cards, memory_gb = numbers(r"^(\d+) cards of (\d+) GB$", suggest_remedy(combined, small))
    larger = replace(with_memory(small, memory_gb), cards=cards)
    assert rank_options(combined, larger)[0].fits
