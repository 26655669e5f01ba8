"""Thresholds of falls, set by simulation."""

import json

import numpy as np
import pytest

from mocov3_ds.stability.calibrate import KINDS, calibrate_length, kinds_for
from mocov3_ds.stability.drops import TABLE, smallest_drop, threshold
from mocov3_ds.stability.knn_noise import Noise


@pytest.mark.parametrize("kind", KINDS)
def test_noise_of_each_kind_has_its_deviation_and_correlation(kind: str) -> None:
    phi, draw = KINDS[kind]
    noise = draw(200_000, np.random.default_rng(3))
    expected = 0.45 if kind.startswith("half") else phi  # half the variance is white
    found = float(np.corrcoef(noise[1:], noise[:-1])[0, 1])
    assert found == pytest.approx(expected, abs=0.02)
    if kind != "t3":  # whose variance is estimated slowly
        assert float(noise.std()) == pytest.approx(1, abs=0.03)


def test_the_table_is_the_simulation_s() -> None:
    table = json.loads(TABLE.read_text())
    assert [*table] == ["8", "12", "20", "40", "60", "150", "300", "624", "1560", "5000"]
    assert calibrate_length(12) == table["12"]
    assert threshold(12, remembers=False) == table["12"]["threshold"]
    for row in table.values():
        assert row["threshold"] <= row["remembers"]
        assert all(row[kind] <= 2.5 for kind in KINDS if kind in row)
    assert threshold(900, remembers=False) < threshold(900) <= 5
    assert kinds_for(20) == ["Gaussian", "t3"] and kinds_for(5000) == [*KINDS]
    narrow, wide = (smallest_drop(624, Noise(0.8), width) for width in (3, 100))
    assert narrow > 2 * wide > 0
    assert Noise(0.6, 0.6, 0.9).remembers and not Noise(0.8, 0.3, 0.9).remembers
