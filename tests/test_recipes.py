"""Recipes and the one parser: precedence, launcher flags, errors."""

import json
from pathlib import Path

import pytest

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
