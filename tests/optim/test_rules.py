"""Which tensors decay and adapt by default, and which rules are impossible."""

import math

import pytest

from mocov3_ds.optim import Rule
from mocov3_ds.optim.rules import by_dimensions, check_rule, vit_rule


def test_matrices_adapt_and_the_rest_does_not() -> None:
    for name, shape, matrix in [
        ("blocks.0.attn.qkv.weight", (9, 3), True),
        ("patch_embed.proj.weight", (9, 3, 2, 2), True),
        ("blocks.0.attn.qkv.bias", (9,), False),
        ("norm.weight", (3,), False),
        ("cls_token", (1, 1, 3), False),
        ("backbone.pos_embed", (1, 5, 3), False),
    ]:
        assert vit_rule(name, shape) == Rule(decay=matrix, adapt=matrix), name


def test_a_token_is_a_matrix_by_its_dimensions() -> None:
    rule = by_dimensions(lambda name, shape: Rule(decay=0.5 * (name == "b"), lr_multiplier=2))
    assert rule("cls_token", (1, 1, 3)) == Rule(decay=1, adapt=True, lr_multiplier=2)
    assert rule("b", (3,)) == Rule(decay=0.5, adapt=False, lr_multiplier=2)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(decay=-1), "decay -1; it must be 0 or above"),
        (Rule(decay=math.nan), "decay nan"),
        (Rule(lr_multiplier=0), "lr_multiplier 0; it must be above 0"),
    ],
)
def test_impossible_rules(rule: Rule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_rule(rule, "w")
