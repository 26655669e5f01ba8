"""A trained encoder as a plain module, outside any engine: for evaluation, export and embedding."""

import json
from pathlib import Path
from typing import Literal

from timm.models.vision_transformer import VisionTransformer

from mocov3_ds import checkpoint
from mocov3_ds.config import Config, from_json, read_json
from mocov3_ds.model.vit import build_vit

Which = Literal["base", "momentum"]


def read_run(run: Path) -> Config:
    """Settings of a run folder.

    Raises:
        ValueError: no run lives there.
    """
    path = run / "config.json"
    if not path.exists():
        raise ValueError(f"{run} is no run folder: it holds no config.json.")
    return from_json(read_json(path))


def load_encoder(run: str | Path, which: Which = "base") -> VisionTransformer:
    """Backbone of a run's newest checkpoint, fp32, in eval mode: images (B, 3, H, W) -> (B, D).

    Images are RGB scaled to [0, 1], then normalised by the ImageNet mean (0.485, 0.456, 0.406) and
    standard deviation (0.229, 0.224, 0.225), at the size the run was trained with.

    Args:
        run: run folder.
        which: the base encoder (what the paper evaluates) or the momentum encoder.

    Raises:
        ValueError: no run, no valid checkpoint, or a checkpoint of another model.
    """
    run = Path(run)
    config = read_run(run)
    saved = checkpoint.newest(run)
    if saved is None:
        raise ValueError(f"{run} holds no complete checkpoint yet.")
    vit = build_vit(config.vit, positions=config.model.positions)
    prefix = "backbone."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in saved.group(which).items()
        if name.startswith(prefix)
    }
    wrong = sorted({*vit.state_dict()} ^ {*tensors})
    if wrong:
        raise ValueError(
            f"checkpoint {saved.folder} does not fit its config.json: {json.dumps(wrong[:3])}."
        )
    vit.load_state_dict(tensors)
    return vit.eval()
