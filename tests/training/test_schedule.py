"""Schedules at the points that can be worked out by hand."""

import math

import pytest

from mocov3_ds.training.schedule import encoder_momentum, learning_rate, scaled_rate


def test_learning_rate() -> None:
    def at(step: int) -> float:
        return learning_rate(step, peak=2.0, warmup_steps=10, total_steps=110)

    assert at(0) == 0.0
    assert at(5) == 1.0
    assert at(10) == 2.0
    assert at(60) == pytest.approx(1.0)
    assert at(110) == pytest.approx(0.0, abs=1e-12)
    assert at(35) == pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_learning_rate_without_warmup_starts_at_the_peak() -> None:
    assert learning_rate(0, peak=1.0, warmup_steps=0, total_steps=4) == 1.0


def test_a_constant_rate_follows_the_warmup() -> None:
    rates = [
        learning_rate(step, peak=2.0, warmup_steps=4, total_steps=9, cosine=False)
        for step in range(9)
    ]
    assert rates == [0.0, 0.5, 1.0, 1.5, *[2.0] * 5]


def test_encoder_momentum() -> None:
    assert encoder_momentum(0, start=0.99, total_steps=100) == pytest.approx(0.99)
    assert encoder_momentum(50, start=0.99, total_steps=100) == pytest.approx(0.995)
    assert encoder_momentum(100, start=0.99, total_steps=100) == 1.0
    assert encoder_momentum(50, start=0.9, total_steps=100, cosine=False) == 0.9


def test_linear_rule_is_the_papers() -> None:
    assert scaled_rate(1.5e-4, 4096) == pytest.approx(2.4e-3)
