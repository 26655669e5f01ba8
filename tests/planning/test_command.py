"""`mocov3 plan`: what it prints and writes, what it refuses, and the command it names."""

import json
import shlex
import sys
from copy import deepcopy
from pathlib import Path

import pytest
from PIL import Image

from mocov3_ds import cli
from mocov3_ds.config.run_config import Settings
from mocov3_ds.distributed.engine_config import engine_config
from mocov3_ds.planning.cards import PRESETS
from mocov3_ds.planning.command import launch_command, plan_run
from mocov3_ds.planning.hardware import read_cluster
from mocov3_ds.planning.options import rank_options
from mocov3_ds.recipes import RECIPES, parse
from tests.ds_configs import CONFIGS as DS_CONFIGS
from tests.ds_configs import FOLDER


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mocov3", "plan", *map(str, arguments)])
    return cli.main()


def test_text_json_picture_and_deepspeed_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, own = tmp_path / "plan.png", tmp_path / "ds.json"
    wanted = ["--recipe", "vit_l16", "--batch", 4096, "--gpus", "16x24GB"]
    files = ["--picture", picture, "--write_json", own, "--price_per_gpu_hour", 0.5]
    assert call(monkeypatch, *wanted, *files) == 0
    said = capsys.readouterr().out
    for words in ("ViT 1024 x 24", "256 images a rank", "as RTX3090", "MB/s of JPEG", "card hours"):
        assert words in said
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 800
    config = json.loads(own.read_text())
    engine_config(config, global_batch=4096, world_size=16)
    assert call(monkeypatch, *wanted, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    best = found["options"][0]
    assert best["fits"]
    assert best["stage"] == config["zero_optimization"]["stage"]
    assert len(found["options"]) == 8
    speeds = [option["images_per_s"] for option in found["options"] if option["fits"]]
    assert speeds == sorted(speeds, reverse=True)
    # the launch command is one that train.py takes, and means the plan
    program, _, rest = found["launch"].partition("mocov3_ds/train.py ")
    assert program == "deepspeed --hostfile hosts --num_nodes 2 --num_gpus 8 "
    run = parse(rest.split())
    assert (run.config.batch, run.config.chunk) == (4096, best["chunk"])
    assert run.config.keep_chunks == best["keep_chunks"]
    assert run.engine["zero_optimization"]["stage"] == best["stage"]


def test_what_a_card_needs_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(FOLDER / "zero1_adamw_fp16.json")
    assert call(monkeypatch, "--gpus", "8xV100", "--deepspeed_config", file) == 0
    assert "V100-32GB needs a torch built for CUDA 12" in capsys.readouterr().out
    file = str(FOLDER / "zero1_adamw_fp32.json")
    assert call(monkeypatch, "--gpus", "8xA100", "--deepspeed_config", file, "--tf32") == 0
    assert " --tf32 " in capsys.readouterr().out.splitlines()[-1]


def launched(said: str) -> tuple[str, Settings]:
    """What `deepspeed` and train.py read of the command in a plan's JSON."""
    command = shlex.split(json.loads(said)["launch"])
    script = command.index("mocov3_ds/train.py")
    return " ".join(command[:script]), parse(command[script + 1 :])


@pytest.mark.parametrize(
    ("file", "overrides", "more", "stages"),
    [
        ("", ("optimizer.type=Lamb", "zero_optimization.stage=2"), (), {2}),
        ("", ('zero_optimization={"stage": 3, "reduce_bucket_size": 7}',), (), {3}),
        ("", ("optimizer.params.betas=[0.9, 0.95]",), (), {0, 1, 2, 3}),
        ("fp16.json", ("zero_optimization.stage=3", "optimizer.params.lr=1e-5"), (), {3}),
        ("no stage.json", (), ("--stage", 2), {2}),
        ("no stage.json", ("gradient_clipping=1",), ("--write_json", "its own.json"), {0, 1, 2, 3}),
    ],
)
def test_the_command_starts_what_was_planned(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
    overrides: tuple[str, ...],
    more: tuple[object, ...],
    stages: set[int],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fp16.json").write_text((FOLDER / "zero1_adamw_fp16.json").read_text())
    Path("no stage.json").write_text('{"bf16": {"enabled": true}}')
    given = [*(("--deepspeed_config", file) if file else ()), *more]
    for override in overrides:
        given += ["--ds", override]
    assert call(monkeypatch, "--gpus", "8xH100", "--json", *given) == 0
    said = capsys.readouterr().out
    options = json.loads(said)["options"]
    assert {option["stage"] for option in options} == stages
    own = Path(file) if file else None
    planned = plan_run("vit_b16", deepspeed_config=own, overrides=overrides).engine
    planned.setdefault("zero_optimization", {})["stage"] = options[0]["stage"]
    _, run = launched(said)
    assert run.engine == planned


def test_the_command_starts_as_many_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--gpus", "12xH100", "--batch", 4800, "--json") == 0
    program, _ = launched(capsys.readouterr().out)
    assert program == "deepspeed --hostfile hosts --num_nodes 2 --num_gpus 6"


def test_the_command_of_a_run_shorter_than_the_warm_up() -> None:
    cluster = read_cluster("8xH100")
    for epochs, asked in ((20, True), (40, False)):
        planned = plan_run("vit_b16", epochs=epochs)
        command = launch_command(planned, cluster, rank_options(planned, cluster)[0])
        assert ("--warmup_epochs WARMUP" in command) == asked


def test_json_stays_json_beside_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "plan.png"
    assert call(monkeypatch, "--gpus", "8xH100", "--json", "--picture", picture) == 0
    assert json.loads(capsys.readouterr().out)["batch"] == 4096
    assert picture.exists()


def test_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--list") == 0
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in PRESETS)
    assert call(monkeypatch, "--recipes") == 0
    table = capsys.readouterr().out
    assert all(recipe.paper in table for name, recipe in RECIPES.items() if name.startswith("vit_"))
    assert call(monkeypatch, "--what_fits") == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 2 + 9 * 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--gpus is missing"),
        (["--gpus", "lots"], "'lots' is not of the form COUNTxCARD"),
        (["--gpus", "8xH10"], "no card 'H10' is known (did you mean H100"),
        (["--gpus", "2000x24GB"], "2000 cards; the planner reckons with 1 to 1024"),
        (["--gpus", "8x24GB", "--nodes", 3], "8 cards do not divide over --nodes 3"),
        (["--gpus", "3x24GB"], "does not divide over 3 cards; choose --batch 4095 or 4098"),
        (["--gpus", "8x24GB", "--recipe", "vit_b"], "no recipe 'vit_b' (did you mean vit_b16?)"),
        (["--gpus", "8xT4"], "T4 has no bf16"),
        (["--gpus", "8x24GB", "--stage", 5], "--stage 5 cannot be"),
        (["--gpus", "8x24GB", "--reach", 2], "--reach 2.0 cannot be"),
        (["--gpus", "8x24GB", "--batch", -8], "--batch -8"),
        (
            ["--gpus", "1x16GB", "--recipe", "vit_h14", "--ds", "bf16.enabled=false"],
            "what would fit:",
        ),
        (
            ["--gpus", "8x24GB", "--ds", "train_batch_size=64"],
            "train_batch_size = 64, but --batch 4096 on 8 ranks makes it 4096",
        ),
        (
            [
                *("--gpus", "8x24GB", "--stage", 2, "--deepspeed_config"),
                FOLDER / "zero1_adamw_bf16.json",
            ],
            "--stage 2 contradicts zero_optimization.stage = 1",
        ),
        (
            ["--gpus", "8x24GB", "--deepspeed_config", FOLDER / "zero2_adamw_bf16_offload.json"],
            "offload to the CPU is not planned for",
        ),
        (["--gpus", "1xcpu", "--rates", "nowhere.json"], "make one with mocov3 plan --calibrate"),
        (["--gpus", "8xH100", "--ds", "optimizer.type=Foo"], "type 'Foo' is unknown; types are A"),
        (["--gpus", "8xH100", "--ds", "optimizer.type=SGD"], "type 'SGD' is unknown; types are A"),
        (["--gpus", "8xH100", "--ds", "optimizer=Lamb"], "needs an optimizer block"),
        (["--gpus", "8xH100", "--ds", "optimizer.type=Lars"], "Lars has no parameter 'betas'"),
        (
            ["--gpus", "8xH100", "--ds", "zero_optimization.reduce_bucket_size=big"],
            'zero_optimization.reduce_bucket_size is "big"; it must be a whole number of 1 or more',
        ),
        (
            [
                *("--gpus", "8xH100", "--ds", "fp16.enabled=true"),
                *("--ds", "bf16.enabled=false", "--stage", 0),
            ],
            "fp16 has no stage 0",
        ),
        (["--gpus", "8xH100", "--deepspeed_config", FOLDER], "cannot be read: Is a directory."),
        (["--gpus", "8xH100", "--picture", "/proc/x.png"], "/proc/x.png: No such file"),
        (["--gpus", "8xH100", "--write_json", FOLDER], f"{FOLDER}: Is a directory."),
        (["--calibrate", "/proc/foo/x.json"], "/proc/foo: No such file"),
        (["--gpus", "8xH100", "--epochs", "nan"], "--epochs is nan"),
        (["--gpus", "8xH100", "--epochs", "inf"], "--epochs is inf"),
        (["--gpus", "8xH100", "--epochs", -1], "--epochs is -1.0"),
        (["--gpus", "8xH100", "--price_per_gpu_hour", "nan"], "--price_per_gpu_hour is nan"),
        (["--gpus", "8xH100", "--price_per_gpu_hour", -1], "--price_per_gpu_hour is -1.0"),
        (["--gpus", "8xH100", "--network", "nan"], "--network is nan"),
        (["--gpus", "8xH100", "--interconnect", "inf"], "--interconnect is inf"),
        (["--gpus", "8xH100", "--nodes", -2], "8 cards do not divide over --nodes -2"),
        (["--gpus", "8xH100", "--rates", "RATES"], "has no effect on H100-80GB"),
        (
            ["--list", "--recipe", "nope", "--gpus", "banana", "--picture", "x.png"],
            "--recipe, --gpus, --picture would have no effect beside --list.",
        ),
        (["--recipes", "--json"], "--json would have no effect beside --recipes."),
        (["--what_fits", "--list"], "would have no effect beside --list."),
        (["--calibrate", "x.json", "--gpus", "1xcpu"], "--gpus would have no effect beside --cal"),
    ],
    ids=lambda x: " ".join(map(str, x))[:40] if isinstance(x, list) else None,
)
def test_one_sentence_for_what_cannot_be(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[object],
    words: str,
) -> None:
    rates = tmp_path / "rates.json"
    keys = ("memory_bytes", "bf16_operations_per_s", "fp32_operations_per_s", "copy_bytes_per_s")
    keys += ("attention_operations_per_s", "elementwise_bytes_per_s", "machine", "threads")
    rates.write_text(json.dumps(dict.fromkeys(keys, 1)))
    given = [rates if argument == "RATES" else argument for argument in arguments]
    assert call(monkeypatch, *given) == 2
    said = capsys.readouterr()
    assert not said.out  # no plan whose files are missing
    error = said.err.strip().splitlines()[-1]
    assert error.startswith("mocov3: error: ")
    assert words in error


@pytest.mark.parametrize("name", [n for n in DS_CONFIGS if n.count("_") == 2])
def test_a_config_that_is_not_shipped_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ds_configs/README.md says, for each stage, optimizer and precision."""
    stage, optimizer, precision = name.removeprefix("zero").split("_")
    recipe = "vit_b16" if optimizer == "adamw" else "vit_b16_lamb"
    flags = [] if precision == "bf16" else ["--ds", "bf16.enabled=false"]
    if precision == "fp16":
        flags += ["--ds", "fp16.enabled=true"]
    path = tmp_path / "ds.json"
    arguments = ["--recipe", recipe, "--gpus", "8xH100", "--stage", stage, *flags]
    assert call(monkeypatch, *arguments, "--write_json", path) == 0
    written, expected = json.loads(path.read_text()), deepcopy(DS_CONFIGS[name])
    del expected["optimizer"]["params"]["eps"]  # the optimizer's own default
    assert {key: value for key, value in written.items() if value != {"enabled": False}} == expected
