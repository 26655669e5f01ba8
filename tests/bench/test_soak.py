"""The soak: its table is complete, its verdict sees what grows, a short run stays small."""

from pathlib import Path

import pytest

from mocov3_ds.bench import soak
from mocov3_ds.bench.soak import Row, SoakOptions


def rows(mib_a_step: float = 0.0, files_a_row: int = 0, threads_a_row: int = 0) -> list[Row]:
    """A made-up run of 20,000 steps: caches fill in the first tenth, checkpoints come and go."""
    return [
        Row(
            step=1000 * n,
            seconds=10.0 * n,
            rss_mib=400 + min(n, 2) * 20 + 1000 * n * mib_a_step + (n % 3) * 0.1,
            files=30 + n % 2 + files_a_row * n,
            threads=12 + (n % 4 == 0) + threads_a_row * n,
        )
        for n in range(1, 21)
    ]


def test_a_flat_run_is_flat() -> None:
    growth = soak.measure_growth(rows())
    assert growth.is_flat, growth
    assert abs(growth.mib_per_100k) < 5


@pytest.mark.parametrize(
    ("grown", "words"),
    [
        (rows(mib_a_step=1 / 1024), "resident set +9"),  # one KiB a step
        (rows(files_a_row=1), "open files +1"),
        (rows(threads_a_row=2), "threads +2"),
    ],
)
def test_what_grows_is_seen(grown: list[Row], words: str) -> None:
    growth = soak.measure_growth(grown)
    assert not growth.is_flat
    assert f"{growth}".startswith("NOT flat")
    assert words in f"{growth}"


def test_too_few_rows_are_not_judged() -> None:
    with pytest.raises(ValueError, match="3 rows are too few"):
        soak.measure_growth(rows()[:3])


@pytest.mark.slow
def test_a_short_run_has_all_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = list(soak.run_training(SoakOptions(steps=300, every=60), tmp_path))
    assert len(done) >= 4  # the process may end before the last row is read
    for row, due in zip(done, range(60, 301, 60), strict=False):
        assert due <= row.step < due + 60
    assert max(r.rss_mib for r in done) - done[0].rss_mib < 64
    assert max(r.files for r in done) - done[0].files < 12
    assert (tmp_path / "soak/checkpoints/latest").read_text().strip() == "step-00000300"
    with pytest.raises(ValueError, match="holds a soak run already"):
        list(soak.run_training(SoakOptions(steps=300), tmp_path))


@pytest.mark.slow
def test_a_failing_run_is_told(tmp_path: Path) -> None:
    (tmp_path / "soak").mkdir()
    (tmp_path / "soak/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"ended with status 2: .*is not empty"):
        list(soak.run_training(SoakOptions(steps=100), tmp_path))
