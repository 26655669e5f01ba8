"""How busy is the machine? A few figures for curves, read every ten seconds."""

import contextlib
import time

import psutil
import torch

_EVERY_S = 10.0


class MachineFigures:
    """Reads figures of this process and its machine, not more often than every ten seconds.

    Args:
        device: Device of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._due = device, 0.0
        self._process = psutil.Process()
        psutil.cpu_percent()  # the first call has nothing to compare with

    def read(self) -> dict[str, float]:
        """Return figure -> number where they are due again, else nothing.

        `machine_cpu_percent` of all cores, `machine_memory_percent`, `machine_process_gib`
        (resident set of this rank), and of a GPU `machine_gpu_percent` and
        `machine_gpu_memory_gib`, where the package nvidia-ml-py is there.
        """
        if time.monotonic() < self._due:
            return {}
        self._due = time.monotonic() + _EVERY_S
        figures = {
            "system/machine_cpu_percent": psutil.cpu_percent(),
            "system/machine_memory_percent": psutil.virtual_memory().percent,
            "system/machine_process_gib": self._process.memory_info().rss / 2**30,
        }
        if self._device.type == "cuda":
            with contextlib.suppress(
                Exception
            ):  # no package for it, or a driver that does not tell
                figures["system/machine_gpu_percent"] = float(torch.cuda.utilization(self._device))
                used = torch.cuda.device_memory_used(self._device)
                figures["system/machine_gpu_memory_gib"] = used / 2**30
        return figures
