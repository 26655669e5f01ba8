"""The command line of data_prep."""

import json as jsons
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data_prep import engines, images
from data_prep import shard as sharding
from data_prep import verify as verifying
from data_prep.sources import open_source, read_names
from data_prep.stats import draw, stats_of
from mocov3_ds.data import storage

Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
Url = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]


def shard(
    source: Source,
    destination: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")],
    /,
    *,
    split: str = "",
    under: str = "",
    shard_size: str = "1000",
    seed: int = 0,
    classes: Path | None = None,
    labels: Path | None = None,
    resize: int = 0,
    quality: int = 90,
    reencode: bool = False,
    check: images.Check = "header",
    workers: int = 0,
    engine: Literal["processes", "ray"] = "processes",
    scratch: Path | None = None,
) -> None:
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

    Args:
        source: what to shard.
        destination: where the set goes.
        split: name of the split: the set goes to DST/SPLIT, its shards are SPLIT-000000.tar, ...
        under: take only what lies in this folder of SRC.
        shard_size: samples (1000) or bytes of source images (256MB) of each shard, about.
        seed: of the order of the images over all shards.
        classes: file that names the classes, one a line, which numbers them; default sorted names.
        labels: file with the label of each image (`IMAGE CLASS` lines, or a class a line in the
            order of the images' names; numbers from 1 as in ImageNet's kit need --classes).
        resize: shrink images whose shorter side is longer than this, as JPEG; 0 keeps all bytes;
            384 with --reencode halves them and views of 224 pixels hardly change, 256 blurs theirs.
        quality: of the JPEG of resized images.
        reencode: with --resize, write smaller images again as JPEG, too.
        check: `header` finds broken headers and cut files, `decode` also damaged pixels (20 x CPU).
        workers: processes; 0 = one a core.
        engine: `ray` spreads the shards over a Ray cluster (the one of RAY_ADDRESS, or a local
            one); all its machines must see SRC and DST under the same path, or DST be a URL.
        scratch: folder for the plain copy of a compressed tar or parquet file, gone at the end;
            default the system's temporary folder. With --engine ray it must be shared.
    """
    if engine == "processes":
        workers = workers or engines.default_workers()
    options = sharding.Options(
        shard_size=shard_size,
        seed=seed,
        resize=resize,
        quality=quality,
        reencode=reencode,
        check=check,
        split=split,
    )
    if 0 < resize < images.FAITHFUL_SIDE:
        print(
            f"data_prep: --resize {resize} changes what the network sees: small crops are enlarged "
            "and less sharp than those of the originals, most of all in the second view, which is "
            f"seldom blurred. From {images.FAITHFUL_SIDE} on they hardly are.",
            file=sys.stderr,
        )
    url = storage.join(destination, split) if split else destination
    with tempfile.TemporaryDirectory(prefix="data_prep-", dir=scratch) as folder:
        listing = open_source(
            source, under=under, classes=classes, labels=labels, scratch_folder=Path(folder)
        )
        summary = sharding.shard(
            listing,
            url,
            options,
            workers=workers,
            source=source,
            engine=engines.ray_cluster if engine == "ray" else engines.process_pool,
        )
    print(summary)
    print(f"check:  python -m data_prep verify {url}")
    print(f"train:  deepspeed mocov3_ds/train.py --recipe RECIPE --data.shards {url}")


def verify(url: Url, /, *, decode: bool = True, json: bool = False, workers: int = 0) -> int:
    """Hold every byte of a set against its manifest; exit code 1 if anything is wrong.

    Digests, counts, index, readability of every image, and the spread of labels; images and keys
    that occur twice are told, too.

    Args:
        url: folder of the set.
        decode: decode every image; --no-decode looks at headers only.
        json: print one JSON object.
        workers: processes; 0 = one a core.
    """
    verdict = verifying.verify(url, workers=workers or engines.default_workers(), decode_all=decode)
    print(verdict.as_json() if json else verdict)
    return 0 if verdict.sound else 1


def index(
    url: Url, /, *, classes: Path | None = None, replace: bool = False, workers: int = 0
) -> None:
    """Write the manifest of tars that others made, so that they can be streamed and verified.

    Samples are an image (KEY.jpg, .png, ...) with its label in KEY.cls or KEY.json, or without one:
    labels that are only folder names are read by `shard`, not here. A tar that is cut or damaged is
    refused; nothing but the manifest, its index and maybe rejects.jsonl is written.

    Args:
        url: folder of the tars.
        classes: file that names the classes, one a line.
        replace: write a new manifest where one is.
        workers: processes; 0 = one a core.
    """
    made = verifying.index(
        url,
        workers=workers or engines.default_workers(),
        classes=[] if classes is None else read_names(classes),
        replace=replace,
    )
    print(f"{made.url}: {made.samples} samples in {len(made.shards)} shards, manifest written")


def stats(url: Url, /, *, picture: Path | None = None, json: bool = False) -> None:
    """Say how classes and sizes are spread, from the manifest alone.

    Args:
        url: folder of the set.
        picture: PNG file to draw the histograms to.
        json: print one JSON object.
    """
    found = stats_of(url)
    print(jsons.dumps(found.as_json(), indent=1) if json else found)
    if picture is not None:
        draw(found, picture)
        print(f"picture: {picture}", file=sys.stderr)


def main() -> int:
    """Entry point of `python -m data_prep`."""
    try:
        code = tyro.extras.subcommand_cli_from_dict(
            {"shard": shard, "verify": verify, "stats": stats, "index": index},
            prog="python -m data_prep",
            description="Images in any form to shards that can be streamed, and checks on them.",
        )
    except (ValueError, OSError) as error:
        print(f"data_prep: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data_prep: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    return int(code or 0)
