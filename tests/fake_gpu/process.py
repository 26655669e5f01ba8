"""Run a function in a process of its own that sees a fake card: `run_on_fake_gpu(fn, *args)`."""

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.fake_gpu.card import H100, FakeGpu, fake_environment

_ROOT = Path(__file__).resolve().parents[2]


def run_on_fake_gpu(
    function: Callable[..., Any],
    *args: Any,
    gpu: FakeGpu = H100,
    changes: Mapping[str, str] | None = None,
    timeout: float = 600.0,
) -> Any:
    """Call a top-level function in a new process on a fake card, and return what it returns.

    The function imports what it needs of `tests.fake_gpu.inside` itself.

    Args:
        function: Top-level function of a module of tests.
        args: Its arguments; they and the result are pickled.
        gpu: What the process is to believe of its card.
        changes: Environment variables that differ from those of this process; empty = unset.
        timeout: Seconds that the process may take.
    """
    with tempfile.TemporaryDirectory(prefix="on-fake-gpu-") as folder:
        result = Path(folder) / "result"
        call = pickle.dumps((_module_of(function), function.__qualname__, args))
        process = subprocess.run(
            [sys.executable, "-m", "tests.fake_gpu.process", str(result)],
            input=call,
            cwd=_ROOT,
            env=fake_environment(gpu, changes or {}),
            capture_output=True,
            timeout=timeout,
        )
        if not result.is_file():
            said = (process.stdout + process.stderr).decode(errors="replace")
            raise RuntimeError(f"status {process.returncode} on the fake GPU:\n{said[-8000:]}")
        return pickle.loads(result.read_bytes())


def _module_of(function: Callable[..., Any]) -> str:
    """Name under which another process imports the function."""
    module = sys.modules[function.__module__]
    return module.__spec__.name if module.__spec__ is not None else function.__module__


def _answer(path: Path) -> None:
    module, name, args = pickle.load(sys.stdin.buffer)
    result = getattr(importlib.import_module(module), name)(*args)
    path.write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _answer(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what was loaded knows nothing of a card that is not there
