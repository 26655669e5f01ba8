"""Recipes and the one parser: precedence, launcher flags, errors."""

import json
from pathlib import Path

import pytest

from mocov3_ds.model.shapes import TimmShape
from mocov3_ds.recipes import RECIPES, parse, with_overrides


def test_no_arguments_is_the_tiny_recipe() -> None:
    run = parse([])
    assert run.config == RECIPES["tiny"].config
    assert run.config.folder == Path("runs/tiny")


def test_recipe_then_flags() -> None:
    run = parse(["--recipe", "vit_l16", "--batch", "8192", "--data.shards", "x"])
    assert (run.config.model.dim, run.config.model.depth) == (1024, 24)
    assert run.config.batch == 8192
    assert run.engine["optimizer"]["params"]["lr"] == 1.5e-4


@pytest.mark.parametrize("flag", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=0"]])
def test_launcher_flags_are_swallowed(flag: list[str]) -> None:
    assert parse([*flag, "--seed", "3"]).config.seed == 3


def test_deepspeed_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}))
    run = parse(
        [
            *("--deepspeed_config", str(path), "--ds", "zero_optimization.stage=2"),
            *("--ds", "fp16.enabled=False", "--ds", "communication_data_type=fp32"),
        ]
    )
    assert run.engine["zero_optimization"]["stage"] == 2
    assert run.engine["bf16"] == {"enabled": True}
    assert run.engine["fp16"] == {"enabled": False}
    assert run.engine["communication_data_type"] == "fp32"
    assert run.engine["optimizer"] == RECIPES["tiny"].engine["optimizer"]


def test_an_optimizer_block_in_the_file_wins(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"optimizer": {"type": "Lamb", "params": {"lr": 1}}}))
    assert parse(["--deepspeed_config", str(path)]).engine["optimizer"]["type"] == "Lamb"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--recipe", "vit_b"], "no recipe 'vit_b' .did you mean vit_b16"),
        (["--deepspeed_config", "nowhere.json"], "no DeepSpeed config nowhere.json"),
        (["--ds", "stage"], "not of the form key.sub=value"),
        (["--ds", "optimizer.type.x=1"], "'type' holds 'AdamW', not an object"),
        (["--ds", "zero_optimization.stagee=2"], "unknown key 'stagee' in zero_optimization"),
        (
            ["--ds", 'bf16={"enabled": true, "enabled": false}'],
            "has the key 'enabled' twice",
        ),
        (["--seed", f"{2**70}"], "--seed 1180591620717411303424 cannot be"),
        (["--save.mirror", "s3:/bucket/x"], "for a store write s3://"),
        (["--ds", "bf16.enabled=auto"], 'bf16.enabled is "auto" where it must be true or false'),
        (["--batch", "1"], "--batch 1 has nothing to contrast"),
    ],
)
def test_errors(argv: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(argv)


def test_json_that_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, not a JSON object"):
        parse(["--deepspeed_config", str(path)])
    path.write_text('{"bf16": {}, "fp16": {}, "bf16": {"enabled": true}}')
    with pytest.raises(ValueError, match=r"ds\.json has the key 'bf16' twice in one object"):
        parse(["--deepspeed_config", str(path)])
    path.write_text('{"wandb":' * 300 + "1" + "}" * 300)
    with pytest.raises(ValueError, match="nested more than 50 levels deep"):
        parse(["--deepspeed_config", str(path)])
    with pytest.raises(ValueError, match="nested more than 50 levels deep"):
        parse(["--ds", f"wandb={path.read_text()}"])
    with pytest.raises(ValueError, match=r"cannot be read: Is a directory"):
        parse(["--deepspeed_config", str(tmp_path)])
    for damaged in (b"{", b'{"a": "\xff"}', b"[" * 100_000):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"ds\.json is not valid JSON"):
            parse(["--deepspeed_config", str(path)])


def test_unknown_flag_ends_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--bach", "12"])
    assert ended.value.code != 0
    assert "--batch" in capsys.readouterr().err


def test_overrides_do_not_touch_the_recipe() -> None:
    before = json.dumps(RECIPES["tiny"].engine)
    with_overrides(RECIPES["tiny"].engine, ["optimizer.params.lr=9"])
    assert json.dumps(RECIPES["tiny"].engine) == before


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_name_themselves(name: str) -> None:
    assert RECIPES[name].config.recipe == name


# defaults of main_moco.py, and CONFIG.md of the authors' code
@pytest.mark.parametrize(
    ("name", "epochs", "lr", "decay", "momentum"),
    [("r50", 100, 0.6, 1e-6, 0.99), ("r50_1000", 1000, 0.3, 1.5e-6, 0.996)],
)
def test_the_published_resnets_values(
    name: str, epochs: int, lr: float, decay: float, momentum: float
) -> None:
    config, engine = RECIPES[name].config, RECIPES[name].engine
    assert (config.batch, config.epochs, config.warmup_epochs) == (4096, epochs, 10)
    assert (config.moco.temperature, config.moco.momentum) == (1.0, momentum)
    assert config.moco.momentum_schedule == "cosine" and config.views.crop_min == 0.2
    assert config.views.blur_p == (1.0, 0.1) and config.views.solarise_p == (0.0, 0.2)
    model = config.model
    assert (model.backbone, model.projector_layers, model.predictor_norm) == ("resnet50", 2, False)
    assert (model.hidden, model.out) == (4096, 256)
    assert engine["optimizer"]["type"] == "Lars"
    params = engine["optimizer"]["params"]
    assert (params["lr"], params["weight_decay"], params["momentum"]) == (lr, decay, 0.9)
    assert params["moco_v3"] and params["trust_coeff"] == 1e-3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.backbone", "resnet5O"], r"is not known \(did you mean resnet50\?\)"),
        (["--model.backbone", "resnet50", "--model.dim", "64"], "--model.dim 64 has no effect on"),
        (["--model.backbone", "vit_conv", "--model.patch_lr", "1"], "--model.patch_lr 1.0 has no"),
        (["--model.backbone", "vit_conv_s16", "--model.depth", "3"], "--model.depth 3 has no eff"),
        (["--model.backbone", "timm:resnet18", "--model.qk_norm"], "--model.qk_norm True has no"),
        (["--model.timm", "embed_dim=3"], "has no effect on --model.backbone vit"),
        (["--model.backbone", "vit_conv_b16", "--model.group_lr", "block_11=0"], "names no layer"),
        (["--model.projector_layers", "0"], "projector_layers"),
    ],
)
def test_settings_of_a_backbone_that_name_nothing(flags: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(flags)


def test_backbones_by_name() -> None:
    assert parse(["--model.backbone", "vit_conv_s16"]).config.vit.dim == 384
    conv = parse(["--recipe", "tiny", "--model.backbone", "vit_conv"]).config.vit
    assert (conv.dim, conv.stem, conv.size) == (128, "conv", (32, 32))
    flags = ["--model.timm", "depths=[1,1]", "--model.timm", "mlp_ratio=2"]
    config = parse(["--model.backbone", "timm:swin_tiny_patch4_window7_224", *flags]).config
    shape = config.backbone
    assert isinstance(shape, TimmShape) and shape.name == "swin_tiny_patch4_window7_224"
    assert shape.arguments == ("depths=[1,1]", "mlp_ratio=2") and shape.size == (32, 32)
    with pytest.raises(ValueError, match="none of the Vision Transformers of this program"):
        _ = config.vit


# Sec. 5 of the paper and CONFIG.md of its code
@pytest.mark.parametrize("name", ["vit_s16", "vit_b16", "vit_l16", "vit_h14"])
def test_the_papers_values(name: str) -> None:
    config, engine = RECIPES[name].config, RECIPES[name].engine
    assert (config.batch, config.epochs, config.warmup_epochs) == (4096, 300, 40)
    assert (config.moco.temperature, config.moco.momentum) == (0.2, 0.99)
    assert (config.model.hidden, config.model.out, config.model.patch_lr) == (4096, 256, 0.0)
    assert config.views.crop_min == 0.08
    assert engine["optimizer"]["params"] == {
        "lr": 1.5e-4, "betas": [0.9, 0.999], "weight_decay": 0.1}  # fmt: skip
