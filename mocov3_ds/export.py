"""Take the encoder away: weights that other programs load, checked before success is claimed."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file

from mocov3_ds import checkpoint
from mocov3_ds.encoder import Which, load_encoder, read_run


def export(run: Path, out: Path, *, which: Which = "base") -> float:
    """Write the backbone as safetensors in timm's names, with a README that says how to load it.

    The file is read back into a `timm` model built from its sizes alone, and both models must give
    the same features.

    Args:
        run: run folder.
        out: folder to make; must not exist or be empty.
        which: base or momentum encoder.

    Returns:
        largest difference of a feature between the run's encoder and the exported one.

    Raises:
        ValueError: no run, `out` in use, or the features differ.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give another --out.")
    config, encoder = read_run(run), load_encoder(run, which)
    out.mkdir(parents=True, exist_ok=True)
    weights = out / "model.safetensors"
    save_file(encoder.state_dict(), str(weights), metadata={"format": "pt"})
    sizes: dict[str, Any] = {
        "img_size": config.views.image_size,
        "patch_size": config.model.patch_size,
        "embed_dim": config.model.dim,
        "depth": config.model.depth,
        "num_heads": config.model.heads,
        "num_classes": 0,
        "pos_embed": "learn" if config.model.positions == "sincos" else "none",
    }
    (out / "timm.json").write_text(json.dumps(sizes, indent=1) + "\n")
    again = timm.create_model("vit_base_patch16_224", **sizes).eval()
    again.load_state_dict(load_file(str(weights)))
    generator = torch.Generator().manual_seed(0)
    size = config.views.image_size
    images_BCHW = torch.randn(4, 3, size, size, generator=generator)
    with torch.no_grad():
        difference = float((again(images_BCHW) - encoder(images_BCHW)).abs().max())
    if difference > 1e-5:
        raise ValueError(
            f"the exported encoder's features differ by {difference:.2g} (rounding is below 1e-5); "
            f"{weights} should not be used."
        )
    (out / "README.md").write_text(_card(run, which, sizes))
    return difference


def _card(run: Path, which: Which, sizes: dict[str, Any]) -> str:
    step = checkpoint.newest(run)
    assert step is not None
    return f"""# {run.name}: MoCo v3 {which} encoder after {step.step} steps

Class-token features of a Vision Transformer pretrained with mocov3-ds. Load it with timm:

```python
import json, timm
from safetensors.torch import load_file

model = timm.create_model("vit_base_patch16_224", **json.load(open("timm.json"))).eval()
model.load_state_dict(load_file("model.safetensors"))
```

Input: RGB in [0, 1], normalised by mean (0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225),
{sizes["img_size"]} x {sizes["img_size"]} pixels. Output: {sizes["embed_dim"]} features.
"""
