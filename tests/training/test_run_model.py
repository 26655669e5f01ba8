"""The networks that settings describe: the seed decides the weights, a loss may be given."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mocov3_ds.config.parts import MocoConfig, ModelConfig, ViewConfig
from mocov3_ds.config.run_config import Config
from mocov3_ds.model.loss import ContrastiveLoss
from mocov3_ds.training.run_model import build_model, start_momentum_encoder, trained_parameters

CONFIG = Config(
    batch=64,
    views=ViewConfig(image_size=16),
    model=ModelConfig(patch_size=8, dim=24, depth=2, heads=3, hidden=20, out=12),
)


def test_the_seed_decides_the_weights() -> None:
    one, two = build_model(CONFIG, 1), build_model(CONFIG, 4)
    other = build_model(replace(CONFIG, seed=1), 1)
    for name, tensor in one.state_dict().items():
        assert torch.equal(two.state_dict()[name], tensor), name
    weight = "base.projector.0.weight"
    assert not torch.equal(other.state_dict()[weight], one.state_dict()[weight])


def test_the_loss_is_the_papers_unless_one_is_given() -> None:
    loss: Any = build_model(replace(CONFIG, moco=MocoConfig(temperature=0.3)), 2).loss
    assert isinstance(loss, ContrastiveLoss)
    assert (loss.temperature, loss.key_block) == (0.3, 0)
    assert build_model(replace(CONFIG, key_block=5), 2).loss.key_block == 5
    large = replace(CONFIG, batch=2**15)  # whose logits are streamed
    assert 0 < build_model(large, 4).loss.key_block < 2**15
    given = ContrastiveLoss(0.1)
    assert build_model(CONFIG, 1, given).loss is given


def test_a_loss_that_no_checkpoint_could_bring_back_is_refused() -> None:
    loss = ContrastiveLoss(0.1)
    loss.scale = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"'loss\.scale' has no dimension"):
        build_model(CONFIG, 1, loss)


def test_the_momentum_encoder_starts_equal_and_follows() -> None:
    model = build_model(CONFIG, 1)
    engine: Any = SimpleNamespace(module=model)
    encoder = start_momentum_encoder(CONFIG, engine, torch.device("cpu"), torch.float32)
    base = model.base.state_dict()
    for name, tensor in encoder.full_state():
        assert torch.equal(tensor, base[name]), name
    with torch.no_grad():
        for _, parameter in trained_parameters(model):
            parameter.add_(1.0)
    encoder.begin_move(0.75)
    moved = dict(encoder.named_parameters())["backbone.cls_token"]
    torch.testing.assert_close(moved, base["backbone.cls_token"] - 0.75)
    names = [name for name, _ in trained_parameters(model)]
    assert "base.backbone.pos_embed" not in names and "base.backbone.cls_token" in names


def test_chunks_are_refused_where_rows_know_each_other() -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, backbone="vit_conv"))
    build_model(config, 2)
    build_model(replace(config, chunk=32), 2)  # the rank's batch: one pass
    with pytest.raises(ValueError, match="--chunk 31 would change what is computed: ViT 24 x 2 bl"):
        build_model(replace(config, chunk=31), 2)


def test_a_network_that_cannot_recompute_is_named() -> None:
    model = replace(CONFIG.model, backbone="timm:dla34")
    with pytest.raises(ValueError, match="a DLA, cannot recompute its blocks"):
        views = ViewConfig(image_size=32)
        build_model(replace(CONFIG, model=model, views=views, recompute_blocks=True), 1)
