"""Do saved tensors belong to a module? Names and shapes are compared before anything is loaded."""

from collections.abc import Mapping

from torch import Tensor


def differing_tensors(expected: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> list[str]:
    """Names that only one of two state dicts has, or whose shapes differ, sorted.

    Args:
        expected: state dict of the module that is to be filled.
        present: saved tensors by name.
    """
    names = {*expected} ^ {*present}
    names |= {n for n in {*expected} & {*present} if expected[n].shape != present[n].shape}
    return sorted(names)
