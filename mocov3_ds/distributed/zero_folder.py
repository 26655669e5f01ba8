"""Weights out of a folder that DeepSpeed's own `save_checkpoint` wrote, merged over its ranks.

DeepSpeed merges them (`zero_to_fp32`); what is added here is that no pickled code runs: torch is
told to build tensors, plain containers and the few harmless classes named below, nothing else.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

_HARMLESS = [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def merge_weights(folder: Path) -> dict[str, Tensor]:
    """All weights in fp32 by name, of ZeRO stages 0 to 3 and any world size.

    Args:
        folder: What `save_checkpoint` was given, or a folder of one step inside it.

    Raises:
        ValueError: Files of a rank are missing or unreadable, or hold pickled code.
    """
    step = _step_folder(folder)
    try:
        merged: dict[str, Tensor] = {}
        if any(step.glob("*_optim_states.pt")):
            with _no_pickled_code(), contextlib.redirect_stdout(io.StringIO()):
                merged = get_fp32_state_dict_from_zero_checkpoint(str(step.parent), tag=step.name)
        single = step / "mp_rank_00_model_states.pt"  # not there at stage 3
        if single.is_file():  # stage 0 has all weights here alone, stage 1 the frozen ones
            with _no_pickled_code():
                module = torch.load(single, map_location="cpu")["module"]
            merged = {n: t for n, t in module.items() if isinstance(t, Tensor)} | merged
        return merged
    # damaged pickles raise many kinds; DeepSpeed raises bare Exceptions and KeyErrors
    except Exception as error:
        sentence = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ValueError(
            f"{step} is a DeepSpeed checkpoint that cannot be read: {sentence[0]}"
        ) from error


def _step_folder(folder: Path) -> Path:
    latest = folder / "latest"
    if latest.is_file() and not list(folder.glob("*_model_states.pt")):
        return folder / latest.read_text().strip()
    return folder


@contextlib.contextmanager
def _no_pickled_code() -> Iterator[None]:
    """DeepSpeed asks torch for unrestricted pickles; torch's own switch overrules it."""
    previous = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            yield
    finally:
        if previous is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = previous
