"""The table of launches: its columns add up, and a step of ViT-S stays below its bounds."""

from pathlib import Path

import pytest

from mocov3_ds.bench import launches
from mocov3_ds.bench.launches import LaunchesOptions
from tests.fake_gpu.card import build_library

STEP = {
    "phases": {"views: copy": 20, "queries: heads": 5, "backward: backbones": 7, "all else": 1},
    "syncs": 2,
    "to_device_bytes": 154_188_740,
    "within_bytes": 172_400_000,
    "allocated_gb": 28.551,
    "reserved_gb": 28.96,
    "places": {"stream: step.py:1": 2},
}


def test_a_row_adds_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(launches, "count_step", lambda *_: (STEP, "bf16, chunks of 43 images"))
    launches.print_row("vit_s16", 8, 3, LaunchesOptions(places=True), tmp_path)
    row, places = capsys.readouterr().out.splitlines()
    assert row == (
        "| vit_s16 | 512 | 8 | 3 | 43 | 33 | 20 | 5 | 0 | 0 | 0 | 7 | 0 | 1 | 2 | 154.2 | 172 "
        "| 28.55 | 28.96 |"
    )
    assert places.strip() == "2 x stream: step.py:1"


@pytest.mark.slow
def test_a_step_of_vit_s_waits_little_and_launches_half_of_what_it_did(tmp_path: Path) -> None:
    build_library()  # or the test is skipped
    launches.draw_images(tmp_path / "images", 16)
    options = LaunchesOptions(batch=8)
    step, output = launches.count_step("vit_s16", 8, 1, 1, options, tmp_path)
    assert "1 rank" in output and sum(step["phases"].values()) <= 4975 / 2
    assert step["phases"]["momentum encoder: its move"] == 1
    assert step["syncs"] <= 2 and not step["mistakes"]
