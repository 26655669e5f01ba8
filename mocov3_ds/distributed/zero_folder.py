"""Weights out of a folder that DeepSpeed's own `save_checkpoint` wrote, merged over its ranks.

DeepSpeed merges them (`zero_to_fp32`); what is added here is that no pickled code runs: torch is
told to build tensors, plain containers, the few harmless classes named below and what the caller
gives it in the place of others, nothing else.
"""

import contextlib
import io
import os
import pickle
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

_HARMLESS = [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def merge_weights(folder: Path, stand_ins: Sequence[Any] = ()) -> dict[str, Tensor]:
    """All weights in fp32 by name, of ZeRO stages 0 to 3 and any world size.

    Args:
        folder: What `save_checkpoint` was given, or a folder of one step inside it.
        stand_ins: What torch is given in the place of classes that a program saved beside its
            weights: pairs of a harmless class and the name that it stands for.

    Raises:
        ValueError: Files of a rank are missing or unreadable, or hold pickled code.
    """
    step = _step_folder(folder)
    try:
        merged: dict[str, Tensor] = {}
        if any(step.glob("*_optim_states.pt")):
            with _no_pickled_code(stand_ins), contextlib.redirect_stdout(io.StringIO()):
                merged = get_fp32_state_dict_from_zero_checkpoint(str(step.parent), tag=step.name)
        single = step / "mp_rank_00_model_states.pt"  # not there at stage 3
        if single.is_file():  # stage 0 has all weights here alone, stage 1 the frozen ones
            with _no_pickled_code(stand_ins):
                module = torch.load(single, map_location="cpu")["module"]
            merged = {n: t for n, t in module.items() if isinstance(t, Tensor)} | merged
        return merged
    # damaged pickles raise many kinds; DeepSpeed raises bare Exceptions and KeyErrors
    except pickle.UnpicklingError as error:
        line = next((line for line in str(error).splitlines() if "GLOBAL" in line), "")
        name = (line.partition("GLOBAL ")[2].split() or ["a class that is not named"])[0]
        raise ValueError(
            f"{step} is a DeepSpeed checkpoint that cannot be read: it holds pickled objects "
            f"besides tensors, which could run code and are not opened ({name!r}). Where you trust "
            "it, this saves its weights alone, which can be read: python -m "
            f"deepspeed.utils.zero_to_fp32 {shlex.quote(str(step.parent))} OUT -t {step.name}"
        ) from None
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
def _no_pickled_code(stand_ins: Sequence[Any]) -> Iterator[None]:
    """DeepSpeed asks torch for unrestricted pickles; torch's own switch overrules it."""
    previous = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([*stand_ins, *_HARMLESS]):
            yield
    finally:
        if previous is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = previous
