"""Schedules at the points that can be worked out by hand."""

import math

import pytest

from mocov3_ds.config.parts import MocoConfig
from mocov3_ds.config.run_config import Config
from mocov3_ds.training.schedule import (
    describe_rules,
    encoder_momentum,
    learning_rate,
    momentum_for_batch,
    scaled_rate,
)


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


def test_other_rules_of_the_rate() -> None:
    assert scaled_rate(2e-3, 1024, "sqrt") == pytest.approx(4e-3)
    assert scaled_rate(2e-3, 64, "sqrt") == pytest.approx(1e-3)
    assert scaled_rate(2e-3, 4096, "none") == 2e-3


def test_the_momentum_of_a_batch_forgets_as_much_over_as_many_images() -> None:
    """The same weights go through 8 steps of 256 images, and 1 step of 2048."""
    shares = []
    for batch in (256, 2048):
        kept = 1.0
        for _ in range(2048 // batch):
            kept *= momentum_for_batch(0.99, batch, 256)
        shares.append(kept)
    assert shares == pytest.approx([0.99**8] * 2)
    assert momentum_for_batch(0.99, 64, 256) == pytest.approx(0.99**0.25)
    assert momentum_for_batch(0.99, 2048, 0) == 0.99
    assert momentum_for_batch(1.0, 2048, 256) == 1.0


def test_the_rules_are_told() -> None:
    config = Config(batch=1024, rate_rule="sqrt", moco=MocoConfig(momentum_batch=256))
    told = describe_rules(config, scaled_rate(2e-3, 1024, "sqrt"))
    assert "peak lr 0.004 = 0.002 x sqrt(1024 / 256) (sqrt rule)" in told
    assert "momentum 0.960596 = 0.99^(1024 / 256)" in told
    assert "linear" in describe_rules(Config(), 2.4e-3) and "^" not in describe_rules(Config(), 1)
