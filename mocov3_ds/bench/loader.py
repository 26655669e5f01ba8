"""CPU milliseconds an image of the loaders, from the tars to the batch, and of their stages.

    python -m mocov3_ds.bench loader SHARDS [SHARDS ...]

SHARDS are folders made by `python -m data_prep shard`, original bytes first. CPU time is that of
all threads and worker processes, so it depends less on how busy the machine is than wall time does;
images/s/core is its inverse. Each loader runs in a process of its own, the loaders take turns, and
the median of the rounds counts. The yardstick is the usual pipeline (bench/reference_views.py) with
one DataLoader worker. "Colour on the device" leaves that work to the device, whose cost is not in
the table; float32 rows deliver normalised batches, as the yardstick does.
"""

import io
import os
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from typing import Any

import numpy as np
import psutil
import torch
import tyro
from PIL import Image

from mocov3_ds.data import manifest
from mocov3_ds.data.loader import Stream
from mocov3_ds.data.views import decode, native, photometric, reference
from mocov3_ds.data.views.pairs import make_pair
from mocov3_ds.data.views.photometric import ViewSpec

YARDSTICK = "Pillow + torchvision, DataLoader"
LOADERS = {
    YARDSTICK: ("reference", "", ""),
    "torchvision v2 on tensors, DataLoader": ("reference v2", "", ""),
    "native, colour on the device": ("ours", "native", ""),
    "native, colour on the CPU, uint8": ("ours", "native", "uint8"),
    "native, colour in the decode threads, uint8": ("ours", "native", "threads"),
    "native, all on the CPU, float32": ("ours", "native", "float32"),
    "wheels only (simplejpeg), colour on the device": ("ours", "simplejpeg", ""),
    "wheels only (simplejpeg), all on the CPU, float32": ("ours", "simplejpeg", "float32"),
    "Pillow, colour on the device": ("ours", "pillow", ""),
}


@dataclass(frozen=True, kw_only=True)
class Options:
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
    """instead of all tables: so many images in a row, and the memory after each tenth of them"""


def main(options: Options) -> None:
    """Print the tables."""
    print(f"views of {options.size} px, {options.images} images a round, ", end="")
    print(f"median of {options.rounds}, torch {torch.__version__}, decoder {decode.about()}\n")
    if options.long:
        _memory_table(options.shards[0], options)
        return
    for url in options.shards:
        _loaders_table(url, options)
        _stages_table(url, options)
    _scaling_table(options.shards[0], options)


def _loaders_table(url: str, options: Options) -> None:
    found = manifest.load(url)
    kilobytes = found.index_N["size"].mean() / 1e3
    print(f"{url}: {found.samples} images, {kilobytes:.0f} KB each\n")
    print("| whole loader | ms CPU/image | images/s/core | ratio |\n|---|---|---|---|")
    names = [n for n, (_, decoder, _) in LOADERS.items() if _runs_here(decoder)]
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            times[name].append(_in_own_process(_loader_ms, name, url, options))
    yardstick = statistics.median(times[YARDSTICK])
    for name, values in times.items():
        ms = statistics.median(values)
        print(f"| {name} | {ms:.2f} | {1e3 / ms:.0f} | {yardstick / ms:.1f} |", flush=True)
    print()


def _memory_table(url: str, options: Options) -> None:
    """Resident set of a process that does nothing but load, colour work in its threads."""
    print("| images | resident set, MiB |\n|---|---|")
    for images, mib in _in_own_process(_resident, url, options):
        print(f"| {images} | {mib:.1f} |")
    print()


def _resident(url: str, options: Options) -> list[tuple[int, float]]:
    found, rows = manifest.load(url), []
    batch = min(options.batch, found.samples)
    batches = -(-options.long // batch)
    with _stream(found, options, batch, options.threads[-1], augment=True) as stream:
        for number, _ in enumerate(islice(stream, batches), 1):
            if number * 10 // batches > (number - 1) * 10 // batches:
                rows.append((number * batch, psutil.Process().memory_info().rss / 2**20))
    return rows


def _stages_table(url: str, options: Options) -> None:
    print("| stage (both views) | ms CPU/image |\n|---|---|")
    rounds = [_in_own_process(_stages_ms, url, options) for _ in range(options.rounds)]
    for stage in rounds[0]:
        ms = statistics.median(r[stage] for r in rounds)
        print(f"| {stage} | {ms:.3f} |", flush=True)
    print()


def _scaling_table(url: str, options: Options) -> None:
    """Images/s of wall time as cores are added: threads, and what the machine itself gives."""
    counts = options.threads
    print(f"| images/s (wall) | {' | '.join(f'{n} at once' for n in counts)} | last / first |")
    print("|---" * (len(counts) + 2) + "|")
    ways: dict[str, Callable[[int], float]] = {
        "decode threads of one loader": lambda n: _in_own_process(_wall_rate, url, options, n),
        "loaders of one thread, a process each": lambda n: _side_by_side(
            _wall_rate, n, url, options, 1
        ),
        "entropy decoding alone, a process each": lambda n: _side_by_side(
            _floor_rate, n, url, options
        ),
    }
    for name, rate_of in ways.items():
        rounds = [[rate_of(n) for n in counts] for _ in range(options.rounds)]
        rates = [statistics.median(column) for column in zip(*rounds, strict=True)]
        cells = " | ".join(f"{rate:.0f}" for rate in rates)
        print(f"| {name} | {cells} | {rates[-1] / rates[0]:.2f} |", flush=True)
    print()


def _side_by_side(job: Callable[..., float], count: int, *arguments: Any) -> float:
    """Sum of what `count` processes deliver that do the same at the same time."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(count, context) as pool:
        jobs = [pool.submit(_quietly, job, *arguments) for _ in range(count)]
        return float(sum(one.result() for one in jobs))


def _wall_rate(url: str, options: Options, threads: int) -> float:
    return _ours(url, options, threads, "")[0]


def _floor_rate(url: str, options: Options) -> float:
    images = list(islice(reference.samples_of(manifest.load(url)), 500))
    delivered, started = 0, time.perf_counter()
    while delivered < options.images:
        _entropy(images)
        delivered += len(images)
    return delivered / (time.perf_counter() - started)


def _runs_here(decoder: str) -> bool:
    return not decoder or not decode._absence(decoder)  # type: ignore[arg-type]


def _in_own_process(job: Callable[..., Any], *arguments: Any) -> Any:
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports once, not once a loader
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_quietly, job, *arguments).result()


def _quietly(job: Callable[..., Any], *arguments: Any) -> Any:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return job(*arguments)


def _cpu_s() -> float:
    """CPU seconds of this process, its threads, and its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# --------------------------------------------------------------------------------- whole loaders


def _loader_ms(name: str, url: str, options: Options) -> float:
    """CPU milliseconds of an image of one loader."""
    kind, decoder, colour = LOADERS[name]
    if kind != "ours":
        return _reference_ms(url, options, second_set=kind == "reference v2")
    os.environ["MOCOV3_DS_DECODER"] = decoder
    if decoder != "native":  # as on a machine where the extension could not be built
        native.ready = lambda: False
    return _ours(url, options, 1, colour)[1]


def _reference_ms(url: str, options: Options, second_set: bool) -> float:
    found = manifest.load(url)
    batch = min(options.batch, found.samples)
    loader = reference.loader(found, ViewSpec(), options.size, batch, 1, second_set)
    delivered, started = 0, _cpu_s()
    while delivered < options.images:
        for first, _ in loader:
            delivered += len(first)
    return 1e3 * (_cpu_s() - started) / delivered


def _ours(url: str, options: Options, threads: int, colour: str) -> tuple[float, float]:
    """Images per second, and CPU milliseconds of an image."""
    spec, found = ViewSpec(), manifest.load(url)
    batch = min(options.batch, found.samples)
    with _stream(found, options, batch, threads, augment=colour == "threads") as stream:
        for _ in islice(stream, 10):  # the ring and what is read ahead are full
            pass
        batches = -(-options.images // batch)
        out_BCHW = torch.zeros(batch, 3, options.size, options.size)
        wall, cpu = time.perf_counter(), _cpu_s()
        for one in islice(stream, batches):
            for crops_BCHW, params_BP in zip(one.crops_VBCHW, one.params_VBP, strict=True):
                if colour == "uint8":
                    photometric.augment(crops_BCHW.numpy(), params_BP.numpy())
                elif colour == "float32":
                    photometric.photometric(
                        crops_BCHW, params_BP, spec.mean, spec.std, torch.float32, out_BCHW
                    )
        images = batches * batch
        return images / (time.perf_counter() - wall), 1e3 * (_cpu_s() - cpu) / images


def _stream(
    found: manifest.Manifest, options: Options, batch: int, threads: int, *, augment: bool
) -> Stream:
    return Stream(
        found,
        views=ViewSpec(),
        image_size=options.size,
        global_batch=batch,
        rank=0,
        world_size=1,
        seed=0,
        threads=threads,
        augment=augment,
    )


# ---------------------------------------------------------------------------------------- stages


class _Clock:
    """CPU seconds of this thread by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, work: Callable[[], Any]) -> Any:
        started = time.thread_time()
        result = work()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.thread_time() - started
        return result


def _stages_ms(url: str, options: Options) -> dict[str, float]:
    """CPU milliseconds of an image by stage, of the yardstick and of ours."""
    images = list(islice(reference.samples_of(manifest.load(url)), 500))
    clock = _Clock()
    _reference_stages(images, options.size, clock)
    clock("floor: entropy decoding (1/8 DCT)", partial(_entropy, images))
    if _runs_here("native"):
        _native_stages(images, options.size, clock)
    return {stage: 1e3 * seconds / len(images) for stage, seconds in clock.seconds.items()}


def _reference_stages(images: list[bytes], size: int, clock: _Clock) -> None:
    spec = ViewSpec()
    transforms = [reference.view_transform(spec, view, size).transforms for view in (0, 1)]
    names = ("crop and resize", "jitter", "grey", "blur", "solarise", "flip", "to tensor")
    for data in images:
        image = clock("Pillow: decode", partial(reference.open_rgb, data))
        for steps in transforms:
            view: Any = image
            for name, step in zip((*names, "normalise"), steps, strict=True):
                view = clock(f"Pillow: {name}", partial(step, view))


def _entropy(images: list[bytes]) -> None:
    """Decode at an eighth of the size: next to nothing but the entropy decoding is left."""
    for data in images:
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (image.width // 8, image.height // 8))
        image.load()


def _native_stages(images: list[bytes], size: int, clock: _Clock) -> None:
    spec = ViewSpec()
    crops_VCHW = np.empty((2, 3, size, size), np.uint8)
    rows_VP = np.empty((2, photometric.PARAMETERS), np.float32)
    for number, data in enumerate(images):
        pair = partial(make_pair, data, spec, 0, 0, number, crops_VCHW, rows_VP)
        clock("native: draw, decode, crop, resize, flip", pair)
        clock(
            "native: jitter, grey, blur, solarise",
            partial(photometric.augment, crops_VCHW, rows_VP),
        )
        crops = torch.from_numpy(crops_VCHW)
        plain = torch.tensor([photometric._PLAIN_ROW] * 2)
        normalise = partial(
            photometric.photometric, crops, plain, spec.mean, spec.std, torch.float32
        )
        clock("native: normalise", normalise)


def command() -> Any:
    """Entry of `python -m mocov3_ds.bench loader`."""
    return main(tyro.cli(Options, prog="python -m mocov3_ds.bench loader"))
