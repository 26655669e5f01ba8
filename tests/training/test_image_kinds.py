"""Runs on images of other channels and forms, and on views of a user's own, from tar to k-NN."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mocov3_ds import train
from mocov3_ds.encoders.load import build_encoder, read_weights
from mocov3_ds.monitoring.metrics_file import read_rows
from mocov3_ds.recipes import parse
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL


def stored_image(number: int, channels: int) -> bytes:
    """A small image that no other number has, as a grey JPEG, an RGBA PNG or an array."""
    pixels = np.random.default_rng(number).integers(0, 255, (20, 22, channels)).astype(np.uint8)
    buffer = io.BytesIO()
    if channels == 1:
        Image.fromarray(pixels[..., 0]).save(buffer, "JPEG", quality=90)
    elif channels in (3, 4):
        Image.fromarray(pixels).save(buffer, "PNG")
    else:
        np.save(buffer, pixels)
    return buffer.getvalue()


def grey_view(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A view function: a random crop of 16 pixels, in grey half of the time."""
    x, y = (int(rng.integers(0, side - 16)) for side in image.size)
    crop = image.crop((x, y, x + 16, y + 16))
    return crop.convert("L").convert("RGB") if rng.random() < 0.5 else crop


def tensor_view(image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
    pixels = np.asarray(image.resize((16, 16)), np.float32) / 255
    return torch.from_numpy(pixels.transpose(2, 0, 1) + rng.normal(0, 0.1, (3, 16, 16)))


def flags_for(folder: Path, channels: int, *more: str) -> list[str]:
    for name, sizes in (("train", [20, 7, 23]), ("probes", [33])):
        if not (folder / name).exists():
            make_set(str(folder / name), sizes, lambda number: stored_image(number, channels))
    return [
        *SMALL, "--data.shards", str(folder / "train"), "--model.patch_size", "8",
        "--data.probe_shards", str(folder / "probes"), "--runs", str(folder / "runs"), *more,
    ]  # fmt: skip


def trained(flags: list[str]) -> list[dict[str, Any]]:
    train.train(parse(flags))
    config = parse(flags).config
    weights = read_weights(config.folder)
    encoder = build_encoder(weights)
    shape = weights.backbone
    with torch.no_grad():
        features = encoder(torch.randn(1, shape.channels, *shape.size))
    assert torch.isfinite(features).all()
    assert (weights.settings.mean, weights.settings.std) == (config.views.mean, config.views.std)
    return read_rows(config.folder / "metrics.jsonl")


def channel_flags(channels: int) -> list[str]:
    numbers = [f"{0.1 * (c + 1):.1f}" for c in range(channels)]
    return [
        *("--views.channels", str(channels), "--views.colour_ops", "off"),
        *("--views.mean", *numbers, "--views.std", *numbers, "--stop_after_steps", "2"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "more"),
    [
        (1, ["--views.image_size", "16x24"]),
        (4, ["--views.colour", "threads"]),
        (6, ["--views.image_size", "24x16", "--views.aspect", "0.5", "3"]),
    ],
)
def test_images_of_other_channels_train_and_are_classified(
    tmp_path: Path, channels: int, more: list[str]
) -> None:
    flags = flags_for(tmp_path, channels, *channel_flags(channels), *more)
    [rows] = run_ranks(1, trained, flags)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(np.isfinite(row["loss"]) for row in steps)
    assert 0 <= steps[-1]["knn_full"] <= 100


def losses(flags: list[str]) -> list[float]:
    train.train(parse(flags))
    rows = read_rows(parse(flags).config.folder / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
def test_views_of_ones_own_are_the_same_on_any_ranks_and_after_a_resume(tmp_path: Path) -> None:
    functions = [f"{__name__}:{name}" for name in ("grey_view", "tensor_view")]
    flags = flags_for(tmp_path, 3, "--views.function", *functions, "--knn.probes", "0")
    whole = [*flags, "--name", "whole", "--stop_after_steps", "4"]
    [expected] = run_ranks(1, losses, whole)
    first, *_ = run_ranks(2, losses, [*flags, "--name", "two", "--stop_after_steps", "4"])
    np.testing.assert_allclose(first, expected, rtol=1e-5)
    parts = [*flags, "--name", "parts", "--stop_after_steps"]
    run_ranks(1, losses, [*parts, "2"])
    [resumed] = run_ranks(1, losses, [*parts, "4"])
    assert resumed == expected
