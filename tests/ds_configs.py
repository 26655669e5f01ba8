"""DeepSpeed JSONs of every stage, optimizer, precision and offload, and those that are shipped.

`ds_configs/` holds the ones that people pick. The others are made from two of these by the same
overrides that a user gives with `--ds`, so that the tests cover all of them.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

from mocov3_ds.recipes import with_overrides

FOLDER = Path(__file__).parents[1] / "ds_configs"
SHIPPED = sorted(FOLDER.glob("*.json"))

_PRECISION = {
    "bf16": (),
    "fp32": ("bf16.enabled=false",),
    "fp16": ("bf16.enabled=false", "fp16.enabled=true"),
}
_OFFLOAD = "zero_optimization.offload_optimizer.device=cpu"
_BUCKETS = {"24gb": 25_000_000, "40gb": 50_000_000, "80gb": 200_000_000}


def _overrides() -> dict[str, tuple[str, ...]]:
    """What makes each config from the one at stage 1 in bf16, by the end of its name."""
    names: dict[str, tuple[str, ...]] = {}
    for stage, (precision, settings) in product(range(4), _PRECISION.items()):
        if (stage, precision) != (0, "fp16"):  # DeepSpeed computes that one wrongly
            at_stage = (f"zero_optimization.stage={stage}",)
            names[f"zero{stage}_{{}}_{precision}"] = (*at_stage, *settings)
            if stage and precision == "bf16":
                names[f"zero{stage}_{{}}_bf16_offload"] = (*at_stage, _OFFLOAD)
    for card, size in _BUCKETS.items():
        names[f"zero1_{{}}_bf16_{card}"] = (f"zero_optimization.reduce_bucket_size={size}",)
    return names


def _config(optimizer: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    base = json.loads((FOLDER / f"zero1_{optimizer}_bf16.json").read_text())
    config = with_overrides(base, overrides)
    return {key: value for key, value in config.items() if value != {"enabled": False}}


CONFIGS: dict[str, dict[str, Any]] = {
    pattern.format(optimizer): _config(optimizer, overrides)
    for optimizer in ("adamw", "lamb")
    for pattern, overrides in _overrides().items()
}
"""Each config by its name: zero{stage}_{optimizer}_{precision}[_offload|_24gb|_40gb|_80gb]."""
