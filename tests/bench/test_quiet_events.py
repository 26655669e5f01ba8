"""Quiet losses and gradients as they are drawn, and what is counted of them."""

import numpy as np
import pytest

from mocov3_ds.bench import quiet_events
from mocov3_ds.bench.quiet_events import (
    GRADIENT_NOISE,
    GRADIENT_NOISES,
    LOSS_NOISE,
    LOSS_NOISES,
    gradient_alarms,
    gradient_power,
    loss_alarms,
    loss_power,
    print_events,
    quiet_gradients,
    quiet_loss,
)


@pytest.mark.parametrize("noise", LOSS_NOISES)
def test_a_loss_falls_and_so_does_its_noise(noise: str) -> None:
    loss = quiet_loss(40_000, noise, np.random.default_rng(0))
    early, late = np.log(loss[:400]), np.log(loss[-400:])
    assert np.exp(early.mean()) == pytest.approx(6.6, rel=0.02)
    assert np.exp(late.mean()) == pytest.approx(3.0, rel=0.02)
    if noise == "Gaussian":
        deviations = [np.diff(part).std() / 2**0.5 for part in (early, late)]
        assert deviations == pytest.approx([4 * LOSS_NOISE, LOSS_NOISE], rel=0.15)


@pytest.mark.parametrize("noise", GRADIENT_NOISES)
def test_gradients_have_their_noise_and_share_half_of_it(noise: str) -> None:
    log_GT = np.log(quiet_gradients(3, 50_000, noise, np.random.default_rng(1)))
    log_GT -= np.log(0.5) * np.arange(50_000) / 50_000
    assert log_GT.std(axis=1) == pytest.approx([GRADIENT_NOISE] * 3, rel=0.1)
    assert np.corrcoef(log_GT)[0, 1:] == pytest.approx([0.5, 0.5], abs=0.08)


def test_quiet_series_have_no_events_and_large_spikes_are_found() -> None:
    assert loss_alarms(1000, "Gaussian", 20) == 0 == gradient_alarms(3, 1000, "log-normal", 6)
    assert loss_power(1000, "Gaussian", 1.2, 10) == 1 and loss_power(1000, "Gaussian", 1, 3) == 0
    assert gradient_power(3, 1000, "log-normal", 30, 5) == 1
    assert gradient_power(3, 1000, "log-normal", 1, 3) == 0


def test_tables_have_a_line_for_each_length_and_noise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quiet_events, "LENGTHS", (300,))
    monkeypatch.setattr(quiet_events, "LOSS_LENGTHS", (64, 300))
    monkeypatch.setattr(quiet_events, "LAYERS", (3,))
    print_events(2)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith(("| 64", "| 300", "| 3 |"))]
    assert len(lines) == 2 * len(LOSS_NOISES) + len(GRADIENT_NOISES)
    assert "0 of 4" in lines[0]
