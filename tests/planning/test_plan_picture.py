"""The picture of what fills a card: a bar for each stage, as long as its bytes, with a scale."""

from pathlib import Path

import pytest
from matplotlib.container import BarContainer
from PIL import Image

from mocov3_ds.planning.cards import GIB
from mocov3_ds.planning.plan_picture import draw_plan, picture_plan
from tests.planning.test_plan_text import make_plan


def test_a_bar_is_as_long_as_the_memory_and_says_so() -> None:
    plan = make_plan("8xA100-80GB")
    [axes] = picture_plan(plan).axes
    best = {option.setup.stage: option for option in reversed(plan.options)}
    ends: dict[float, float] = {}
    for container in axes.containers:
        assert isinstance(container, BarContainer)
        for bar in container.patches:
            row = round(bar.get_y() + bar.get_height() / 2)
            ends[row] = max(ends.get(row, 0.0), bar.get_x() + bar.get_width())
    for row, (_, option) in enumerate(sorted(best.items())):
        assert ends[row] == pytest.approx(option.memory.peak_bytes / GIB)
    texts = [text.get_text() for text in axes.texts]
    assert (
        "card: 80.0" in texts and f"may be filled: {plan.cluster.usable_bytes / GIB:.1f}" in texts
    )
    assert f" {best[1].memory.peak_bytes / GIB:.1f}" in texts
    assert axes.get_xlabel().startswith("GiB")
    assert [tick.get_text().split("\n")[0] for tick in axes.get_yticklabels()] == [
        f"ZeRO-{stage}" for stage in sorted(best)
    ]


def test_a_file_is_written_into_a_new_folder(tmp_path: Path) -> None:
    draw_plan(tmp_path / "folder/plan.png", make_plan())
    with Image.open(tmp_path / "folder/plan.png") as image:
        assert image.width > 1000
