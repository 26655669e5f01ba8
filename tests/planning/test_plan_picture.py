"""The picture of what fills a card: a bar for each stage, as long as its bytes."""

from pathlib import Path

import numpy as np
from PIL import Image

from mocov3_ds.planning.plan_picture import draw_plan
from tests.planning.test_plan_text import make_plan


def test_a_bar_is_as_long_as_the_memory(tmp_path: Path) -> None:
    plan = make_plan("8xA100-80GB")
    draw_plan(tmp_path / "folder/plan.png", plan)
    with Image.open(tmp_path / "folder/plan.png") as image:
        assert image.width == 1180
        pixels_HWC = np.asarray(image.convert("RGB"))
    best = {option.setup.stage: option for option in reversed(plan.options)}
    lengths = []
    for row in range(len(best)):
        line_WC = pixels_HWC[80 + 60 * row + 10, 300:]
        coloured_W = (line_WC.max(1).astype(int) - line_WC.min(1)) > 30  # neither grey nor white
        lengths.append(int(np.flatnonzero(coloured_W)[-1]) + 1)
    scale = (1180 - 300 - 90) / plan.cluster.card.memory_bytes
    for stage, length in enumerate(lengths):
        assert abs(length - best[stage].memory.peak_bytes * scale) <= 3
