"""What is derived for DeepSpeed, what is refused, and what each shipped JSON says."""

import json
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from mocov3_ds.distributed.engine_config import compute_dtype, engine_config
from mocov3_ds.optim.build import check_block
from mocov3_ds.recipes import RECIPES
from tests.ds_configs import CONFIGS, FOLDER, SHIPPED


def test_batch_sizes_are_derived_and_clipping_is_off() -> None:
    config = engine_config({}, global_batch=4096, world_size=8)
    assert config["train_batch_size"] == 4096
    assert config["train_micro_batch_size_per_gpu"] == 512
    assert config["gradient_accumulation_steps"] == 1
    assert config["gradient_clipping"] == 0.0
    assert config["zero_optimization"]["stage"] == 1


def test_agreeing_and_auto_values_pass() -> None:
    given = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": "auto"}
    assert engine_config(given, global_batch=64, world_size=2)["train_batch_size"] == 64


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"train_batch_size": 128},
            "train_batch_size = 128, but --batch 64 on 2 ranks makes it 64",
        ),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps = 4"),
        (
            {"zero_optimisation": {}},
            "unknown key 'zero_optimisation' .did you mean zero_optimization",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "'scheduler' has no effect here"),
        ({"zero_optimization": {"stage": 4}}, "stage is 4; it must be a whole number 0 to 3"),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "fp16 at ZeRO stage 0"),
        ({"zero_optimization": 3}, "zero_optimization is 3; it must be an object"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": "true"}}, "enables fp16 and bf16"),
        ({"data_types": {"param_dtype": "bf16"}}, "param_dtype is bf16, but the weights are fp32"),
        (
            {"zero_optimization": {"stage": 2}, "prescale_gradients": True},
            "for ZeRO stages 0 and 1",
        ),
        ({"zero_optimization": {"allgather_bucket_size": 3}}, "bucket_size is 3; it must be even"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "compute_grad_norm is false"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param.device is nvme",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param.device is cpu, which has no effect at stage 2",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "offload_optimizer.ratio",
        ),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "bf16.check_grad_overflow"),
    ],
)
def test_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        engine_config(given, global_batch=64, world_size=2)


def test_indivisible_batch_names_the_neighbours() -> None:
    with pytest.raises(ValueError, match=r"batch 100 does not divide over 3 ranks; .* 99 or 102"):
        engine_config({}, global_batch=100, world_size=3)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_config_is_what_its_name_says(name: str) -> None:
    config = CONFIGS[name]
    stage, optimizer, precision, offload, card = re.fullmatch(
        r"zero(\d)_(\w+?)_(bf16|fp16|fp32)(_offload)?(_\d+gb)?", name
    ).groups()  # type: ignore[union-attr]
    assert config["zero_optimization"]["stage"] == int(stage)
    assert config["optimizer"]["type"].lower() == optimizer
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    assert compute_dtype(config) == dtype
    assert ("offload_optimizer" in config["zero_optimization"]) == bool(offload)
    buckets = {None: None, "_24gb": 25_000_000, "_40gb": 50_000_000, "_80gb": 200_000_000}
    assert config["zero_optimization"].get("reduce_bucket_size") == buckets[card]
    engine_config(config, global_batch=8, world_size=2)


OF_TWO = [path for path in SHIPPED if not {"lars", "muon"} & {*path.stem.split("_")}]


@pytest.mark.parametrize("path", OF_TWO, ids=lambda p: p.stem)
def test_each_shipped_file_is_one_of_them(path: Path) -> None:
    assert json.loads(path.read_text()) == CONFIGS[path.stem]


@pytest.mark.parametrize("recipe", ["vit_s16", "vit_b16", "vit_l16", "vit_h14"])
def test_files_and_recipes_agree(recipe: str) -> None:
    file, own = deepcopy(CONFIGS["zero1_adamw_bf16"]), dict(RECIPES[recipe].engine)
    assert file["optimizer"]["params"].pop("eps") == 1e-8  # AdamW's own default
    assert file == own


def test_the_file_for_muon_is_that_of_adamw_with_a_momentum() -> None:
    file = json.loads((FOLDER / "zero1_muon_bf16.json").read_text())
    check_block(file["optimizer"])
    assert file["optimizer"]["params"].pop("momentum") == 0.95
    file["optimizer"]["type"] = "AdamW"
    assert file == CONFIGS["zero1_adamw_bf16"]


def test_the_file_for_lars_is_that_of_the_resnet() -> None:
    file = json.loads((FOLDER / "zero1_lars_bf16.json").read_text())
    assert file == dict(RECIPES["r50"].engine)
