"""Spikes that make dips are told from spikes beside dips; false claims and power by simulation."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from mocov3_ds.stability.findings import Dip, GradientEvent, Lead
from mocov3_ds.stability.spike_dips import (
    AFTER,
    BEFORE,
    SpikesAndDips,
    collect_events,
    compare_with_shifts,
    count_followed,
    residual_curve,
    wilson_interval,
)
from tests.stability.judged_runs import judged_run

EVERY, EVALUATIONS = 10, 200
STUDIES = 100


def drawn_run(
    random: np.random.Generator, *, cause: float = 0.0, in_a_phase: bool = False
) -> SpikesAndDips:
    """A run with eight spikes or so, six dips of their own, and a dip after a share of spikes.

    Args:
        random: of everything.
        cause: share of the spikes that make a dip.
        in_a_phase: whether spikes and dips are frequent in the same quarter of the run.
    """
    steps_K = EVERY * np.arange(1, EVALUATIONS + 1)
    end = int(steps_K[-1])
    weight_T = np.ones(end)
    if in_a_phase:
        weight_T[: end // 4] = weight_T[end // 2 :] = 0.2
    weight_T /= weight_T.mean()
    spikes_E = np.flatnonzero(random.random(end) < 8 * weight_T / end)
    is_dip_K = random.random(EVALUATIONS) < 6 * weight_T[steps_K - 1] / EVALUATIONS
    made_E = spikes_E[random.random(len(spikes_E)) < cause]
    opened_E = np.searchsorted(steps_K, made_E, side="right") + random.integers(0, 2, len(made_E))
    is_dip_K[opened_E[opened_E < EVALUATIONS]] = True
    knn_K = 50 - 20 * np.exp(-3 * steps_K / end) + random.normal(0, 0.6, EVALUATIONS)
    for opened in np.flatnonzero(is_dip_K):
        knn_K[opened : opened + 5] -= 3
    return SpikesAndDips(spikes_E, steps_K[is_dip_K], steps_K, knn_K)


def share_told(
    seed: int, *, cause: float = 0.0, in_a_phase: bool = False, of_runs: int = 3
) -> float:
    """Share of studies of so many runs that claim that spikes make dips."""
    random = np.random.default_rng(seed)
    studies = [
        [drawn_run(random, cause=cause, in_a_phase=in_a_phase) for _ in range(of_runs)]
        for _ in range(STUDIES)
    ]
    return float(np.mean([compare_with_shifts(runs).p < 0.05 for runs in studies]))


def test_spikes_beside_dips_claim_nothing() -> None:
    # 5 % and two and a half standard errors of 100 studies
    assert share_told(0) <= 0.10


def test_a_phase_in_which_both_are_frequent_is_no_cause() -> None:
    assert share_told(1, in_a_phase=True) <= 0.10


def test_spikes_of_which_half_make_dips_are_told() -> None:
    assert share_told(2, cause=0.5) >= 0.9


def test_one_run_with_enough_spikes_can_tell() -> None:
    steps_K = EVERY * np.arange(1, EVALUATIONS + 1)
    for seed in range(3):
        random = np.random.default_rng(seed)
        # at most one in two windows, each a dip at the next evaluation
        spikes_E = 20 + 64 * np.arange(31) if seed == 0 else 32 * random.permutation(62)[:31] + 11
        spikes_E = np.sort(spikes_E)
        dips_E = -(-(spikes_E + 1) // EVERY) * EVERY
        run = SpikesAndDips(spikes_E, dips_E, steps_K, 50 + random.normal(0, 0.6, EVALUATIONS))
        found = compare_with_shifts([run])
        assert (found.followed, found.spikes) == (31, 31)
        assert found.p < 0.01 and "cannot be told" not in found.describe()
    assert share_told(4, cause=0.9, of_runs=1) >= 0.7
    assert share_told(5, of_runs=1) <= 0.10


def test_spikes_and_dips_in_clusters_claim_nothing() -> None:
    """Both in clusters of their own, 15 and 20 evaluations long, one run a study."""
    random, told = np.random.default_rng(6), 0
    steps_K = EVERY * np.arange(1, EVALUATIONS + 1)

    def clusters(count: int, width: int, least: int) -> list[int]:
        starts = random.integers(0, EVERY * EVALUATIONS - width, count)
        places = np.sort(np.concatenate([s + random.integers(1, width, 5) for s in starts]))
        apart: list[int] = []
        for place in places.tolist():
            if not apart or place > apart[-1] + least:
                apart.append(place)
        return apart

    for _ in range(STUDIES):
        spikes_E = np.array(clusters(5, 150, 30))
        dips_E = np.unique(-(-np.array(clusters(3, 200, 30)) // EVERY) * EVERY)
        run = SpikesAndDips(spikes_E, dips_E, steps_K, 50 + random.normal(0, 0.6, EVALUATIONS))
        told += compare_with_shifts([run]).p < 0.05
    assert told <= 0.10 * STUDIES


def test_followed_spikes_by_hand() -> None:
    dips_E = np.array([100, 130, 400])
    spikes_NE = np.array([[69, 70, 99, 100], [130, 370, 369, 400]])
    # a dip at the very step of a spike is not its work; one 30 steps on is
    assert count_followed(spikes_NE, dips_E, 30).tolist() == [3, 1]
    assert count_followed(spikes_NE, dips_E[:0], 30).tolist() == [0, 0]


def test_each_spike_with_its_dip() -> None:
    random = np.random.default_rng(3)
    sure = [drawn_run(random, cause=1.0) for _ in range(3)]
    found = compare_with_shifts(sure)
    assert found.followed == found.spikes and found.share == 1 and found.runs == 3
    assert found.control < 0.5 and found.p < 0.001 and found.window == 3 * EVERY
    # the mean curve leaves its band below, after the spike and not before
    after_W = (found.offsets_W >= 2) & (found.offsets_W <= 5)
    assert (found.average_W[after_W] < found.low_W[after_W]).all()
    before_W = found.offsets_W < 0
    assert np.mean(found.average_W[before_W] < found.low_W[before_W]) <= 0.5
    assert "are followed by a dip within 30 steps" in found.describe()
    assert "cannot be told" not in found.describe()
    without_dips = compare_with_shifts([replace(run, dips_E=run.dips_E[:0]) for run in sure])
    assert without_dips.p == 1 and "cannot be told" in without_dips.describe()


def test_without_spikes_nothing_follows() -> None:
    run = drawn_run(np.random.default_rng(4))
    for nothing in ([], [replace(run, spikes_E=run.spikes_E[:0])]):
        found = compare_with_shifts(nothing)
        assert (found.spikes, found.p) == (0, 1.0) and math.isnan(found.share)
        assert np.isnan(found.average_W).all() and len(found.offsets_W) == BEFORE + AFTER + 1
        assert "No gradient spike" in found.describe()


def with_events(spans: Sequence[tuple[str, int, int]], lead: Lead | None = None) -> SpikesAndDips:
    """What the test takes of a run with these gradient events (group, first, last) and a dip."""
    run = judged_run("a", 0, 40.0)  # evaluated every 10 steps
    events = tuple(GradientEvent(group, first, last, last, 9.0) for group, first, last in spans)
    dip = Dip(60, 80, 70, 3.0, 0.1, 30.0, True, True, False)
    judgement = replace(run.judgement, gradient_events=events, dips=(dip,), lead=lead)
    return collect_events(run.series, judgement)


def test_events_of_all_layers_at_once_are_one_spike() -> None:
    spans = [("patch_embed", 50, 54), ("block_0", 52, 60), ("norm", 58, 59), ("norm", 91, 91)]
    found = with_events(spans)
    assert (found.spikes_E.tolist(), found.dips_E.tolist()) == ([50, 91], [60])
    assert found.delays_E is not None and found.delays_E.tolist() == [8, 0]
    assert len(found.steps_K) == 20


def test_a_spike_counts_once_however_many_layers_it_moves() -> None:
    # 18 spikes, each in four layers that come 10 steps apart, two steps long
    spans = [
        (f"block_{layer}", 100 * spike + 10 * layer, 100 * spike + 10 * layer + 1)
        for spike in range(18)
        for layer in range(4)
    ]
    found = with_events(spans)
    assert found.spikes_E.tolist() == [100 * spike for spike in range(18)]
    assert found.delays_E is not None and found.delays_E.tolist() == [30] * 18
    # the last block 50 steps behind the first layer, as the lead says
    far = [
        (name, 200 * spike + late, 200 * spike + late)
        for spike in range(5)
        for name, late in (("patch_embed", 0), ("block_2", 50))
    ]
    assert len(with_events(far).spikes_E) == 10
    lead = Lead("patch_embed", "block_2", (50,) * 5, 50.0, (math.nan, math.nan), False)
    assert len(with_events(far, lead).spikes_E) == 5


def test_a_residual_has_neither_trend_nor_gaps() -> None:
    knn_K = np.linspace(20.0, 60.0, 300)
    knn_K[150:154] -= 5
    knn_K[40] = math.nan
    residual_K = residual_curve(knn_K)
    assert np.abs(residual_K[30:140]).max() < 0.6 and residual_K[40] == 0
    assert residual_K[151] == pytest.approx(-5, abs=0.6)
    assert residual_curve(np.full(5, math.nan)).tolist() == [0.0] * 5


def test_the_interval_of_a_share() -> None:
    """Coverage of 95 % on average over shares, and ends that stay between 0 and 1."""
    random = np.random.default_rng(5)
    shares = random.uniform(0.05, 0.95, 2000)
    hits = random.binomial(12, shares)
    ends = [wilson_interval(int(hit), 12) for hit in hits]
    covered = [low <= share <= high for (low, high), share in zip(ends, shares, strict=True)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)
    assert wilson_interval(0, 12)[0] == 0 and wilson_interval(12, 12)[1] == 1
    assert math.isnan(wilson_interval(0, 0)[0])
