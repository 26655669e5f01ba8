"""Which images does a parquet file hold? One pass copies them to a scratch tar.

A parquet file cannot be read in shuffled order. Its images go to a scratch file of this machine (it
needs the room), from which shards are made like from any tar.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_prep import tar
from data_prep.images import SUFFIXES
from data_prep.labels import Label

_LABELS = ("label", "labels", "cls", "class", "fine_label")
_MAGIC = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}
_ROWS = 64  # read at a time: images of a few MB must not fill the memory


class Row(NamedTuple):
    """An image that was copied to the scratch file."""

    name: str
    offset: int
    """position of its first byte in the scratch file"""
    size: int
    """bytes"""
    label: Label


def read_classes(path: Path) -> list[str]:
    """Read the class names that a Hugging Face parquet file carries; [] = none.

    Raises:
        ValueError: pyarrow is missing, or the file is damaged.
    """
    metadata = (_open_parquet(path).schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(metadata)["info"]["features"]
        return next(
            [str(name) for name in features[label]["names"]]
            for label in _LABELS
            if isinstance(features.get(label), dict) and "names" in features[label]
        )
    except (KeyError, TypeError, ValueError, StopIteration):
        return []


def copy_images(path: Path, folder: Path) -> tuple[Path, list[Row]]:
    """Copy the images of a parquet file to a scratch tar.

    The image column is the first that holds bytes, or a struct with `bytes` and maybe `path` (as
    Hugging Face writes them); the label column is called label, labels, cls, class or fine_label.

    Args:
        path: Path of the parquet file.
        folder: Folder for the scratch tar.

    Returns:
        Path of the scratch tar, and its images.

    Raises:
        ValueError: pyarrow is missing, there is no image column, or the file is damaged.
    """
    import pyarrow as pa

    file = _open_parquet(path)
    schema = file.schema_arrow
    image = next((field.name for field in schema if _holds_images(field.type)), None)
    if image is None:
        raise ValueError(
            f"{path} has no column of image bytes among {', '.join(schema.names)}; it must be "
            "binary, or a struct with a field called bytes."
        )
    label = next((name for name in _LABELS if name in schema.names), None)
    plain = folder / f"{path.stem}.tar"
    print(f"copying the images of {path.name} to {plain} for reading in any order", file=sys.stderr)
    rows: list[Row] = []
    position = 0
    try:
        with plain.open("wb") as out:
            for value, number in _read_rows(file, image, label):
                image_bytes, name = _split_value(value)
                name = _choose_name(name, image_bytes, f"{path.stem}-{len(rows):07d}")
                header = tar.make_header(f"{len(rows)}", len(image_bytes))
                block = header + image_bytes + tar.padding_after(len(image_bytes))
                out.write(block)
                rows.append(Row(name, position + tar.BLOCK, len(image_bytes), number))
                position += len(block)
            out.write(tar.END)
    except pa.ArrowException as error:
        raise ValueError(f"{path} is damaged: {error}.".replace("\n", " ")) from None
    return plain, rows


def _read_rows(file: Any, image: str, label: str | None) -> Iterator[tuple[Any, Label]]:
    """Value of the image column and label of each row; None where there is no label column."""
    columns = [image] if label is None else [image, label]
    for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
        values = batch.column(image).to_pylist()
        labels = [None] * len(values) if label is None else batch.column(label).to_pylist()
        yield from zip(values, labels, strict=True)


def _open_parquet(path: Path) -> Any:
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

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _split_value(value: Any) -> tuple[bytes, str]:
    """Bytes and file name of an image in a row."""
    if isinstance(value, dict):
        return value["bytes"] or b"", value.get("path") or ""
    return value or b"", ""


def _choose_name(name: str, image_bytes: bytes, stem: str) -> str:
    """The image's own file name, or one of `stem` and the ending that its content asks for."""
    name = name.rpartition("/")[2]
    if name and name.rpartition(".")[2].lower() in SUFFIXES:
        return name
    kinds = (kind for magic, kind in _MAGIC.items() if image_bytes.startswith(magic))
    return f"{name.partition('.')[0] or stem}.{next(kinds, 'jpg')}"
