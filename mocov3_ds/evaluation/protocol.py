"""What the trained evaluations share: where they run, what is refused, what must match to go on."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from accelerate import Accelerator
from tqdm import tqdm

from mocov3_ds.distributed import ranks

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def check(batch: int, micro_batch: int, epochs: int, precision: str) -> None:
    """Refuse sizes that cannot be.

    Raises:
        ValueError: with the numbers.
    """
    if min(batch, micro_batch, epochs) < 1:
        raise ValueError(
            f"batch {batch}, micro_batch {micro_batch} and epochs {epochs} must be 1 at least."
        )
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("fp16 needs a GPU; use --precision fp32 or bf16.")


def accelerator_for(precision: Precision) -> Accelerator:
    """Join the ranks of this launch and run on their GPUs, or on their CPUs with gloo."""
    ranks.start()
    gpu = torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if gpu and torch.cuda.is_bf16_supported() else "fp32"
    return Accelerator(cpu=not gpu, mixed_precision="no" if precision == "fp32" else precision)


def plain(config: Any, free: Iterable[str]) -> dict[str, Any]:
    """Settings that decide the numbers, as JSON values.

    Args:
        config: a dataclass.
        free: fields that decide none, or that are told otherwise.
    """
    values = {key: value for key, value in asdict(config).items() if key not in free}
    decided: dict[str, Any] = json.loads(json.dumps(values))
    return decided


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Settings that are not the same, in words; empty = none."""
    return ", ".join(
        f"{key} is {theirs.get(key)} there, {ours.get(key)} here"
        for key in sorted({*theirs, *ours})
        if theirs.get(key) != ours.get(key)
    )


def watched(batches: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    """The same batches with a progress bar on the first rank."""
    bar: Iterable[Any] = tqdm(
        batches, total=total, desc=what, disable=not ranks.is_first(), leave=False
    )
    return bar
