"""Settings of a cell as flags of train.py: what train.py reads is what the grid says."""

from mocov3_ds.config.run_config import Config
from mocov3_ds.optim.build import list_types
from mocov3_ds.recipes import RECIPES, parse
from mocov3_ds.stability.cell_flags import (
    config_flag,
    flatten_config,
    optimizer_words,
    patch_rate,
    settings_flags,
)


def test_train_py_reads_the_settings() -> None:
    settings = {
        "recipe": "vit_b16",
        "lr": 2e-4,
        "beta2": 0.95,
        "patch": 0.2,
        "batch": 512,
        "gradient_clipping": 1.5,
        "epochs": 50,
        "warmup": 0.5,
        "views.fixed": True,
        "views.blur_p": [0.5, 0.25],
    }
    run = parse(settings_flags(settings))
    config, engine = run.config, run.engine
    assert (config.recipe, config.batch, config.model.patch_lr) == ("vit_b16", 512, 0.2)
    assert (config.views.fixed, config.views.blur_p) == (True, (0.5, 0.25))
    assert engine["gradient_clipping"] == 1.5
    assert (config.epochs, config.warmup_epochs) == (50, 25)
    assert engine["optimizer"] == {
        "type": "AdamW",
        "params": {"lr": 2e-4, "betas": [0.9, 0.95], "weight_decay": 0.1},
    }
    assert not parse(config_flag("views.fixed", False)).config.views.fixed
    cures = {"clip": {"type": "adagc", "beta": 0.9}, "layer_scale": 1e-4, "sigma_reparam": True}
    run = parse(settings_flags({"recipe": "vit_b16", "model.backbone": "vit_conv", **cures}))
    assert run.engine["optimizer"]["clip"] == cures["clip"]
    model = run.config.model
    assert (model.layer_scale, model.sigma_reparam, model.backbone) == (1e-4, True, "vit_conv")
    lars = parse(settings_flags({"optimizer": "Lars", "lr": 0.3, "sgd_momentum": 0.8})).engine
    # nothing of the recipe's AdamW is left
    assert lars["optimizer"] == {"type": "Lars", "params": {"lr": 0.3, "momentum": 0.8}}
    assert [patch_rate({"patch": p}) for p in ("trained", "frozen", 0.2)] == [1.0, 0.0, 0.2]


def test_every_field_of_a_config_comes_back_from_its_flags() -> None:
    config = RECIPES["vit_b16_lamb"].config
    flat = dict(flatten_config(config))
    assert {"batch", "model.dim", "views.blur_p"} <= {*flat}
    flags = ["--recipe", "tiny"]
    defaults = dict(flatten_config(RECIPES["tiny"].config))
    for key, value in flat.items():
        if value != defaults[key] and key not in ("recipe", "deepspeed_config"):
            flags += config_flag(key, value)
    again = dict(flatten_config(parse(flags).config))
    assert {k: v for k, v in again.items() if k != "recipe"} == {
        k: v for k, v in flat.items() if k != "recipe"
    }


def test_a_flag_for_each_value_of_a_group_rate() -> None:
    assert config_flag("model.group_lr", ["norm=0.5", "block_0=0"]) == [
        *("--model.group_lr", "norm=0.5", "--model.group_lr", "block_0=0")
    ]
    assert config_flag("views.blur_p", (0.5, 0.0)) == ["--views.blur_p", "0.5", "0.0"]


def test_optimizer_words_are_no_flags_of_train_py() -> None:
    words = optimizer_words()
    assert {"lr", "weight_decay", "beta1", "beta2", "update_clip", "sgd_momentum"} <= {*words}
    assert not {*words} & {name for name, _ in flatten_config(Config())}
    assert "Lars" in list_types()
