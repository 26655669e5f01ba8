"""The law of large batches: on a noisy quadratic by its own arithmetic, and from a run's log."""

import json
from pathlib import Path

import pytest

from mocov3_ds.planning.command import run_plan
from mocov3_ds.planning.critical_batch import (
    NoiseScale,
    describe_critical_batch,
    find_noise_scale,
    relative_images,
    relative_steps,
)
from mocov3_ds.planning.flags import PlanOptions


def test_the_law_is_that_of_the_best_step_on_a_noisy_quadratic() -> None:
    """Loss h w^2 / 2, gradient h w + noise / sqrt(B): the best rate of each batch by search."""
    h, w, variance = 2.0, 3.0, 50.0

    def largest_gain(batch: float) -> float:
        rates = [i * 1e-5 / h for i in range(1, 100001)]
        square = (h * w) ** 2
        return max(r * square - 0.5 * h * r * r * (square + variance / batch) for r in rates)

    noise = variance / (h * w) ** 2
    endless = largest_gain(1e12)
    for batch in (0.2, 1.0, 7.0):
        steps = endless / largest_gain(batch)
        assert relative_steps(batch, noise) == pytest.approx(steps, rel=1e-6)
        fewest_images = noise * 1.0
        assert relative_images(batch, noise) == pytest.approx(batch * steps / fewest_images)


def write_log(run: Path, rows: list[dict[str, float]]) -> None:
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_runs_noise_scale_is_a_ratio_of_means(tmp_path: Path) -> None:
    rows = [
        {"step": 10, "noise_trace": 9e9, "gradient_square": 1.0},  # of the first half
        {"step": 20, "loss": 1.0},
        {"step": 30, "noise_trace": 1000.0, "gradient_square": 1.5},
        {"step": 40, "noise_trace": 3000.0, "gradient_square": 0.5},
    ]
    write_log(tmp_path / "run", rows)
    noise = find_noise_scale(str(tmp_path / "run"))
    assert noise.images == pytest.approx(4000 / 2)
    assert "2 measurements from step 30 on" in noise.source and noise.batch == 0
    (tmp_path / "run/config.json").write_text('{"config": {"batch": 96}}')
    assert find_noise_scale(str(tmp_path / "run")).batch == 96
    assert find_noise_scale("512").images == 512


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"step": 1, "loss": 2.0}], "has no noise_trace and gradient_square"),
        ([{"step": 1, "noise_trace": 5.0, "gradient_square": -1.0}], "give no noise scale"),
    ],
)
def test_logs_without_a_noise_scale(
    tmp_path: Path, rows: list[dict[str, float]], words: str
) -> None:
    write_log(tmp_path / "run", rows)
    with pytest.raises(ValueError, match=words):
        find_noise_scale(str(tmp_path / "run"))


@pytest.mark.parametrize("given", ["0", "-3", "nan", "nowhere"])
def test_what_is_no_noise_scale(given: str) -> None:
    with pytest.raises(ValueError, match=f"--critical_batch {given}"):
        find_noise_scale(given)


def test_a_run_is_compared_with_its_own_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    write_log(run, [{"step": 1, "noise_trace": 96.0, "gradient_square": 1.0}])
    (run / "config.json").write_text('{"config": {"batch": 96}}')
    run_plan(PlanOptions(critical_batch=str(run)))
    assert "batch 96 = 1" in capsys.readouterr().out
    run_plan(PlanOptions(critical_batch=str(run), batch=32))
    assert "batch 32 = 1" in capsys.readouterr().out
    run_plan(PlanOptions(critical_batch="96", recipe="tiny", batch=8))
    assert "batch 8 = 1" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--recipe tiny would have no effect beside"):
        run_plan(PlanOptions(critical_batch=str(run), recipe="tiny"))
    with pytest.raises(ValueError, match="--batch -8 has nothing to contrast"):
        run_plan(PlanOptions(critical_batch="96", batch=-8))


def test_the_table() -> None:
    text = describe_critical_batch(NoiseScale(4096, "as given"), 4096)
    assert "noise scale 4,096 images (as given)" in text
    cells = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line[:1] == " "}
    assert cells["4096"] == ["1.00", "1.00"]
    assert cells["8192"] == ["0.75", "1.50"]  # (1 + 1/2) / 2, (1 + 2) / 2
    assert cells["2048"] == ["1.50", "0.75"]
    assert "Twice the batch saves 25% of the steps and costs 50% more images" in text
