"""Fine-tuning: the recipe's numbers by hand, micro-batches, resume, bad input."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mocov3_ds.encoders.load import load_encoder, read_weights
from mocov3_ds.evaluation import results
from mocov3_ds.evaluation.finetune import (
    build_classifier,
    build_parameter_groups,
    build_transform,
    finetune_encoder,
    learning_rate_at,
    mean_loss,
    resolve_config,
)
from mocov3_ds.evaluation.flags import FinetuneConfig
from mocov3_ds.evaluation.labelled_images import seed_generators
from tests.evaluation.runs import HEADS, make_labelled_run, make_run

PLAIN: dict[str, Any] = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "label_smoothing": 0.0}


def settings(folder: Path, **changes: Any) -> FinetuneConfig:
    config = FinetuneConfig(
        run=folder / "run",
        epochs=3,
        batch=16,
        learning_rate=0.02,
        warmup_epochs=1,
        micro_batch=8,
        workers=0,
        judge_every_epochs=2,
    )
    return replace(config, **changes)


def test_the_papers_numbers_are_the_defaults() -> None:
    small = resolve_config(FinetuneConfig(run=Path("x")), dim=768)
    assert (small.epochs, small.drop_path, small.batch) == (150, 0.1, 1024)
    large = resolve_config(FinetuneConfig(run=Path("x")), dim=1024)
    assert (large.epochs, large.drop_path) == (100, 0.5)
    asked = resolve_config(FinetuneConfig(run=Path("x"), epochs=7, drop_path=0.0), dim=1024)
    assert (asked.epochs, asked.drop_path) == (7, 0.0)
    # arXiv 2012.12877, Table 9
    assert (small.learning_rate, small.weight_decay, small.label_smoothing) == (5e-4, 0.05, 0.1)
    assert (small.mixup, small.cutmix, small.erase, small.repeats) == (0.8, 1.0, 0.25, 3)
    assert (small.warmup_epochs, small.auto_augment) == (5.0, "rand-m9-mstd0.5-inc1")


def test_the_rate_warms_up_and_falls() -> None:
    config = FinetuneConfig(run=Path("x"), epochs=10, batch=1024, warmup_epochs=2)
    rates = [learning_rate_at(step, config=config, steps_per_epoch=5) for step in range(51)]
    assert rates[0] == pytest.approx(1e-6)
    assert rates[5] == pytest.approx((1e-6 + 1e-3) / 2)  # 5e-4 x 1024 / 512
    assert rates[10] == pytest.approx(1e-3)
    assert rates[30] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[50] == pytest.approx(1e-5)


def test_layer_decay_by_hand(tmp_path: Path) -> None:
    weights = read_weights(make_run(tmp_path / "run", depth=3))
    config = resolve_config(settings(tmp_path, layer_decay=0.5), dim=32)
    vit = build_classifier(weights, 3, config)
    names = {id(p): name for name, p in vit.named_parameters()}
    seen = {}
    for group in build_parameter_groups(vit, config):
        for parameter in group["params"]:
            seen[names[id(parameter)]] = (group["lr_scale"], group["weight_decay"])
    assert {*seen} == {name for name, _ in vit.named_parameters()}
    by_hand = {
        "head.weight": (1.0, 0.05),
        "head.bias": (1.0, 0.0),
        "norm.weight": (0.5, 0.0),
        "blocks.2.mlp.fc1.weight": (0.5, 0.05),
        "blocks.1.attn.qkv.weight": (0.25, 0.05),
        "blocks.1.attn.qkv.bias": (0.25, 0.0),
        "blocks.0.norm1.weight": (0.125, 0.0),
        "patch_embed.proj.weight": (0.0625, 0.05),
        "cls_token": (0.0625, 0.0),
        "pos_embed": (0.0625, 0.0),
    }
    assert {name: seen[name] for name in by_hand} == by_hand


def test_the_classifier_is_the_encoder_with_a_head(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    config = resolve_config(settings(tmp_path, drop_path=0.3), dim=32)
    vit = build_classifier(read_weights(run), 5, config)
    assert vit.training
    assert all(p.requires_grad for p in vit.parameters())
    assert vit.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)
    images = torch.randn(2, 3, 16, 16)
    features = load_encoder(run)(images)
    expected = F.linear(features, vit.head.weight, vit.head.bias)
    torch.testing.assert_close(vit.eval()(images), expected)
    assert 0.01 < float(vit.head.weight.detach().std()) < 0.03


def test_targets_are_smoothed_once() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 5), torch.tensor([0, 3, 4, 1])
    smoothed = torch.full((4, 5), 0.1 / 5)
    smoothed[range(4), labels] += 0.9
    by_hand = -(smoothed * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(mean_loss(logits, labels, 0.1), by_hand)
    torch.testing.assert_close(mean_loss(logits, smoothed, 0.1), by_hand)


def test_augmentation_holds_what_was_asked_for() -> None:
    both = str(build_transform(FinetuneConfig(run=Path("x")), 32))
    for part in ("RandomResizedCropAndInterpolation", "bicubic", "RandAugment", "RandomErasing"):
        assert part in both
    # at full strength, too: 0 bits are kept there
    strongest = FinetuneConfig(run=Path("x"), auto_augment="rand-m10-n2-inc1", erase=0.0)
    augment = build_transform(strongest, 32)
    for seed in range(60):
        seed_generators(seed)
        assert augment(Image.new("RGB", (40, 30), "teal")).shape == (3, 32, 32)
    none = str(build_transform(FinetuneConfig(run=Path("x"), auto_augment="", erase=0.0), 32))
    assert "RandAugment" not in none
    assert "RandomErasing" not in none


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    state = load_file(folder / "finetune-base.safetensors")
    return {n: t for n, t in state.items() if n.startswith("model.")}


def test_micro_batches_move_nothing(tmp_path: Path) -> None:
    make_labelled_run(tmp_path)
    for size in (16, 5):
        finetune_encoder(
            settings(tmp_path, micro_batch=size, epochs=1, clip=0.5, out=tmp_path / f"{size}",
                     **PLAIN)
        )  # fmt: skip
    whole, parts = weights_of(tmp_path / "16"), weights_of(tmp_path / "5")
    start = load_encoder(tmp_path / "run").state_dict()
    for name, tensor in whole.items():
        # AdamW divides tiny gradients by their size: rounding shows at a share of the rate
        torch.testing.assert_close(parts[name], tensor, atol=2e-5, rtol=1e-3)
    assert (whole["model.cls_token"] - start["cls_token"]).abs().max() > 1e-4


def test_it_learns_and_is_recorded(tmp_path: Path) -> None:
    run = make_labelled_run(tmp_path)
    plain = {**PLAIN, "auto_augment": "", "erase": 0.0, "repeats": 1, "crop_min": 0.5}
    entry = finetune_encoder(settings(tmp_path, epochs=25, ema=0.5, **plain))
    assert entry["top1"] > 50  # chance is 38
    assert entry["best_top1_seen"] >= entry["top1"]
    assert entry["top1_of_averaged_weights"] > 40
    found = results.read_results(run)["finetune base"]
    assert (found["top1"], found["epochs"], found["val_images"]) == (entry["top1"], 25, 37)


def test_the_state_is_an_encoder_too(tmp_path: Path) -> None:
    run = make_labelled_run(tmp_path)
    finetune_encoder(settings(tmp_path, epochs=1, ema=0.9))
    file = run / "finetune-base.safetensors"
    state = load_file(file)
    for which, kind in (("base", "model"), ("momentum", "ema")):
        encoder = load_encoder(file, which)  # type: ignore[arg-type]
        assert encoder.blocks[0].attn.num_heads == HEADS
        assert torch.equal(encoder.norm.weight, state[f"{kind}.norm.weight"])


def test_resumed_bits_are_those_of_an_unbroken_run(tmp_path: Path) -> None:
    make_labelled_run(tmp_path)
    options: dict[str, Any] = {"ema": 0.9, "drop_path": 0.2}
    whole = finetune_encoder(settings(tmp_path, out=tmp_path / "a", **options))
    first = finetune_encoder(settings(tmp_path, out=tmp_path / "b", stop_after_epochs=1, **options))
    assert first["epochs_done"] == 1
    assert not (tmp_path / "b/results.json").exists()
    entry = finetune_encoder(settings(tmp_path, out=tmp_path / "b", workers=1, **options))
    a, b = (load_file(tmp_path / f / "finetune-base.safetensors") for f in "ab")
    assert {n.replace("/", ".").split(".")[0] for n in a} == {
        *("model", "ema", "exp_avg", "exp_avg_sq")
    }
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert entry["top1"] == whole["top1"]
    with pytest.raises(ValueError, match=r"mixup is 0\.8 there, 0\.5 here.*Give --out"):
        finetune_encoder(settings(tmp_path, out=tmp_path / "b", mixup=0.5, **options))
    (tmp_path / "b/finetune-base.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="is no fine-tuning of ours"):
        finetune_encoder(settings(tmp_path, out=tmp_path / "b", **options))


def test_a_diverged_run_stops_and_keeps_its_state(tmp_path: Path) -> None:
    run = make_labelled_run(tmp_path)
    finetune_encoder(settings(tmp_path, stop_after_epochs=1))
    path = run / "finetune-base.safetensors"
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["model.head.bias"].fill_(math.nan)
    save_file(tensors, str(path), metadata=metadata)
    before = path.read_bytes()
    with pytest.raises(FloatingPointError, match="the loss of epoch 2 is nan"):
        finetune_encoder(settings(tmp_path))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch": 15}, "pair the images of a rank, so 15 / 1 = 15 must be even"),
        ({"batch": 64}, "holds 61 samples, fewer than one global batch of 64; lower --batch"),
        ({"layer_decay": 0.0}, r"layer_decay 0\.0 must lie in"),
        ({"repeats": 0}, "repeats 0 must be 1 at least"),
        ({"learning_rate": float("nan")}, "--learning_rate nan cannot be"),
        ({"drop_path": 2.0}, "--drop_path 2.0 cannot be; it must be -1 to 1"),
        ({"micro_batch": 0}, "micro_batch 0"),
        ({"image_size": 15}, "image size 15 is not a multiple of the patch size 4"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    run = make_labelled_run(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        finetune_encoder(settings(tmp_path, **change))
    assert not list(run.glob("finetune*"))


def test_batches_that_ranks_cannot_share_are_refused() -> None:
    config = FinetuneConfig(run=Path("x"), batch=10)
    with pytest.raises(ValueError, match=r"batch 10 cannot be shared .* 3 ranks; choose e\.g\. 12"):
        resolve_config(config, dim=768, world_size=3)
    with pytest.raises(ValueError, match="pair the images of a rank, so 9 / 3 = 3 must be even"):
        resolve_config(replace(config, batch=9), dim=768, world_size=3)
    unmixed = replace(config, batch=9, mixup=0.0, cutmix=0.0)
    assert resolve_config(unmixed, dim=768, world_size=3).batch == 9


def test_every_weight_is_trained(tmp_path: Path) -> None:
    run = make_labelled_run(tmp_path)
    finetune_encoder(settings(tmp_path, epochs=1, **PLAIN))
    start, end = load_encoder(run).state_dict(), weights_of(run)
    vit: nn.Module = load_encoder(run)
    for name, _ in vit.named_parameters():
        assert not torch.equal(start[name], end[f"model.{name}"]), name


def test_the_depth_of_a_weight_scales_its_steps(tmp_path: Path) -> None:
    run = make_labelled_run(tmp_path)
    config = settings(tmp_path, epochs=1, layer_decay=0.1, weight_decay=0.0, **PLAIN)
    finetune_encoder(config)
    start, end = load_encoder(run).state_dict(), weights_of(run)
    reach = sum(learning_rate_at(step, config=config, steps_per_epoch=3) for step in range(3))
    for name, scale in [("cls_token", 1e-3), ("blocks.0.mlp.fc1.bias", 1e-2), ("norm.bias", 1e-1)]:
        moved = float((end[f"model.{name}"] - start[name]).abs().max())
        assert 0.3 * scale * reach < moved <= 1.01 * scale * reach  # AdamW moves by about its rate
