"""The null study of the verdicts: runs as they are drawn, and what is counted of them."""

import numpy as np
import pytest

from mocov3_ds.bench import verdicts
from mocov3_ds.bench.verdicts import (
    EXCESS,
    GROWING,
    NOISES,
    PLANTED,
    QUIET_NOISES,
    STEPS,
    VerdictOptions,
    decline,
    dip,
    planted_run,
    quiet_run,
    restart,
    run_bench,
    study_null,
    study_power,
)


def test_falls_are_as_deep_and_as_long_as_they_say() -> None:
    u_K = np.array([0.0, 0.59, 0.6, 0.625, 0.65, 0.8, 1.0])
    assert dip(4.0)(u_K) == pytest.approx([0, 0, 4, 2, 0, 0, 0])
    assert restart(4.0)(u_K) == pytest.approx([0, 0, 4, 3, 2, 0, 0])
    assert decline(4.0)(u_K) == pytest.approx([0, 0, 0, 0.25, 0.5, 2, 4])


@pytest.mark.parametrize("noise", NOISES)
def test_noise_of_a_run_is_the_binomial_one_and_the_measured_one(noise: str) -> None:
    probes, count = 1000, 20_000
    series = planted_run(count, probes, lambda u_K: 0 * u_K, noise, np.random.default_rng(5))
    assert series.knn_steps_K[-1] == STEPS == series.total_steps
    saturated_K = series.knn_K[count // 2 :]  # at 20 + 40 (1 - exp(-5)) to 60 %
    assert float(saturated_K.mean()) == pytest.approx(60, abs=0.2)
    if noise != "t3":  # whose variance is estimated slowly
        expected = np.hypot(100 * np.sqrt(0.6 * 0.4 / probes), EXCESS)
        assert float(saturated_K.std()) == pytest.approx(float(expected), rel=0.03)


def test_quiet_runs_are_quiet_and_deep_falls_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    alarms, score = study_null(150, 5000, 4)
    assert {*alarms} == {*NOISES, GROWING} and sum(alarms.values()) <= 1  # of 16
    assert {*study_null(624, 5000, 1)[0]} == {*QUIET_NOISES}  # AR 0.9 needs 570 evaluations
    assert 0 <= score < 1
    monkeypatch.setattr(verdicts, "PLANTED", (verdicts.PLANTED[2], verdicts.PLANTED[4]))
    assert study_power(150, 5000, 2) == {
        "dip of 10": 1.0,
        "restart of 30 %": 1.0,
    }


def test_a_table_has_a_row_for_each_length_and_number_of_probes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verdicts, "EVALUATIONS", (50,))
    run_bench(VerdictOptions(runs=2))
    header, rule, *rows = capsys.readouterr().out.splitlines()
    assert header.count("|") == rule.count("|") == rows[0].count("|") == 5 + len(PLANTED)
    assert [row.split(" | ")[1] for row in rows] == ["1,000", "5,000", "50,000"]
    monkeypatch.setattr(verdicts, "print_events", lambda runs: print(f"{runs} runs of events"))
    run_bench(VerdictOptions(runs=3, events=True))
    assert capsys.readouterr().out == "3 runs of events\n"


def test_a_run_is_drawn_from_its_source_alone() -> None:
    one, same, other = (
        quiet_run(50, 1000, "AR 0.5", np.random.default_rng(seed)).knn_K for seed in (1, 1, 2)
    )
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_growing_noise_is_five_times_as_large_at_the_end() -> None:
    series = planted_run(20_000, 50_000, lambda u_K: 0 * u_K, GROWING, np.random.default_rng(5))
    ends = [
        float(np.diff(part).std()) / np.sqrt(2)
        for part in (series.knn_K[4000:5000], series.knn_K[-1000:])
    ]
    binomial = 100 * np.sqrt(0.6 * 0.4 / 50_000)
    expected = [np.hypot(binomial, 0.3 + 1.2 * share) for share in (0.225, 0.975)]
    assert ends == pytest.approx(expected, rel=0.08)
