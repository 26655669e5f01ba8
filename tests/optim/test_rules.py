"""Which tensors decay and adapt by default, and which rules are impossible."""

import math

import pytest
import timm
import torch

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
        ("layers.0.blocks.1.attn.relative_position_bias_table", (169, 3), False),
        ("stages.1.blocks.0.attn.attention_biases", (4, 196), False),
        ("blocks.0.attn.rel_pos_h", (27, 64), False),
        ("encoder.relative_attention_bias.weight", (32, 8), False),
        ("cls_token_1", (1, 1, 3), False),
        ("blocks.0.attn.logit_scale", (4, 1, 1), False),
        ("attn_pool.proj.weight", (3, 3), True),
        ("pos_embeder.token_projection.weight", (9, 3, 1, 1), True),
    ]:
        assert vit_rule(name, shape) == Rule(decay=matrix, adapt=matrix), name


@pytest.mark.parametrize(
    "name",
    [
        *("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "beit_base_patch16_224"),
        *(
            "maxvit_tiny_rw_224",
            "levit_128s",
            "mvitv2_tiny",
            "crossvit_tiny_240",
            "xcit_nano_12_p16_224",
        ),
        *("vit_relpos_small_patch16_224", "tnt_s_patch16_224", "botnet26t_256"),
    ],
)
def test_what_timm_does_not_decay_is_no_matrix(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0)
    listed = set(getattr(network, "no_weight_decay", set)())
    shapes = {n: tuple(p.shape) for n, p in network.named_parameters() if p.dim() > 1}
    tables = {n for n, shape in shapes.items() if not vit_rule(n, shape).adapt}
    assert {n for n in shapes if n in listed} <= tables
    layers = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "conv.weight")
    assert not {n for n in tables if n.endswith(layers) and "rel_pos.mlp" not in n}


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
