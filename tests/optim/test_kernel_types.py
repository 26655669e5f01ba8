"""Scalars of one step of Adam's direction, as a parameter group gives them."""

import pytest

from mocov3_ds.optim.kernel_types import AdamTerms

GROUP = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "bias_correction": True}


def test_moments_are_corrected_for_starting_at_zero() -> None:
    terms = AdamTerms(GROUP, step=3)
    assert terms.grad_averaging and terms.gain == pytest.approx(0.1)
    assert terms.bias1 == pytest.approx(1 - 0.9**3)
    assert terms.bias2 == pytest.approx(1 - 0.99**3)
    assert terms.bias2_before == pytest.approx(1 - 0.99**2)


def test_nothing_is_divided_by_zero_at_the_first_step() -> None:
    assert AdamTerms(GROUP, step=1).bias2_before == 1.0
    assert AdamTerms(GROUP | {"eps": 0.0}, step=1).floor > 0


def test_corrections_and_averaging_can_be_off() -> None:
    options = {"bias_correction": False, "grad_averaging": False}
    terms = AdamTerms(GROUP | options, step=3)
    assert (terms.bias1, terms.bias2, terms.bias2_before, terms.gain) == (1.0, 1.0, 1.0, 1.0)
