"""Small runs, shards and weights for tests of what is done with a trained encoder."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mocov3_ds.checkpoints import run_folder
from mocov3_ds.checkpoints.saver import Saver
from mocov3_ds.config.parts import ViewConfig
from mocov3_ds.config.run_config import Settings, encoder_shape
from mocov3_ds.model.base_encoder import BaseEncoder
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.recipes import RECIPES
from tests.data.sets import make_set

SIZE, DIM, HEADS = 16, 32, 4


def make_run(
    folder: Path,
    *,
    train: str = "",
    val: str = "",
    seed: int = 0,
    step: int = 7,
    image_size: int = SIZE,
    **model: object,
) -> Path:
    """A run folder with one checkpoint, as training leaves it, weights at random."""
    recipe = RECIPES["tiny"]
    config = replace(
        recipe.config,
        runs=folder.parent,
        name=folder.name,
        views=ViewConfig(image_size=image_size),
        data=replace(recipe.config.data, shards=train, probe_shards=val),
        model=replace(
            recipe.config.model,
            **({"patch_size": 4, "dim": DIM, "depth": 2, "heads": HEADS, "hidden": 8} | model),
        ),
    )
    torch.manual_seed(seed)
    base = BaseEncoder(encoder_shape(config))
    momentum = MomentumEncoder(encoder_shape(config))
    shaken = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for name, parameter in base.named_parameters():
        if parameter.requires_grad:  # the two encoders share what is frozen
            shaken[name] += 0.05 * torch.randn_like(shaken[name])
    momentum.start_from(shaken)
    run_folder.claim_folder(folder, Settings(config, dict(recipe.engine)).as_json(), "data")
    groups = {"base": list(base.state_dict().items()), "momentum": list(momentum.full_state())}
    Saver(folder, keep=1).save(step, groups, {"optimizer_steps": step}, background=False)
    return folder


def coloured(number: int) -> bytes:
    """A noisy image whose colour leans towards its class, number % 3."""
    rng = np.random.default_rng(number)
    lean = np.roll([5.0, -2.5, -2.5], number % 3)
    pixels = np.clip(128 + lean + rng.normal(0, 60, (20, 20 + number % 4, 3)), 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make_splits(folder: Path, train: int = 61, val: int = 37) -> tuple[str, str]:
    """Labelled shards of three classes; sizes that few numbers divide."""
    urls = str(folder / "train"), str(folder / "val")
    make_set(urls[0], [train // 2, train - train // 2], coloured, 3)
    make_set(urls[1], [val], lambda number: coloured(number + 1000 * 3), 3)
    return urls


def make_labelled_run(folder: Path) -> Path:
    """The run folder/run with labelled shards to learn from and to be judged by."""
    train, val = make_splits(folder)
    return make_run(folder / "run", train=train, val=val)
