"""Sources that cannot be read in shuffled order, turned into a plain tar of their images first.

Compressed tars and parquet files only read well from front to back. One pass copies the images to a
scratch file of this machine (it needs the room), from which shards are then made like from any tar.
"""

import bz2
import gzip
import json
import lzma
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_prep import tar
from data_prep.images import SUFFIXES

OPENERS: dict[str, Callable[[Path], Any]] = {
    "gz": gzip.open,
    "tgz": gzip.open,
    "bz2": bz2.open,
    "xz": lzma.open,
}
"""By the last ending of a compressed tar's name."""

_LABELS = ("label", "labels", "cls", "class", "fine_label")
_MAGIC = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}
_ROWS = 64  # read at a time: images of a few MB must not fill the memory


class Row(NamedTuple):
    """An image that was copied to the scratch file."""

    name: str
    offset: int
    size: int
    label: int | str | None


def is_compressed_tar(path: Path) -> bool:
    """Whether a name is that of a compressed tar."""
    suffix = path.suffix.removeprefix(".")
    return suffix == "tgz" or (suffix in OPENERS and path.stem.endswith(".tar"))


def decompressed(path: Path, folder: Path) -> Path:
    """A compressed tar's plain form in the scratch folder.

    Raises:
        ValueError: it is damaged or cut short.
    """
    plain = folder / path.name.removesuffix(path.suffix).removesuffix(".tar")
    plain = plain.with_name(f"{plain.name}.tar")
    print(f"unpacking {path.name} to {plain} for reading in any order", file=sys.stderr)
    try:
        with OPENERS[path.suffix.removeprefix(".")](path) as source, plain.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, OSError) as error:
        raise ValueError(f"{path} cannot be unpacked to {folder}: {error}.") from None
    return plain


def class_names(path: Path) -> list[str]:
    """Class names that a Hugging Face parquet file carries; [] = none.

    Raises:
        ValueError: pyarrow is missing, or the file is damaged.
    """
    metadata = (_parquet(path).schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(metadata)["info"]["features"]
        return next(
            [str(name) for name in features[label]["names"]]
            for label in _LABELS
            if isinstance(features.get(label), dict) and "names" in features[label]
        )
    except (KeyError, TypeError, ValueError, StopIteration):
        return []


def copied_from_parquet(path: Path, folder: Path) -> tuple[Path, list[Row]]:
    """Copy the images of a parquet file to a scratch tar.

    The image column is the first that holds bytes, or a struct with `bytes` and maybe `path` (as
    Hugging Face writes them); the label column is called label, labels, cls, class or fine_label.

    Raises:
        ValueError: pyarrow is missing, no image column, a damaged file.
    """
    import pyarrow as pa

    file = _parquet(path)
    schema = file.schema_arrow
    image = next((field.name for field in schema if _holds_images(field.type)), None)
    if image is None:
        raise ValueError(
            f"{path} has no column of image bytes among {', '.join(schema.names)}; it must be "
            "binary, or a struct with a field called bytes."
        )
    label = next((name for name in _LABELS if name in schema.names), None)
    out_path = folder / f"{path.stem}.tar"
    print(
        f"copying the images of {path.name} to {out_path} for reading in any order", file=sys.stderr
    )
    rows: list[Row] = []
    at = 0
    try:
        with out_path.open("wb") as out:
            columns = [image] if label is None else [image, label]
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
                images = batch.column(image).to_pylist()
                labels = [None] * len(images) if label is None else batch.column(label).to_pylist()
                for value, number in zip(images, labels, strict=True):
                    data, name = _bytes_and_name(value)
                    name = _named(name, data, f"{path.stem}-{len(rows):07d}")
                    block = tar.header(f"{len(rows)}", len(data)) + data + tar.padding(len(data))
                    out.write(block)
                    rows.append(Row(name, at + tar.BLOCK, len(data), number))
                    at += len(block)
            out.write(tar.END)
    except pa.ArrowException as error:
        raise ValueError(f"{path} is damaged: {error}.".replace("\n", " ")) from None
    return out_path, rows


def _parquet(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(
            f"{path} needs pyarrow to be read: pip install 'mocov3-ds[parquet]'."
        ) from None
    try:
        return pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path} is not a parquet file: {error}.".replace("\n", " ")) from None


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    def binary(kind: Any) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and binary(field.type) for field in kind)
    return binary(kind)


def _bytes_and_name(value: Any) -> tuple[bytes, str]:
    if isinstance(value, dict):
        return value["bytes"] or b"", value.get("path") or ""
    return value or b"", ""


def _named(name: str, data: bytes, otherwise: str) -> str:
    """The image's own file name, or one from its row and content."""
    name = name.rpartition("/")[2]
    if name and name.rpartition(".")[2].lower() in SUFFIXES:
        return name
    kinds: Iterator[str] = (kind for magic, kind in _MAGIC.items() if data.startswith(magic))
    return f"{name.partition('.')[0] or otherwise}.{next(kinds, 'jpg')}"
