"""The names and sizes that other programs know."""

from dataclasses import replace

import pytest
import torch

from mocov3_ds.encoders.foreign_names import (
    architecture_names,
    has_qk_norm,
    infer_shape,
    timm_sizes,
    to_timm,
    to_transformers,
)
from mocov3_ds.model.vit import PAPER_SHAPES
from tests.encoders.test_load import BASE, MOMENTUM, SHAPE, published


def test_transformers_names_come_back() -> None:
    backbone = to_timm(to_transformers(BASE.state_dict()))
    assert {*backbone} == {*BASE.state_dict()}
    assert all(torch.equal(backbone[n], t) for n, t in BASE.state_dict().items())


def test_both_encoders_come_back_from_the_published_names() -> None:
    state = published()["state_dict"]
    for role, encoder in (("base", BASE), ("momentum", MOMENTUM)):
        backbone = to_timm(state, role)  # type: ignore[arg-type]
        assert all(torch.equal(backbone[n], t) for n, t in encoder.state_dict().items())


def test_sizes_are_seen_from_the_weights() -> None:
    tensors = BASE.state_dict()
    assert infer_shape(tensors, SHAPE.heads) == SHAPE
    with pytest.raises(ValueError, match="width 32 do not tell the number of attention heads"):
        infer_shape(tensors)
    with pytest.raises(ValueError, match="its 16 positions are no square grid"):
        infer_shape(tensors | {"pos_embed": torch.zeros(1, 16, 32)}, SHAPE.heads)


def test_a_foreign_tensor_has_no_name_in_transformers() -> None:
    with pytest.raises(AssertionError, match="fc is no weight of a Vision Transformer"):
        to_transformers({"fc": torch.zeros(1)})


def test_architectures_have_their_names_at_any_image_size() -> None:
    small = PAPER_SHAPES["vit_s16"]
    assert architecture_names(small) == ("vit_small_patch16_224", "vit_small")
    assert architecture_names(replace(small, image_size=384))[1] == "vit_small"
    assert architecture_names(SHAPE) == ("vit_base_patch16_224", "vit_32_2_4")
    assert timm_sizes(SHAPE)["embed_dim"] == 32
    assert "qk_norm" not in timm_sizes(SHAPE)
    assert timm_sizes(SHAPE, ["blocks.0.attn.q_norm.weight"])["qk_norm"]
    assert "init_values" not in timm_sizes(SHAPE, BASE.state_dict())
    assert timm_sizes(SHAPE, ["blocks.0.ls1.gamma"])["init_values"]
    assert has_qk_norm(["blocks.0.attn.q_norm.weight"])
    assert not has_qk_norm(BASE.state_dict())


def test_modules_of_transformers_5_have_other_names() -> None:
    names = {"encoder.layer.": "layers.", "attention.attention.query": "attention.q_proj",
             "attention.attention.key": "attention.k_proj",
             "attention.attention.value": "attention.v_proj",
             "attention.output.dense": "attention.o_proj", "intermediate.dense": "mlp.fc1",
             "output.dense": "mlp.fc2"}  # fmt: skip
    tensors = {}
    for name, tensor in to_transformers(BASE.state_dict()).items():
        for older, newer in names.items():
            name = name.replace(older, newer)
        tensors[f"vit.{name}"] = tensor
    backbone = to_timm(tensors)
    assert all(torch.equal(backbone[n], t) for n, t in BASE.state_dict().items())
