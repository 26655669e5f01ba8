"""Encoders are found by whole words, wherever a file keeps them."""

from typing import Any

import pytest
import torch

from mocov3_ds.encoders.networks import (
    choose_prefix,
    describe_tree,
    find_prefixes,
    flatten_tensors,
    is_average,
    is_head,
    summarise_names,
)

T = torch.zeros(1)


@pytest.mark.parametrize(
    ("prefix", "average"),
    [("semantic_encoder.", False), ("schema.", False), ("thematic.momentous.", False),
     ("retargeted.", False), ("encoder_q.", False), ("module.base_encoder.", False), ("", False),
     ("student.module.", False), ("top_k.", False), ("model_k2.", False), ("stack_key.", False),
     ("encoder_k.", True), ("model.encoder_key.", True), ("key_encoder.", True),
     ("model_ema.", True), ("state_dict_ema.", True), ("ema_state_dict.module.", True),
     ("EMA.", True), ("teacher.backbone.", True), ("target_encoder.", True), ("swa-model.", True),
     ("momentum_backbone.", True), ("averaged_model.module.", True)],
)  # fmt: skip
def test_words_tell_an_average(prefix: str, average: bool) -> None:
    assert is_average(prefix) is average
    tensors = {f"{prefix}cls_token": T}
    assert choose_prefix(tensors, "momentum" if average else "base") == prefix
    with pytest.raises(ValueError, match=r"--which (momentum|base)"):
        choose_prefix(tensors, "base" if average else "momentum")


def test_mappings_in_mappings() -> None:
    inner = {"a.cls_token": T, "n": 3}
    tensors = flatten_tensors({"x": {"y": inner}, 7: T, "list": [T]})
    assert {*tensors} == {"x.y.a.cls_token", "7"}
    with pytest.raises(ValueError, match=r"two of its tensors are called 'a\.b'"):
        flatten_tensors({"a": {"b": T}, "a.b": T})
    endless: dict[str, Any] = {}
    endless["again"] = endless
    with pytest.raises(ValueError, match="more than 16 deep"):
        flatten_tensors(endless)
    assert describe_tree({"epoch": 3, "w": T, "s": {"a": T}, "o": {"p": 1}}) == (
        "'epoch' (int), 'w' (a tensor), 's' (1 tensors), 'o' (mapping of 1)"
    )
    assert describe_tree({}) == "nothing at all"


def test_candidates() -> None:
    one, other = torch.zeros(2), torch.ones(2)
    twice = {"model.cls_token": one, "module.cls_token": one.clone()}
    assert choose_prefix(twice, "base") == "model."
    with pytest.raises(ValueError, match=r"2 base encoders; .* below 'model.', 'module.'; save"):
        choose_prefix(twice | {"module.cls_token": other}, "base")
    optimizer = {"optimizer.state.cls_token": T, "exp_avg.cls_token": T, "my_cls_token": T}
    assert find_prefixes(optimizer | {"vit.embeddings.cls_token": T}) == ["vit."]
    with pytest.raises(ValueError, match="no Vision Transformer with a class token"):
        choose_prefix({"my_cls_token": T}, "base")


def test_heads_come_after_the_features() -> None:
    for name in ("head.weight", "fc.bias", "embeddings.mask_token", "decoder_blocks.0.norm1.bias",
                 "decoder_pos_embed", "pooler.dense.weight", "pre_logits.fc.weight",
                 "projection_head.0.weight", "heads.head.bias"):  # fmt: skip
        assert is_head(name), name
    for name in ("fc_norm.weight", "dist_token", "embeddings.distillation_token", "norm.weight",
                 "blocks.0.head.weight", "reg_token", "norm_pre.weight", "attn_pool.q.weight",
                 "pos_embed", "rope.freqs", "patch_embed.norm.weight"):  # fmt: skip
        assert not is_head(name), name


def test_groups() -> None:
    names = ["m.base.head.0.weight", "m.base.head.1.weight", "m.predictor.0.bias", "optimizer.a"]
    assert summarise_names(names, "m.base.") == "m.base.head (2), m.predictor (1), optimizer (1)"
