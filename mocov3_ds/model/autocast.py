"""Arithmetic that keeps its precision whatever autocast asks for, also where there is none."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """Within, no product on this device is cast to a lower precision.

    Devices without autocast, as torch's meta device, which plans run on, have nothing to switch
    off; torch refuses to name some of them.

    Args:
        device: where the arithmetic runs.
    """
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
