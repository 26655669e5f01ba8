"""Which tensors keep a saved state from being loaded."""

import torch

from mocov3_ds.model.tensor_differences import differing_tensors


def test_missing_foreign_and_misshapen_tensors_are_named() -> None:
    expected = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)}
    assert differing_tensors(expected, {n: torch.ones(2) for n in "cba"}) == []
    present = {"a": torch.zeros(2), "b": torch.zeros(2, 1), "d": torch.zeros(2)}
    assert differing_tensors(expected, present) == ["b", "c", "d"]
