"""The kinds of input that hold images and labels: files, tars, sets, label files, tables."""

import hashlib
import io
import json
import tarfile
import zlib
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from data_prep.class_files import read_class_names
from data_prep.class_numbers import ClassNames
from data_prep.index import index_tars
from data_prep.label_files import read_image_labels
from data_prep.shard import make_shards
from data_prep.shard_options import ShardOptions
from data_prep.sources import list_images
from data_prep.verify import verify_set
from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.loader import Loader, LoaderSettings
from mocov3_ds.data.manifest import ROW
from mocov3_ds.data.views import decode
from mocov3_ds.data.views.decode import UnreadableImage
from mocov3_ds.data.views.spec import ViewSpec
from tests.data.pictures import encode_image, picture
from tests.data.sets import make_set
from tests.fuzz.kind import Files, Kind, Outcome, clear, files_of

# ----------------------------------------------------------------------------------------- images


@cache
def jpegs() -> list[Files]:
    images = [
        encode_image(picture(60, 80)),
        encode_image(picture(61, 79), subsampling=1),
        encode_image(picture(40, 70), progressive=True),
        encode_image(picture(50, 50), restart_marker_blocks=3),
        encode_image(picture(64, 48).convert("L")),
        encode_image(picture(30, 30).convert("CMYK")),
    ]
    return [{"image.jpg": data} for data in images]


@cache
def other_images() -> list[Files]:
    small = picture(30, 40)
    kinds = ("PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM")
    found = [{"image.png": encode_image(small, kind)} for kind in kinds]
    grey = Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100)
    found += [
        {"image.png": encode_image(small.quantize(), "PNG")},
        {"image.png": encode_image(grey, "PNG")},
    ]
    return found


def read_image(folder: Path) -> Outcome:
    data = next(folder.iterdir()).read_bytes()
    try:
        height, width = decode.read_size(data)
        out = np.empty((2, 3, 16, 16), np.uint8)
        box = (0, 0, height, width)
        decode.cut_crops(data, (box, box), (False, True), out)
        decode.centre_crop(data, 16, 20)
    except UnreadableImage as error:
        assert str(error)
        return "skipped"
    return "accepted"


# ----------------------------------------------------------------------------------------- shards


@cache
def tars() -> list[Files]:
    with TemporaryDirectory() as folder:
        make_set(folder, [5])
        samples = (Path(folder) / "t-000.tar").read_bytes()
    classes = io.BytesIO()
    with tarfile.open(fileobj=classes, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(4):
            data = encode_image(picture(20, 20, number))
            info = tarfile.TarInfo(f"train/class{number % 2}/{'x' * 90}{number}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return [{"t-000.tar": samples}, {"t-000.tar": classes.getvalue()}]


def read_tar(folder: Path) -> Outcome:
    """Index and verify it where it lies, and shard what it holds."""
    outcome: Outcome = "accepted"
    trouble: list[Exception] = []
    try:
        made = index_tars(str(folder), workers=1, quiet=True)
        if (
            made.provenance["rejected"]
            or not verify_set(str(folder), workers=1, quiet=True).is_sound
        ):
            outcome = "skipped"
    except (ValueError, OSError) as error:
        trouble.append(error)
    try:
        options = ShardOptions(shard_size="3")
        summary = make_shards(
            list_images(str(folder / "t-000.tar")),
            str(folder / "out"),
            options,
            workers=1,
            quiet=True,
        )
        if summary.rejects:
            outcome = "skipped"
    except (ValueError, OSError) as error:
        trouble.append(error)
    for error in trouble:
        clear(error, folder)
    if len(trouble) == 2:
        raise trouble[-1]
    return outcome


@cache
def sets() -> list[Files]:
    with TemporaryDirectory() as folder:
        make_set(folder, [5, 4])
        return [files_of(Path(folder))]


def seal_set(files: dict[str, bytes]) -> None:
    tree = json.loads(files["manifest.json"])
    tree["index"]["sha256"] = hashlib.sha256(files["index.bin"]).hexdigest()
    for entry in tree["shards"]:
        if entry["name"] in files:
            entry["sha256"] = hashlib.sha256(files[entry["name"]]).hexdigest()
            entry["bytes"] = len(files[entry["name"]])
    rows = np.frombuffer(files["index.bin"], ROW).copy()
    shard = files["t-000.tar"]
    for row in rows[:5]:  # the checksums of what lies there now
        image = shard[int(row["offset"]) : int(row["offset"]) + int(row["size"])]
        row["crc32"] = zlib.crc32(image)
    files["index.bin"] = rows.tobytes()
    tree["index"]["sha256"] = hashlib.sha256(files["index.bin"]).hexdigest()
    files["manifest.json"] = json.dumps(tree).encode()


def read_set(folder: Path) -> Outcome:
    """Load it, verify it, load two batches of it."""
    made = manifests.load(str(folder))
    sound = verify_set(str(folder), workers=1, quiet=True).is_sound
    if made.samples > 10**6:
        return "accepted"
    settings = LoaderSettings(
        views=ViewSpec(),
        image_size=16,
        global_batch=4,
        rank=0,
        world_size=1,
        seed=0,
        lanes=2,
        pool=4,
        threads=0,
        bad_sample_budget=3,
    )
    with Loader(made, settings) as loader:
        for _ in range(2):
            next(loader)
        return "skipped" if loader.bad_samples.counts or not sound else "accepted"


# ------------------------------------------------------------------------------- labels and tables

LABELLED = [f"{folder}/{number}.jpg" for folder in ("ant", "bee") for number in range(3)]


@cache
def label_files() -> list[Files]:
    """Label files as people write them: tables, quoted names, byte order mark, a class a line."""
    rows = [(name, name.partition("/")[0]) for name in LABELLED]
    texts = [
        "file,label\n" + "".join(f"{name},{label}\n" for name, label in rows),
        "".join(f"{name}\tAfrican {label}\n" for name, label in rows),
        "".join(f"{name} {len(label)}\n" for name, label in rows),
        "\ufeffimage;group;class\r\n" + "".join(f'"{n}";"a;b";"{c}"\r\n' for n, c in rows),
        "".join(f"{label}\n" for _, label in rows),
    ]
    return [{"labels.csv": text.encode()} for text in texts] + [
        {"classes.txt": b"n01 ant, pismire\nn02 bee\n"},
    ]


def read_labels(folder: Path) -> Outcome:
    """Labels of six images, or names of classes."""
    names = folder / "classes.txt"
    if names.exists():
        assert read_class_names(names).readings
        return "accepted"
    labels, _, _ = read_image_labels(folder / "labels.csv", LABELLED, ClassNames())
    assert len(labels) == len(LABELLED)
    return "accepted"


@cache
def tables() -> list[Files]:
    """Parquet files with images, labels and names of classes, as Hugging Face writes them."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"bytes": encode_image(picture(20, 20, n)), "path": f"{n}.jpg"} for n in range(4)]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(rows, kind), "label": [0, 1, 1, 0]})
    names = {"names": ["ant", "bee"], "_type": "ClassLabel"}
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": names}}}
    found = []
    for made in (table, table.replace_schema_metadata({"huggingface": json.dumps(info)})):
        file = io.BytesIO()
        pyarrow.parquet.write_table(made, file)
        found.append({"rows.parquet": file.getvalue()})
    return found


def read_table(folder: Path) -> Outcome:
    """Shard what it holds."""
    with TemporaryDirectory(dir=folder) as scratch:
        listing = list_images(str(folder / "rows.parquet"), scratch_folder=Path(scratch))
        summary = make_shards(
            listing, str(folder / "out"), ShardOptions(shard_size="3"), workers=1, quiet=True
        )
    return "skipped" if summary.rejects else "accepted"


DATA_KINDS = [
    Kind("JPEG", 3, jpegs, read_image),
    Kind("other images", 2, other_images, read_image),
    Kind("tar", 2, tars, read_tar),
    Kind("sharded set", 2, sets, read_set, seal_set),
    Kind("label file", 1, label_files, read_labels),
    Kind("table", 1, tables, read_table),
]
