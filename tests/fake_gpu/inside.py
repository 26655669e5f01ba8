"""What a process on a fake card counts and checks; only `process` and `__main__` import this.

Importing it turns cuDNN off, which has no stand-in, answers for Triton's launches, takes all
elements of a mask for true, and leaves out the comparisons of values that zeros cannot pass.
"""

import contextlib
import ctypes
import functools
import gc
import importlib
import io
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partitioned_param_coordinator

from mocov3_ds.distributed import heartbeat, ranks, zero
from mocov3_ds.faults.preemption import Preemption
from mocov3_ds.monitoring.profiler import TABLE_ROWS, PhaseClock, StepPhase, running_clock

COUNTS = (
    *("kernels", "compiled", "products", "to_device", "to_device_bytes", "to_host"),
    *("to_host_bytes", "within", "within_bytes", "sets", "syncs", "collectives", "allocations"),
)
"""names of what the library counts, in the order of `Count` in state.h"""
SYNC_KINDS = ("stream", "device", "event", "copy")
_ROOT = str(Path(__file__).resolve().parents[2])

_library = ctypes.CDLL(None)
_library.fake_gpu_count.restype = ctypes.c_long
_library.fake_gpu_launches.restype = ctypes.c_char_p
_library.fake_gpu_unordered.restype = ctypes.c_long


def set_card(name: str, value: float) -> None:
    """Change what the card says of itself from now on.

    Args:
        name: MEMORY_GB, HELD_GB, CAPABILITY, COUNT or DRIVER, see `card.FakeGpu`.
        value: Its new value; a capability is ten times itself.
    """
    _library.fake_gpu_set(name.encode(), ctypes.c_double(value))


def count_unordered(earlier: torch.cuda.Stream, later: torch.cuda.Stream) -> int:
    """Launches on one stream that the next launch on another would not wait for.

    Args:
        earlier: Stream whose launches are to be over.
        later: Stream that is to wait for them, by events and not by a wait of the host.
    """
    streams = [ctypes.c_void_p(stream.cuda_stream) for stream in (earlier, later)]
    return int(_library.fake_gpu_unordered(*streams))


@dataclass
class Use:
    """What a piece of work did on the card: launches, copies, waits, memory and mistakes."""

    kernels: int = 0
    """launches of torch's own kernels"""
    compiled: int = 0
    """launches through the driver, as compiled blocks make them"""
    products: int = 0
    """calls of cuBLAS"""
    to_device: int = 0
    to_device_bytes: int = 0
    to_host: int = 0
    to_host_bytes: int = 0
    within: int = 0
    """copies from the card to the card"""
    within_bytes: int = 0
    sets: int = 0
    syncs: int = 0
    """times that the host waited for the card"""
    collectives: int = 0
    """calls of NCCL"""
    allocations: int = 0
    """times that the allocator asked the driver for memory"""
    triton: Counter[str] = field(default_factory=Counter)
    """launches of Triton kernels of ours, by name"""
    names: Counter[str] = field(default_factory=Counter)
    """launches of torch's kernels, by mangled name"""
    places: Counter[str] = field(default_factory=Counter)
    """waits of the host, by kind and place"""
    phases: Counter[str] = field(default_factory=Counter)
    """launches in each phase of a step, by its row in the profile"""
    mistakes: list[str] = field(default_factory=list)
    """arguments of Triton kernels and of collectives that are on the wrong device or not
    contiguous"""
    allocated_gb: float = 0.0
    """peak of what tensors held, GiB"""
    reserved_gb: float = 0.0
    """peak of what the allocator held, GiB"""
    retries: int = 0
    """times that the allocator gave memory back to try again"""

    @property
    def launches(self) -> int:
        """All kernels, without those of a convolution image by image, which cuDNN would be one."""
        images = sum(number for name, number in self.names.items() if "im2col" in name)
        return self.kernels + self.compiled + self.products + self.triton.total() - 2 * images

    def describe(self) -> str:
        """One line for people."""
        return (
            f"launches {self.launches} (kernels {self.kernels}, products {self.products}, "
            f"compiled {self.compiled}, Triton {self.triton.total()}), syncs {self.syncs}, "
            f"collectives {self.collectives}, to device {self.to_device} "
            f"({self.to_device_bytes / 1e6:.1f} MB), to host {self.to_host}, within {self.within} "
            f"({self.within_bytes / 1e6:.1f} MB), sets {self.sets}, "
            f"allocated {self.allocated_gb:.2f}, reserved {self.reserved_gb:.2f} GiB, "
            f"allocations {self.allocations}, retries {self.retries}, mistakes {self.mistakes[:3]}"
        )


_uses: list[Use] = []


@contextlib.contextmanager
def counted(*, new_peaks: bool = True) -> Iterator[Use]:
    """Count what the block does; blocks may lie in one another.

    Args:
        new_peaks: Whether peaks of memory begin anew with the block.
    """
    use, before = Use(), [_library.fake_gpu_count(kind) for kind in range(len(COUNTS))]
    names, retries = _launches(), _memory("num_alloc_retries")
    if new_peaks and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    _uses.append(use)
    try:
        yield use
    finally:
        _uses.remove(use)
        for kind, name in enumerate(COUNTS):
            setattr(use, name, _library.fake_gpu_count(kind) - before[kind])
        use.names = _launches() - names
        use.allocated_gb = _memory("allocated_bytes.all.peak") / 2**30
        use.reserved_gb = _memory("reserved_bytes.all.peak") / 2**30
        use.retries = _memory("num_alloc_retries") - retries


class _LaunchClock(PhaseClock):
    """Counts launches where a profile counts time.

    Args:
        use: what the step does, which gets the launches of its phases.
    """

    def __init__(self, use: Use) -> None:
        super().__init__(torch.device("cpu"))
        self._use = use

    def _mark_time(self) -> object:
        counts = (
            _library.fake_gpu_count(COUNTS.index(n)) for n in ("kernels", "compiled", "products")
        )
        images = sum(number for name, number in _launches().items() if "im2col" in name)
        return sum(counts) + self._use.triton.total() - 2 * images

    def close(self) -> None:
        """Give the launches to the rows of the profile."""
        for path, begin, end in self._spans:
            title = next(row.title for row in TABLE_ROWS if row.counts(path))
            assert isinstance(begin, int) and isinstance(end, int)
            self._use.phases[title] += end - begin


def _launches() -> Counter[str]:
    lines = _library.fake_gpu_launches().decode().splitlines()
    return Counter({name: int(n) for n, _, name in (line.partition("\t") for line in lines)})


def _memory(statistic: str) -> int:
    return int(torch.cuda.memory_stats().get(statistic, 0)) if torch.cuda.is_initialized() else 0


# ---------------------------------------------------------------------------------- waits, places


def _place() -> str:
    """The innermost lines of this program and of DeepSpeed on the stack."""
    frame: FrameType | None = sys._getframe(2)
    places: list[str] = []
    while frame is not None and len(places) < 3:
        path = frame.f_code.co_filename
        if "/deepspeed/" in path or path.startswith(f"{_ROOT}/mocov3_ds"):
            short = path.split("site-packages/")[-1].removeprefix(f"{_ROOT}/")
            places.append(f"{short}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(places) or "elsewhere"


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _observe_sync(kind: int) -> None:
    if _uses:
        place = f"{SYNC_KINDS[kind]}: {_place()}"
        for use in _uses:
            use.places[place] += 1


_library.fake_gpu_observe(_observe_sync)


# ------------------------------------------------------------------------------ Triton, collectives


def _note_triton(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """Stands for `JITFunction.run`: checks what the kernel would be given."""
    name = self.fn.__name__
    shape = tuple(grid(options) if callable(grid) else grid)
    is_legal = min(shape) > 0 and max(shape[1:], default=1) <= 65535
    mistakes = [] if is_legal else [f"{name}: a grid of {shape}"]
    for place, tensor in enumerate(args):
        if isinstance(tensor, torch.Tensor):
            if tensor.device.type != "cuda":
                mistakes.append(f"{name}: argument {place} is on {tensor.device}")
            if not tensor.is_contiguous():
                mistakes.append(f"{name}: argument {place} is not contiguous")
    for use in _uses:
        use.triton[name] += 1
        use.mistakes += mistakes


def _checked(name: str, method: Any) -> Any:
    def call(self: Any, *args: Any, **options: Any) -> Any:
        stack: list[Any] = [*args]
        while stack:
            value = stack.pop()
            if isinstance(value, (list, tuple)):
                stack += value
            elif isinstance(value, torch.Tensor) and value.device.type != "cuda":
                for use in _uses:
                    use.mistakes.append(f"{name}: a tensor on {value.device} at {_place()}")
        return method.__get__(self)(*args, **options)

    return call


def _all_true(mask: torch.Tensor) -> torch.Tensor:
    """Stands for `nonzero`, which zeros would leave without rows: each element counts as true."""
    torch.cuda.current_stream(mask.device).synchronize()  # as the real one does
    return mask.new_empty((mask.numel(), mask.dim()), dtype=torch.int64)


def _all_equal(
    values: torch.Tensor, *_: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stands for `unique`: zeros are all the same."""
    torch.cuda.current_stream(values.device).synchronize()  # as the real one does
    inverse = torch.zeros_like(values, dtype=torch.int64)
    return values.flatten()[:1].clone(), inverse, inverse.new_zeros(min(values.numel(), 1))


_overrides = torch.library.Library("aten", "IMPL")


def _install() -> None:
    warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
    _overrides.impl("nonzero", _all_true, "CUDA")
    _overrides.impl("_unique2", _all_equal, "CUDA")
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    zero._compare_with_model = lambda drafts: None
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None
    for name in ranks._COLLECTIVES:
        if name in vars(dist.ProcessGroup):
            setattr(dist.ProcessGroup, name, _checked(name, vars(dist.ProcessGroup)[name]))
    if os.environ.get("FAKE_GPU_TRITON") != "real":
        from triton.runtime.jit import JITFunction  # type: ignore[import-untyped]

        JITFunction.run = _note_triton


_install()


# -------------------------------------------------------------------------------------- programs


@dataclass
class Finished:
    """How a program ended."""

    status: int
    output: str
    steps: list[Use]
    """what each step of the trainer did"""

    @property
    def last_line(self) -> str:
        """The last line of the output that is not empty: the sentence of a failed run."""
        return next((line for line in reversed(self.output.splitlines()) if line.strip()), "")


def run_program(
    module: str, arguments: Sequence[str], *, before_step: Callable[[int], None] | None = None
) -> Finished:
    """Call `main` of a module as a command line would, and count each step of training.

    Args:
        module: Name of the module.
        arguments: The command line behind the program's name.
        before_step: Called with the number of each step from 1, before it.
    """
    from mocov3_ds import train

    steps: list[Use] = []
    original = train.train_one_step

    def count_step(*args: Any) -> None:
        if before_step is not None:
            before_step(len(steps) + 1)
        with counted() as use:
            steps.append(use)
            clock = _LaunchClock(use)
            with running_clock(clock):
                clock.enter(StepPhase.STEP)
                original(*args)
                clock.leave()
            clock.close()

    find_stop = Preemption.find_stop

    def count_find_stop(self: Any) -> Any:
        with counted(new_peaks=False) as use:  # a part of the step, too
            stop = find_stop(self)
        steps[-1].syncs += use.syncs
        steps[-1].places += use.places
        return stop

    output = io.StringIO()
    gc.collect()
    torch.cuda.empty_cache()  # what an earlier program left behind
    with (
        mock.patch.object(sys, "argv", [module, *arguments]),
        mock.patch.object(train, "train_one_step", count_step),
        mock.patch.object(Preemption, "find_stop", count_find_stop),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            status = importlib.import_module(module).main()
        except SystemExit as ending:
            status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
            output.write("" if isinstance(ending.code, int) else str(ending.code or ""))
        except Exception:
            status = 1
            traceback.print_exc()
    return Finished(status or 0, output.getvalue(), steps)


train = functools.partial(run_program, "mocov3_ds.train")


@contextlib.contextmanager
def pretended_world(size: int, *, local_size: int = 8) -> Iterator[None]:
    """Be rank 0 of a world in which nobody else is: NCCL answers, and all say what rank 0 says.

    Args:
        size: Number of ranks.
        local_size: Ranks of this machine.
    """
    variables = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(min(local_size, size)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29999",
    }

    def join_group(device: torch.device, timeout: Any) -> None:
        store = dist.HashStore()  # type: ignore[no-untyped-call]
        dist.init_process_group("nccl", store=store, rank=0, world_size=size, device_id=device)

    with (
        mock.patch.dict("os.environ", variables),
        mock.patch.object(ranks, "_join_group", join_group),
        mock.patch.object(ranks, "gather_objects", lambda value: [value] * size),
        mock.patch.object(ranks, "broadcast_object", lambda value, source=0: value),
        mock.patch.object(heartbeat, "start", lambda *args, **options: None),
    ):
        yield
