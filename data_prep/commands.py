"""What can be done on the command line? Looking at images, sharding, checking, describing."""

import io
import json as jsons
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TextIO

import tyro

from data_prep import engines, images
from data_prep.class_files import read_class_names
from data_prep.class_numbers import Unlabelled
from data_prep.command_sources import shorten_commands
from data_prep.index import index_tars
from data_prep.listing import Listing
from data_prep.look import describe_source, source_as_json
from data_prep.member_names import quote_message
from data_prep.pixel_stats import measure_pixels
from data_prep.scratch import scratch_folder
from data_prep.shard import make_shards
from data_prep.shard_options import ShardOptions, check_options
from data_prep.source_options import SourceOptions
from data_prep.sources import list_images
from data_prep.stats import draw_histograms, set_stats
from data_prep.verify import verify_set
from data_prep.wds_samples import MemberPick
from mocov3_ds.data import manifest as manifests
from mocov3_ds.data import storage
from mocov3_ds.settings.bounds import Bounds
from mocov3_ds.settings.environment import check_environment
from mocov3_ds.settings.paths import expand_home


def say(line: str, stream: TextIO | None = None) -> None:
    """Print a line; a reader that has gone away does not decide how the work ends.

    Args:
        line: Text of one or more lines.
        stream: Where to; None = standard output.
    """
    stream = sys.stdout if stream is None else stream
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        with suppress(OSError):  # what is still buffered must not fail when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError:  # a full disk below a log, a closed terminal
        return


Url = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]


@dataclass(frozen=True, kw_only=True)
class SourceArguments:
    """What a source is and how it is read."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """images: a folder, archive, pattern ('tars/train-*.tar'), braces ('t-{0000..0127}.tar'), or
    several archives joined by ::"""
    under: str = ""
    """take only the images in this folder of SRC, or of each of its archives"""
    classes: Path | None = None
    """file that names the classes, one a line, which numbers them; default sorted names"""
    labels: Path | None = None
    """file with the label of each image: rows of image and class (TAB, comma, semicolon or blank
    between), or a class a line in the order of the images' names (numbers from 1, as in ImageNet's
    kit, need --classes)"""
    image: str = ""
    """column of a parquet file, or member of samples (left.png, png), that is the image, where
    several can be"""
    label: str = ""
    """column, member of samples (KEY.NAME) or entry of their JSON that holds the class, where
    several can; `-` takes the images without labels"""
    unlabelled: Unlabelled = "refuse"
    """images without a label where others have one; `keep` leaves them without"""
    reading: Annotated[SourceOptions, tyro.conf.arg(name="")] = field(default_factory=SourceOptions)

    def list_images(self, scratch_folder: Path | None, *, is_look: bool = False) -> Listing:
        """List the images of the source.

        Args:
            scratch_folder: Folder for copies of compressed tars and parquet files.
            is_look: Write nothing where that is possible.
        """
        return list_images(
            self.source,
            under=self.under,
            classes=self.classes,
            labels=self.labels,
            image=self.image,
            label=self.label,
            unlabelled=self.unlabelled,
            scratch_folder=scratch_folder,
            options=self.reading,
            is_look=is_look,
        )


@dataclass(frozen=True, kw_only=True)
class LookCommand(SourceArguments):
    """Say what would be sharded, and write nothing.

    The form of SRC, its images by ending, its classes and where they come from, label files that
    are not used, and what is left out and why: the lines that `shard` begins with. Where more than
    one reading is possible, the sentence names them and the flags that decide.

        python -m data_prep look imagenet/train
        python -m data_prep look 'tars/train-{0000..0127}.tar' --json
    """

    json: bool = False
    """print one JSON object"""

    def run(self) -> None:
        """Print what was understood."""
        listing = self.list_images(None, is_look=True)
        if self.json:
            say(jsons.dumps(source_as_json(listing, self.source), indent=1))
        for line in [] if self.json else describe_source(listing, self.source):
            say(line)


@dataclass(frozen=True, kw_only=True)
class ShardCommand(SourceArguments):
    """Make WebDataset shards with a manifest.

    SRC is a folder of class folders, ILSVRC2012_img_train.tar (never unpacked), a tar of images or
    of webdataset samples, a parquet file with image bytes, or a folder of such files. DST is a
    folder or an object-store URL (s3://, gs://, az://; credentials as their own tools take them).

    A run that was killed goes on when the same command is given again; finished shards are checked
    and kept. The result depends on images and options alone: the same bytes with any number of
    workers. DST gets the tars, manifest.json and index.bin (written last), rejects.jsonl where
    images were left out, and plan.json and receipts/, which let a run go on.

        python -m data_prep shard imagenet/train shards --split train --shard-size 256MB
        python -m data_prep shard ILSVRC2012_img_train.tar s3://bucket/imagenet --split train
        python -m data_prep shard ILSVRC2012_img_val.tar shards --split val --labels val.txt
    """

    destination: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """folder or URL where the set goes"""
    options: Annotated[ShardOptions, tyro.conf.arg(name="")]
    workers: int = 0
    """number of processes; 0 = one a core"""
    engine: Literal["processes", "ray"] = "processes"
    """`ray` spreads the shards over a Ray cluster (the one of RAY_ADDRESS, or a local one); all its
    machines must see SRC and DST under the same path, or DST be a URL"""
    scratch: Path | None = None
    """folder for the plain copy of a compressed tar or parquet file, gone at the end (after a kill:
    when the next run begins); default the system's temporary folder. With --engine ray it must be
    shared"""

    def run(self) -> None:
        """Make the shards and print what was done."""
        options, workers, engine = self.options, self.workers, engines.ray_cluster
        if self.engine == "processes":
            workers, engine = workers or engines.default_workers(), engines.process_pool
        if 0 < options.resize < images.FAITHFUL_SIDE:
            print(
                f"data_prep: --resize {options.resize} changes what the network sees: small crops "
                "are enlarged and less sharp than those of the originals, most of all in the "
                f"second view, which is seldom blurred. From {images.FAITHFUL_SIDE} on they hardly "
                "are.",
                file=sys.stderr,
            )
        check_options(options)
        url = self.destination
        url = storage.join_url(url, options.split) if options.split else url
        with scratch_folder(self.scratch) as folder:
            listing = self.list_images(folder)
            source = shorten_commands(self.source)
            for line in describe_source(listing, source):
                say(line)
            summary = make_shards(
                listing, url, options, workers=workers, source=source, engine=engine
            )
        say(str(summary))
        quoted_url = shlex.quote(url)
        say(f"check:  python -m data_prep verify {quoted_url}")
        say(f"train:  deepspeed mocov3_ds/train.py --recipe RECIPE --data.shards {quoted_url}")


def check_set(url: Url, /, *, decode: bool = True, json: bool = False, workers: int = 0) -> int:
    """Hold every byte of a set against its manifest; exit code 1 if anything is wrong.

    Digests, counts, index, readability of every image, and the spread of labels are checked; images
    and keys that occur more than once are reported, too.

    Args:
        url: folder or URL of the set.
        decode: decode every image; --no-decode looks at headers only.
        json: print one JSON object.
        workers: number of processes; 0 = one a core.
    """
    workers = workers or engines.default_workers()
    verdict = verify_set(url, workers=workers, decode_all=decode)
    say(verdict.as_json() if json else str(verdict))
    return 0 if verdict.is_sound else 1


def index_set(
    url: Url,
    /,
    *,
    classes: Path | None = None,
    unlabelled: Unlabelled = "refuse",
    files: str = "",
    manifest: str = "",
    image: str = "",
    label: str = "",
    replace: bool = False,
    workers: int = 0,
) -> None:
    """Write the manifest of tars that others made, so that they can be streamed and verified.

    Samples are an image (KEY.jpg, .png, ...) with its label in KEY.cls or KEY.json, or without one:
    labels that are only folder names are read by `shard`, not here. A tar that is cut or damaged is
    refused; nothing but the manifest, its index and maybe rejects.jsonl is written.

    Args:
        url: folder or URL of the tars, or some tars of it ('tars/train-{0000..0127}.tar', a
            pattern).
        classes: file that names the classes, one a line.
        unlabelled: samples without a label where others have one; `keep` leaves them without.
        files: describe only the tars whose names match ('train-*.tar', braces, joined by ::); on a
            web server the names themselves ('train-{000..127}.tar').
        manifest: folder or URL for the manifest of tars that lie where nothing can be written; it
            names their place, and is then the set. Default: beside the tars.
        image: member of a sample (left.png, png) that is the image, where there are several.
        label: likewise the label, or the entry of its JSON; `-` describes images alone.
        replace: write a new manifest where there is one.
        workers: number of processes; 0 = one a core.
    """
    shards = index_tars(
        url,
        workers=workers or engines.default_workers(),
        classes=None if classes is None else read_class_names(classes),
        unlabelled=unlabelled,
        files=files,
        manifest_folder=manifest,
        pick=MemberPick(image, label),
        replace=replace,
        say=say,
    )
    say(f"{shards.url}: {shards.samples} samples in {len(shards.shards)} shards, manifest written")


def show_stats(
    url: Url,
    /,
    *,
    picture: Path | None = None,
    json: bool = False,
    pixels: int | Literal["all"] = 1000,
    channels: int = 3,
) -> None:
    """Say how classes and sizes are spread, and what mean and deviation the pixels have.

    The last lines are the flags that training takes (--views.mean, --views.std): each image counts
    the same, at its full size.

    Args:
        url: folder or URL of the set.
        picture: PNG file to draw the histograms to.
        json: print one JSON object.
        pixels: images whose pixels are read, spread evenly over the set; `all` reads each one,
            0 none (then the manifest alone is read).
        channels: channels that the images are decoded to, as --views.channels of training.
    """
    Bounds(1, 256).check_value("channels", channels)
    stats, measured = set_stats(url), None
    if pixels:
        count = 0 if pixels == "all" else pixels
        Bounds(0).check_value("pixels", count)
        measured = measure_pixels(manifests.load(url), images=count, channels=channels)
    if json:
        tree = stats.as_json() | ({"pixels": measured.as_json()} if measured else {})
        say(jsons.dumps(tree, indent=1))
    else:
        say("\n".join(map(str, filter(None, (stats, measured)))))
    if picture is not None:
        draw_histograms(stats, picture)
        print(f"picture: {picture}", file=sys.stderr)


def main() -> int:
    """Entry point of `python -m data_prep`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        check_environment()
        with _end_on_signals():
            command = tyro.extras.subcommand_cli_from_dict(
                {
                    "look": LookCommand,
                    "shard": ShardCommand,
                    "verify": check_set,
                    "stats": show_stats,
                    "index": index_set,
                },
                prog="python -m data_prep",
                args=expand_home(sys.argv[1:]),
                description="Images in any form to shards that stream, and checks on them.",
            )
            if isinstance(command, LookCommand | ShardCommand):
                command.run()
                return 0
    except (ValueError, OSError) as error:
        say(f"data_prep: error: {quote_message(str(error))}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("data_prep: interrupted; the same command goes on from here.", sys.stderr)
        return 130
    return int(command or 0)


@contextmanager
def _end_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that scratch files go."""

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        say(
            f"data_prep: ended by {signal.Signals(number).name}; the same command goes on from "
            "here.",
            sys.stderr,
        )
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
