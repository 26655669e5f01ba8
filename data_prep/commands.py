"""What can be done on the command line? `python -m data_prep shard | verify | stats | index`."""

import json as jsons
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data_prep import engines, images
from data_prep.class_files import read_class_names
from data_prep.class_numbers import Unlabelled
from data_prep.index import index_tars
from data_prep.shard import make_shards
from data_prep.shard_options import ShardOptions
from data_prep.sources import list_images
from data_prep.stats import draw_histograms, set_stats
from data_prep.verify import verify_set
from mocov3_ds.data import storage
from mocov3_ds.settings.paths import expand_home

Url = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]


@dataclass(frozen=True, kw_only=True)
class ShardCommand:
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

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """images to shard"""
    destination: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """folder or URL where the set goes"""
    options: Annotated[ShardOptions, tyro.conf.arg(name="")]
    under: str = ""
    """take only the images in this folder of SRC"""
    classes: Path | None = None
    """file that names the classes, one a line, which numbers them; default sorted names"""
    labels: Path | None = None
    """file with the label of each image: rows of image and class (TAB, comma, semicolon or blank
    between), or a class a line in the order of the images' names (numbers from 1, as in ImageNet's
    kit, need --classes)"""
    image: str = ""
    """column of a parquet file that holds the images, where several can"""
    label: str = ""
    """column of a parquet file or of --labels that holds the class, where several can; - = none"""
    unlabelled: Unlabelled = "refuse"
    """images without a label where others have one; `keep` leaves them without"""
    workers: int = 0
    """number of processes; 0 = one a core"""
    engine: Literal["processes", "ray"] = "processes"
    """`ray` spreads the shards over a Ray cluster (the one of RAY_ADDRESS, or a local one); all its
    machines must see SRC and DST under the same path, or DST be a URL"""
    scratch: Path | None = None
    """folder for the plain copy of a compressed tar or parquet file, gone at the end; default the
    system's temporary folder. With --engine ray it must be shared"""

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
        url = self.destination
        url = storage.join_url(url, options.split) if options.split else url
        with tempfile.TemporaryDirectory(prefix="data_prep-", dir=self.scratch) as folder:
            listing = list_images(
                self.source,
                under=self.under,
                classes=self.classes,
                labels=self.labels,
                image=self.image,
                label=self.label,
                unlabelled=self.unlabelled,
                scratch_folder=Path(folder),
            )
            for note in listing.notes:
                print(f"data_prep: {note}", file=sys.stderr)
            summary = make_shards(
                listing, url, options, workers=workers, source=self.source, engine=engine
            )
        print(summary)
        print(f"check:  python -m data_prep verify {url}")
        print(f"train:  deepspeed mocov3_ds/train.py --recipe RECIPE --data.shards {url}")


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
    print(verdict.as_json() if json else verdict)
    return 0 if verdict.is_sound else 1


def index_set(
    url: Url,
    /,
    *,
    classes: Path | None = None,
    unlabelled: Unlabelled = "refuse",
    replace: bool = False,
    workers: int = 0,
) -> None:
    """Write the manifest of tars that others made, so that they can be streamed and verified.

    Samples are an image (KEY.jpg, .png, ...) with its label in KEY.cls or KEY.json, or without one:
    labels that are only folder names are read by `shard`, not here. A tar that is cut or damaged is
    refused; nothing but the manifest, its index and maybe rejects.jsonl is written.

    Args:
        url: folder or URL of the tars.
        classes: file that names the classes, one a line.
        unlabelled: samples without a label where others have one; `keep` leaves them without.
        replace: write a new manifest where there is one.
        workers: number of processes; 0 = one a core.
    """
    shards = index_tars(
        url,
        workers=workers or engines.default_workers(),
        classes=None if classes is None else read_class_names(classes),
        unlabelled=unlabelled,
        replace=replace,
    )
    print(
        f"{shards.url}: {shards.samples} samples in {len(shards.shards)} shards, manifest written"
    )


def show_stats(url: Url, /, *, picture: Path | None = None, json: bool = False) -> None:
    """Say how classes and sizes are spread, from the manifest alone.

    Args:
        url: folder or URL of the set.
        picture: PNG file to draw the histograms to.
        json: print one JSON object.
    """
    stats = set_stats(url)
    print(jsons.dumps(stats.as_json(), indent=1) if json else stats)
    if picture is not None:
        draw_histograms(stats, picture)
        print(f"picture: {picture}", file=sys.stderr)


def main() -> int:
    """Entry point of `python -m data_prep`."""
    try:
        result = tyro.extras.subcommand_cli_from_dict(
            {"shard": ShardCommand, "verify": check_set, "stats": show_stats, "index": index_set},
            prog="python -m data_prep",
            args=expand_home(sys.argv[1:]),
            description="Images in any form to shards that can be streamed, and checks on them.",
        )
        if isinstance(result, ShardCommand):
            result.run()
            return 0
    except (ValueError, OSError) as error:
        print(f"data_prep: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data_prep: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    return int(result or 0)
