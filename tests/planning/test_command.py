"""`mocov3 plan`: what it prints and writes, what it refuses, and that its plans are sound."""

import json
import re
import shlex
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mocov3_ds import cli
from mocov3_ds.config import Settings
from mocov3_ds.distributed.engine_config import engine_config
from mocov3_ds.model.base_encoder import Chunks
from mocov3_ds.planning import hardware, memory, pace, traffic
from mocov3_ds.planning.command import launch_command, wish_of
from mocov3_ds.planning.hardware import PRESETS, read_cluster
from mocov3_ds.planning.options import Wish, all_options, what_would_fit
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
    planned = wish_of("vit_b16", deepspeed_config=own, overrides=overrides).engine
    planned.setdefault("zero_optimization", {})["stage"] = options[0]["stage"]
    _, run = launched(said)
    assert run.engine == planned


def test_the_command_starts_as_many_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--gpus", "12xH100", "--batch", 4800, "--json") == 0
    program, _ = launched(capsys.readouterr().out)
    assert program == "deepspeed --hostfile hosts --num_nodes 2 --num_gpus 6"
    for cards in (1, 7, 8, 9, 12, 13, 24, 30, 1001, 1024):
        cluster = read_cluster(f"{cards}xH100")
        assert cluster.nodes * cluster.per_node == cards
        assert cluster.per_node <= 8
    assert read_cluster("16xH100", nodes=1).per_node == 16


def test_the_command_of_a_run_shorter_than_the_warm_up() -> None:
    cluster = read_cluster("8xH100")
    for epochs, asked in ((20, True), (40, False)):
        wish = wish_of("vit_b16", epochs=epochs)
        command = launch_command(wish, cluster, all_options(wish, cluster)[0])
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
    said = capsys.readouterr().out
    assert all(f"| {name} |" in said for name in PRESETS)
    assert call(monkeypatch, "--recipes") == 0
    said = capsys.readouterr().out
    assert all(recipe.paper in said for name, recipe in RECIPES.items() if name.startswith("vit_"))


def test_what_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("mocov3_ds.planning.command._BATCHES", (4096,))
    assert call(monkeypatch, "--what_fits") == 0
    rows = capsys.readouterr().out.strip().splitlines()
    assert len(rows) == 2 + 3 * 4
    assert all(row.count("ZeRO-") == 3 for row in rows[2:])


def test_each_card_runs_the_smallest_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    for card in PRESETS.values():
        precision = "bf16" if card.bf16 else "fp16"
        wish = wish_of("vit_s16", deepspeed_config=FOLDER / f"zero1_adamw_{precision}.json")
        best = all_options(wish, read_cluster(f"8x{card.name}"))[0]
        assert best.fits, card.name
        assert best.pace is not None
        assert 0 < best.pace.mfu < card.reach, card.name


@pytest.mark.parametrize("recipe", ["vit_s16", "vit_b16", "vit_l16", "vit_h14"])
@pytest.mark.parametrize("gpus", ["1x80GB", "4x40GB", "8x24GB", "1024xH100"])
def test_plans_stay_within_the_card(recipe: str, gpus: str) -> None:
    cluster = read_cluster(gpus)
    for option in all_options(wish_of(recipe), cluster):
        assert option.fits == (option.memory.total <= cluster.usable)
        if option.fits and option.chunks.size:  # and they leave no room for another kept chunk
            more = Chunks(size=option.chunks.size, kept=option.chunks.kept + 2)
            wish = wish_of(recipe)
            larger = memory.of_a_rank(
                wish.shape,
                stage=option.stage,
                world_size=cluster.cards,
                batch=wish.batch,
                size=wish.size,
                chunks=more,
                recompute_blocks=option.recompute_blocks,
                key_block=option.key_block,
            )
            enough = more.kept * more.size >= 2 * wish.batch // cluster.cards
            assert enough or larger.total > cluster.usable


def test_published_speeds_of_supervised_vits() -> None:
    """timm's training table, RTX 3090, AMP: what the card's `reach` was set by."""
    from mocov3_ds.planning import architecture
    from mocov3_ds.planning.hardware import MOVES

    card = PRESETS["RTX3090"]
    for name, published in {"vit_b16": 391, "vit_l16": 117, "vit_h14": 39.9}.items():
        shape = wish_of(name).shape
        row = architecture.tokens(shape) * shape.vit.dim * 2 * shape.vit.depth
        operations = 3 * architecture.block_of_an_image(shape).operations * shape.vit.depth
        seconds = operations / (card.low * card.reach) + 53 * row / (card.bandwidth * MOVES)
        assert 1 / seconds == pytest.approx(published, rel=0.07), name


def test_more_cards_are_faster_and_cost_more() -> None:
    wish, hours, card_hours = wish_of("vit_b16"), [], []
    for cards in (1, 8, 64, 512):
        best = all_options(wish, read_cluster(f"{cards}xH100"))[0].pace
        assert best is not None
        hours.append(best.hours(100))
        card_hours.append(best.hours(100) * cards)
    assert hours == sorted(hours, reverse=True)
    assert card_hours[1:] == sorted(card_hours[1:])
    # an 8 x H100 machine, ViT-B: steps of 4096 images, 312 an epoch
    assert best.hours(100) == 100 * 312 * best.step / 3600


def test_passes() -> None:
    def of(chunk: int, kept: int = 0, blocks: bool = False) -> tuple[int, int]:
        found = pace.passes_of(Chunks(size=chunk, kept=kept), 8, recompute_blocks=blocks)
        return found.forward, found.recomputed

    assert of(0) == (2, 0)
    assert of(0, blocks=True) == (2, 2)
    assert of(2) == (8, 7)
    assert of(2, kept=3) == (8, 4)
    assert of(2, blocks=True) == (8, 15)


def test_link_and_machines() -> None:
    one, two = read_cluster("8xA100"), read_cluster("16xA100", network=100)
    assert (one.nodes, two.nodes) == (1, 2)
    assert one.link == PRESETS["A100-80GB"].inside
    assert two.link == 100 / 8 * hardware.GB
    assert read_cluster("8xA100", nodes=4).per_node == 2
    assert read_cluster("4xV100", interconnect=20).link == 20 * hardware.GB


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
            "zero_optimization.reduce_bucket_size is 'big'; it must be a number",
        ),
        (
            [
                *("--gpus", "8xH100", "--ds", "fp16.enabled=true"),
                *("--ds", "bf16.enabled=false", "--stage", 0),
            ],
            "fp16 has no stage 0",
        ),
        (["--gpus", "8xH100", "--deepspeed_config", FOLDER], f"{FOLDER}: Is a directory."),
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


def test_what_would_fit_does() -> None:
    small = read_cluster("1x16GB")
    wish = wish_of("vit_h14", overrides=("bf16.enabled=false",))
    said = what_would_fit(wish, small)
    cards = int(re.search(r"(\d+) of these cards", said)[1])  # type: ignore[index]
    memory_gb = int(re.search(r"cards of (\d+) GB", said)[1])  # type: ignore[index]
    for cluster in (
        replace(small, cards=cards),
        replace(small, card=replace(small.card, memory=memory_gb * hardware.GIB)),
    ):
        assert all_options(wish, cluster)[0].fits
    assert not all_options(wish, replace(small, cards=cards // 2))[0].fits


def test_what_would_fit_keeps_the_fixed_stage() -> None:
    """8 T4 hold ViT-H in fp32 at no batch with the optimizer's state whole, but in parts."""
    wish = wish_of("vit_h14", overrides=("bf16.enabled=false",))
    cluster = read_cluster("8xT4")

    def fits(batch: int, cards: int, stages: tuple[int, ...]) -> bool:
        other = replace(wish, batch=batch)
        return all_options(other, replace(cluster, cards=cards), stages)[0].fits

    assert not any(fits(batch, 8, (0,)) for batch in (8, 2048, 4096))
    assert not any(fits(4096, cards, (0,)) for cards in (16, 32, 1024))
    assert fits(4096, 8, (1,))
    said = what_would_fit(wish, cluster, (0,))
    assert "--batch" not in said
    assert "of these cards" not in said
    assert "ZeRO-1 (without --stage" in said
    memory_gb = int(re.search(r"cards of (\d+) GB", said)[1])  # type: ignore[index]
    bigger = replace(cluster, card=replace(cluster.card, memory=memory_gb * hardware.GIB))
    assert all_options(wish, bigger, (0,))[0].fits
    assert "without --stage" not in what_would_fit(wish, read_cluster("1xT4"))


def scaled(wish: Wish, times: int) -> Wish:
    """The same with a backbone of that many times the width."""
    vit = replace(wish.shape.vit, dim=wish.shape.vit.dim * times)
    return replace(wish, shape=replace(wish.shape, vit=vit))


def test_what_would_fit_says_what_was_tried() -> None:
    small = read_cluster("8x16GB")
    wish = wish_of("vit_h14", overrides=("bf16.enabled=false",))
    giant, together = scaled(wish, 64), scaled(wish, 7)
    assert what_would_fit(giant, small) == (
        "nothing that was tried (batches down to 8, up to 1024 of these cards, cards of up to "
        "288 GB, more and bigger cards together)"
    )
    # neither more of these cards nor eight larger ones hold it
    said = what_would_fit(together, small)
    found = re.fullmatch(r"(\d+) cards of (\d+) GB", said)
    assert found is not None, said
    cards, memory_gb = map(int, found.groups())
    both = replace(small, cards=cards, card=replace(small.card, memory=memory_gb * hardware.GIB))
    assert all_options(together, both)[0].fits


def test_calibration_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mocov3_ds.planning.calibrate._SECONDS", 0.0)
    monkeypatch.setattr("mocov3_ds.planning.calibrate._ROWS", 2 * 16)
    monkeypatch.setattr("mocov3_ds.planning.calibrate._IMAGES", 2)
    rates = tmp_path / "rates.json"
    assert call(monkeypatch, "--calibrate", rates) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(rates.read_text())
    flags = ["--gpus", "1xcpu", "--rates", rates, "--recipe", "tiny", "--json"]
    assert call(monkeypatch, *flags) == 0
    best = json.loads(capsys.readouterr().out)["options"][0]
    expected = json.loads(rates.read_text())
    wish = wish_of("tiny")
    cluster = read_cluster("1xcpu", presets=hardware.with_rates(rates))
    assert cluster.card.full == expected["fp32_operations_per_s"]
    assert best["step_s"] == pytest.approx(all_options(wish, cluster)[0].pace.step)  # type: ignore[union-attr]


def test_constants_follow_the_product() -> None:
    config = engine_config({"zero_optimization": {"stage": 1}}, global_batch=8, world_size=1)
    assert config["zero_optimization"]["reduce_bucket_size"] == memory.BUCKET
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig().param_persistence_threshold == traffic.PERSISTENCE


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
