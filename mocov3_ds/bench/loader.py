"""CPU milliseconds an image of the loaders, from the tars to the batch, and of their stages.

    python -m mocov3_ds.bench loader SHARDS [SHARDS ...]

SHARDS are folders made by `python -m data_prep shard`, original bytes first. CPU time is that of
all threads and worker processes, so it depends less on how busy the machine is than wall time does;
images/s/core is its inverse. Each loader runs in a process of its own, the loaders take turns, and
the median of the rounds counts. The yardstick is the usual pipeline (data/views/reference.py) with
one DataLoader worker. "Colour on the device" leaves that work to the device, whose cost is not in
the table; float32 rows deliver normalised batches, as the yardstick does.

Shape suffixes: V = view, B = batch, C H W = image, P = parameters of a view.
"""

import io
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from mocov3_ds.bench.resource_use import resident_bytes, used_cpu_seconds
from mocov3_ds.data import manifest
from mocov3_ds.data.loader import Loader, LoaderSettings
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.views import decode, photometric, reference
from mocov3_ds.data.views.crops import make_crops
from mocov3_ds.data.views.decode import Decoder
from mocov3_ds.data.views.spec import PARAMETERS, PLAIN_PARAMS, ViewSpec


@dataclass(frozen=True)
class Contender:
    """A loader of the table."""

    kind: Literal["ours", "reference", "reference v2"] = "ours"
    decoder: Decoder | None = None
    """our decoder; None = not ours"""
    colour: Literal["device", "uint8", "threads", "float32"] = "device"
    """where our colour work is done, and what it delivers"""

    @property
    def runs_here(self) -> bool:
        """Whether this machine has its decoder."""
        return self.decoder is None or not decode.explain_absence(self.decoder)


YARDSTICK = "Pillow + torchvision, DataLoader"
CONTENDERS = {
    YARDSTICK: Contender("reference"),
    "torchvision v2 on tensors, DataLoader": Contender("reference v2"),
    "native, colour on the device": Contender(decoder="native"),
    "native, colour on the CPU, uint8": Contender(decoder="native", colour="uint8"),
    "native, colour in the decode threads, uint8": Contender(decoder="native", colour="threads"),
    "native, all on the CPU, float32": Contender(decoder="native", colour="float32"),
    "wheels only (simplejpeg), colour on the device": Contender(decoder="simplejpeg"),
    "wheels only (simplejpeg), all on the CPU, float32": Contender(
        decoder="simplejpeg", colour="float32"
    ),
    "Pillow, colour on the device": Contender(decoder="pillow"),
}


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """CPU time of the loaders and their stages."""

    shards: tyro.conf.Positional[tuple[str, ...]]
    """folders or URLs of sharded sets"""
    size: int = 224
    """side of a view, pixels"""
    batch: int = 100
    """images of a batch"""
    images: int = 1000
    """images that each loader delivers in a round"""
    rounds: int = 3
    """rounds; the median counts"""
    threads: tuple[int, ...] = (1, 2)
    """decode threads for the scaling table"""
    long: int = 0
    """instead of all tables: load this many images in a row, and print the memory after each tenth
    of them"""


def run_bench(options: LoaderOptions) -> None:
    """Print the tables."""
    print(f"views of {options.size} px, {options.images} images a round, ", end="")
    print(f"median of {options.rounds}, torch {torch.__version__}, ", end="")
    print(f"decoder {decode.describe_decoder()}\n")
    if options.long:
        print_memory_table(options.shards[0], options)
        return
    for url in options.shards:
        print_loaders_table(url, options)
        print_stages_table(url, options)
    print_scaling_table(options.shards[0], options)


# ----------------------------------------------------------------------------------------- tables


def print_loaders_table(url: str, options: LoaderOptions) -> None:
    """Print CPU time of each loader that this machine has."""
    shards = manifest.load(url)
    kilobytes = shards.index_N["size"].mean() / 1e3
    print(f"{url}: {shards.samples} images, {kilobytes:.0f} KB each\n")
    print("| whole loader | ms CPU/image | images/s/core | ratio |\n|---|---|---|---|")
    names = [name for name, contender in CONTENDERS.items() if contender.runs_here]
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            times[name].append(_run_in_process(_measure_contender, name, url, options))
    yardstick = statistics.median(times[YARDSTICK])
    for name, values in times.items():
        ms = statistics.median(values)
        print(f"| {name} | {ms:.2f} | {1e3 / ms:.0f} | {yardstick / ms:.1f} |", flush=True)
    print()


def print_memory_table(url: str, options: LoaderOptions) -> None:
    """Print the resident set of a process that only loads, with colour work in its threads."""
    print("| images | resident set, MiB |\n|---|---|")
    for images, mib in _run_in_process(_measure_memory, url, options):
        print(f"| {images} | {mib:.1f} |")
    print()


def print_stages_table(url: str, options: LoaderOptions) -> None:
    """Print CPU time of each stage, of the yardstick and of ours."""
    print("| stage (both views) | ms CPU/image |\n|---|---|")
    rounds = [_run_in_process(measure_stages, url, options) for _ in range(options.rounds)]
    for stage in rounds[0]:
        ms = statistics.median(of_round[stage] for of_round in rounds)
        print(f"| {stage} | {ms:.3f} |", flush=True)
    print()


def print_scaling_table(url: str, options: LoaderOptions) -> None:
    """Print images/s of wall time as cores are added: of a loader, and what the machine can do."""
    counts = options.threads
    print(f"| images/s (wall) | {' | '.join(f'{n} at once' for n in counts)} | last / first |")
    print("|---" * (len(counts) + 2) + "|")
    ways: dict[str, Callable[[int], float]] = {
        "decode threads of one loader": lambda n: _run_in_process(_loading_rate, url, options, n),
        "loaders of one thread, a process each": lambda n: _run_in_processes(
            n, _loading_rate, url, options, 1
        ),
        "entropy decoding alone, a process each": lambda n: _run_in_processes(
            n, _entropy_rate, url, options
        ),
    }
    for name, measure_rate in ways.items():
        rounds = [[measure_rate(n) for n in counts] for _ in range(options.rounds)]
        rates = [statistics.median(column) for column in zip(*rounds, strict=True)]
        cells = " | ".join(f"{rate:.0f}" for rate in rates)
        print(f"| {name} | {cells} | {rates[-1] / rates[0]:.2f} |", flush=True)
    print()


def _run_in_processes(count: int, work: Callable[..., float], *arguments: Any) -> float:
    """Sum of what `count` processes return that do the same work at the same time."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports once, not once a process
    with ProcessPoolExecutor(count, context) as pool:
        futures = [pool.submit(_run_quietly, work, *arguments) for _ in range(count)]
        return float(sum(future.result() for future in futures))


def _run_in_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns in a fresh process."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_run_quietly, work, *arguments).result()


def _run_quietly(work: Callable[..., Any], *arguments: Any) -> Any:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return work(*arguments)


# ---------------------------------------------------------------------------------- whole loaders


def _measure_contender(name: str, url: str, options: LoaderOptions) -> float:
    """CPU milliseconds of an image of one loader."""
    contender = CONTENDERS[name]
    if contender.decoder is None:
        return _measure_reference(url, options, second_set=contender.kind == "reference v2")
    os.environ["MOCOV3_DS_DECODER"] = contender.decoder
    return _measure_ours(url, options, 1, contender)[1]


def _measure_reference(url: str, options: LoaderOptions, second_set: bool) -> float:
    shards = manifest.load(url)
    batch = min(options.batch, shards.samples)
    loader = reference.make_loader(shards, ViewSpec(), options.size, batch, 1, second_set)
    delivered, start = 0, used_cpu_seconds()
    while delivered < options.images:
        for first, _ in loader:
            delivered += len(first)
    return 1e3 * (used_cpu_seconds() - start) / delivered


def _measure_ours(
    url: str, options: LoaderOptions, threads: int, contender: Contender
) -> tuple[float, float]:
    """Images per second of wall time, and CPU milliseconds of an image."""
    shards = manifest.load(url)
    batch = min(options.batch, shards.samples)
    augment = contender.colour == "threads"
    with _open_loader(shards, options, batch, threads, augment=augment) as loader:
        for _ in islice(loader, 10):  # the ring and what is read ahead are full
            pass
        batches = -(-options.images // batch)
        out_BCHW = torch.zeros(batch, 3, options.size, options.size)
        wall, cpu = time.perf_counter(), used_cpu_seconds()
        for loaded in islice(loader, batches):
            for crops_BCHW, params_BP in zip(loaded.crops_VBCHW, loaded.params_VBP, strict=True):
                _colour_crops(crops_BCHW, params_BP, out_BCHW, contender)
        images = batches * batch
        cpu_ms = 1e3 * (used_cpu_seconds() - cpu) / images
        return images / (time.perf_counter() - wall), cpu_ms


def _colour_crops(
    crops_BCHW: Tensor, params_BP: Tensor, out_BCHW: Tensor, contender: Contender
) -> None:
    """The colour work that a contender leaves to the training process."""
    spec = ViewSpec()
    if contender.colour == "uint8":
        photometric.augment_crops(crops_BCHW.numpy(), params_BP.numpy())
    elif contender.colour == "float32" and contender.decoder == "native":
        photometric.make_views(crops_BCHW, params_BP, spec.mean, spec.std, torch.float32, out_BCHW)
    elif contender.colour == "float32":  # as on a machine where the library could not be built
        scale_C, shift_C = photometric.scale_and_shift(spec.mean, spec.std)
        photometric.make_views_torch(crops_BCHW, params_BP, scale_C, shift_C, out_BCHW)


def _open_loader(
    shards: Manifest, options: LoaderOptions, batch: int, threads: int, *, augment: bool
) -> Loader:
    settings = LoaderSettings(
        views=ViewSpec(),
        image_size=options.size,
        global_batch=batch,
        rank=0,
        world_size=1,
        seed=0,
        threads=threads,
        augment=augment,
    )
    return Loader(shards, settings)


def _measure_memory(url: str, options: LoaderOptions) -> list[tuple[int, float]]:
    """Images loaded so far and MiB of the resident set, after each tenth of the images."""
    shards, rows = manifest.load(url), []
    batch = min(options.batch, shards.samples)
    batches = -(-options.long // batch)
    with _open_loader(shards, options, batch, options.threads[-1], augment=True) as loader:
        for number, _ in enumerate(islice(loader, batches), 1):
            if number * 10 // batches > (number - 1) * 10 // batches:
                rows.append((number * batch, resident_bytes() / 2**20))
    return rows


def _loading_rate(url: str, options: LoaderOptions, threads: int) -> float:
    """Images per second of wall time of our loader, colour on the device."""
    return _measure_ours(url, options, threads, Contender(decoder=decode.current_decoder()))[0]


# ----------------------------------------------------------------------------------------- stages


class _StageClock:
    """CPU seconds of this thread, by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run_stage(self, stage: str, work: Callable[[], Any]) -> Any:
        """Run a piece of work, add its time to the stage, and return its result."""
        start = time.thread_time()
        result = work()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.thread_time() - start
        return result


def measure_stages(url: str, options: LoaderOptions) -> dict[str, float]:
    """CPU milliseconds of an image by stage, of the yardstick and of ours."""
    images = _read_images(url)
    clock = _StageClock()
    _run_reference_stages(images, options.size, clock)
    clock.run_stage("floor: entropy decoding (1/8 DCT)", partial(_decode_small, images))
    if Contender(decoder="native").runs_here:
        _run_native_stages(images, options.size, clock)
    return {stage: 1e3 * seconds / len(images) for stage, seconds in clock.seconds.items()}


def _read_images(url: str) -> list[bytes]:
    """Bytes of the first 500 images of a set."""
    return list(islice(reference.read_samples(manifest.load(url)), 500))


def _run_reference_stages(images: Sequence[bytes], size: int, clock: _StageClock) -> None:
    spec = ViewSpec()
    transforms = [reference.view_transform(spec, view, size).transforms for view in (0, 1)]
    names = ("crop and resize", "jitter", "grey", "blur", "solarise", "flip", "to tensor")
    for image_bytes in images:
        image = clock.run_stage("Pillow: decode", partial(reference.open_rgb, image_bytes))
        for steps in transforms:
            view: Any = image
            for name, step in zip((*names, "normalise"), steps, strict=True):
                view = clock.run_stage(f"Pillow: {name}", partial(step, view))


def _decode_small(images: Sequence[bytes]) -> None:
    """Decode at an eighth of the size, which takes little more than the entropy decoding."""
    for image_bytes in images:
        image = Image.open(io.BytesIO(image_bytes))
        image.draft("RGB", (image.width // 8, image.height // 8))
        image.load()


def _entropy_rate(url: str, options: LoaderOptions) -> float:
    """Images per second of wall time of entropy decoding alone."""
    images = _read_images(url)
    delivered, start = 0, time.perf_counter()
    while delivered < options.images:
        _decode_small(images)
        delivered += len(images)
    return delivered / (time.perf_counter() - start)


def _run_native_stages(images: Sequence[bytes], size: int, clock: _StageClock) -> None:
    spec = ViewSpec()
    crops_VCHW = np.empty((2, 3, size, size), np.uint8)
    params_VP = np.empty((2, PARAMETERS), np.float32)
    augment = partial(photometric.augment_crops, crops_VCHW, params_VP)
    inputs = torch.from_numpy(crops_VCHW), torch.tensor([PLAIN_PARAMS] * 2)
    normalise = partial(photometric.make_views, *inputs, spec.mean, spec.std, torch.float32)
    for number, image_bytes in enumerate(images):
        cut = partial(make_crops, image_bytes, spec, 0, 0, number, crops_VCHW, params_VP)
        clock.run_stage("native: draw, decode, crop, resize, flip", cut)
        clock.run_stage("native: jitter, grey, blur, solarise", augment)
        clock.run_stage("native: normalise", normalise)
