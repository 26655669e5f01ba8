"""Which images and labels does a parquet file hold? One pass copies the images to a scratch tar.

A parquet file cannot be read in shuffled order. Its images go to a scratch file of this machine (it
needs the room), from which shards are made like from any tar.

Images are a column of bytes, or a struct with `bytes` and maybe `path`, as Hugging Face writes
them. Where several columns could be images or labels, their names, their kind and their content
decide; if these leave it open, the candidates are named and the user decides.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_prep import list_column, tar
from data_prep.class_numbers import ClassNames
from data_prep.images import SUFFIXES
from data_prep.label_files import LABEL_COLUMNS, OTHER_LABEL_COLUMNS
from data_prep.labels import STATED_NONE, Label, convert_label
from data_prep.member_names import quote_name
from mocov3_ds.data.views import decode

NO_LABEL = "-"
"""`--label -` takes no label"""

_IMAGES = {"image", "img", "jpg", "jpeg", "png", "webp"}
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
    json: tuple[int, int] = (0, 0)
    """offset and size in the scratch file of the KEY.json that lists its classes; 0 bytes = none"""


class Columns(NamedTuple):
    """What is taken of parquet files."""

    image: str
    label: str
    """empty = none"""
    classes: ClassNames
    """names of labels that are numbers, where the files state them"""
    notes: tuple[str, ...]
    """how the columns were chosen"""
    has_lists: bool = False
    """whether the labels are lists, which become the KEY.json of each image"""

    @property
    def list_names(self) -> tuple[str, ...]:
        """Class names that the numbers in the lists are positions in; () = none are stated."""
        return self.classes.readings[0] if self.has_lists and self.classes.readings else ()


def choose_columns(paths: Sequence[Path], image: str = "", label: str = "") -> Columns:
    """Choose the columns of images and labels, the same in all files of a source.

    Args:
        paths: The parquet files of the source.
        image: Name of the column of images; empty = the only one that can be.
        label: Name of the column of labels; empty = the only one that can be, `-` = none.

    Raises:
        ValueError: pyarrow is missing, a file is damaged, several columns could be meant or none,
            or the files differ in columns or class names.
    """
    first, *more_paths = paths
    file = _open_parquet(first)
    with _named_damage(first):
        image, image_note = _choose_image(first, file, image)
    label, label_note = _choose_label(first, file, label, image)
    names, has_lists = _class_names(file, label), _has_lists(file, label)
    for path in more_paths:
        next_file = _open_parquet(path)
        lacking = {image, label} - {"", *next_file.schema_arrow.names}
        if lacking:
            raise ValueError(f"{path} has no column {min(lacking)!r}, {first} has one.")
        if _has_lists(next_file, label) != has_lists:
            kinds = [f.schema_arrow.field(label).type for f in (next_file, file)]
            raise ValueError(
                f"{path} holds {kinds[0]} in {label!r}, {first} {kinds[1]}; shard each by itself."
            )
        if _class_names(next_file, label) != names:
            raise ValueError(
                f"{path} and {first} name the classes of {label!r} differently; shard each by "
                "itself."
            )
    classes = ClassNames((names,) if names else (), str(first))
    note = f"{first.name}: {image_note}; {label_note}"
    return Columns(image, label, classes, (note,), has_lists)


def _choose_image(path: Path, file: Any, wanted: str) -> tuple[str, str]:
    """Name of the column of images, and how it was chosen."""
    schema = file.schema_arrow
    holders = [field.name for field in schema if _holds_images(field.type)]
    if wanted and wanted not in holders:
        raise ValueError(
            f"{path} has no column {wanted!r} of bytes; those of bytes are "
            f"{', '.join(map(repr, holders)) or 'none'}."
        )
    if not holders:
        raise ValueError(
            f"{path} has no column of image bytes among {', '.join(schema.names)}; it must be "
            "binary, or a struct with a field called bytes."
        )
    signs: tuple[Callable[[str], bool], ...] = (
        lambda name: name.lower() in _IMAGES,
        lambda name: _is_struct(schema.field(name).type),
        lambda name: _shows_images(file, name),
    )
    fitting = [wanted] if wanted else holders
    for sign in signs:
        if len(fitting) > 1:
            fitting = [name for name in fitting if sign(name)] or fitting
    if len(fitting) > 1:
        raise ValueError(
            f"{path} has {len(fitting)} columns that may be the images, "
            f"{', '.join(map(repr, fitting))}; say which by --image NAME."
        )
    unused = [name for name in holders if name != fitting[0]]
    also = f" (not {', '.join(map(repr, unused))})" if unused else ""
    return fitting[0], f"images are column {fitting[0]!r}{also}"


def _choose_label(path: Path, file: Any, wanted: str, image: str) -> tuple[str, str]:
    """Name of the column of labels, empty without one, and how it was chosen."""
    schema = file.schema_arrow
    columns = [name for name in schema.names if name != image]
    if wanted == NO_LABEL:
        return "", "no labels are taken"
    if wanted and wanted not in columns:
        raise ValueError(
            f"{path} has no column {wanted!r} for labels; the others are "
            f"{', '.join(map(repr, columns)) or 'none'}."
        )
    named = [name for name in columns if _class_names(file, name)]
    groups = (
        [name for name in columns if name.lower() in LABEL_COLUMNS],
        [name for name in columns if name in named or name.lower() in OTHER_LABEL_COLUMNS],
    )
    fitting = [wanted] if wanted else next((group for group in groups if group), [])
    if len(fitting) > 1:
        raise ValueError(
            f"{path} has {len(fitting)} columns that may be the label, "
            f"{', '.join(map(repr, fitting))}; say which by --label NAME, or --label - for none."
        )
    if not fitting:
        also = f" ({', '.join(map(repr, columns))}: --label NAME takes one)" if columns else ""
        return "", f"no column is the label{also}"
    kind = schema.field(fitting[0]).type
    if list_column.holds_lists(kind):
        return fitting[0], (
            f"column {fitting[0]!r} lists the classes of each image, which has no single one then "
            f"(mocov3 knn --labels {fitting[0]})"
        )
    if not _can_be_label(kind):
        raise ValueError(
            f"column {fitting[0]!r} of {path} holds {kind}; a label is one name or one whole "
            "number an image, or a list of them. --label NAME takes another column, --label - none."
        )
    return fitting[0], f"labels are column {fitting[0]!r}"


def _has_lists(file: Any, label: str) -> bool:
    return bool(label) and list_column.holds_lists(file.schema_arrow.field(label).type)


def _class_names(file: Any, label: str) -> tuple[str, ...]:
    """Class names of a column that a Hugging Face parquet file carries; () = none."""
    metadata = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        feature = json.loads(metadata)["info"]["features"][label]
        if isinstance(feature, dict) and "names" in feature:
            return tuple(str(name) for name in feature["names"])
        return list_column.stated_names(feature)
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()


def copy_images(path: Path, folder: Path, columns: Columns) -> tuple[Path, list[Row]]:
    """Copy the images of a parquet file to a scratch tar.

    Args:
        path: Path of the parquet file.
        folder: Folder for the scratch tar.
        columns: Columns of the images and labels.

    Returns:
        Path of the scratch tar, and its images.

    Raises:
        ValueError: The file is damaged, or a label is neither a name nor a whole number.
    """
    plain = folder / f"{path.stem}.tar"
    print(f"copying the images of {path.name} to {plain} for reading in any order", file=sys.stderr)
    rows: list[Row] = []
    position = 0
    with _named_damage(path), plain.open("wb") as out:
        for value, label in _read_rows(_open_parquet(path), columns):
            image_bytes, name = _split_value(value)
            name = _choose_name(name, image_bytes, f"{path.stem}-{len(rows):07d}")
            cell = f"{columns.label!r} in row {len(rows)} of {path}"
            image_place, json_place = position + tar.BLOCK, (0, 0)
            position += _write_member(out, f"{len(rows)}", image_bytes)
            if columns.has_lists:
                names = columns.list_names
                json_bytes = list_column.write_list(label, columns.label, cell, names)
                json_place, label = (position + tar.BLOCK, len(json_bytes)), None
                position += _write_member(out, f"{len(rows)}.json", json_bytes)
            else:
                label = convert_label(label, cell)
                label = STATED_NONE if label is None and columns.label else label
            rows.append(Row(name, image_place, len(image_bytes), label, json_place))
        out.write(tar.END)
    return plain, rows


def _write_member(out: BinaryIO, name: str, data: bytes) -> int:
    """Write a member of a tar; returns the bytes that it takes there."""
    block = tar.make_header(name, len(data)) + data + tar.padding_after(len(data))
    return out.write(block)


@contextlib.contextmanager
def _named_damage(path: Path, words: str = "is damaged") -> Iterator[None]:
    """Turn what pyarrow raises on damaged content into a sentence with the file's name."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's error, not the file's
        reason = " ".join(f"{error}".split()).rstrip(".") or type(error).__name__
        raise ValueError(f"{quote_name(str(path))} {words}: {reason}.") from None


def _read_rows(file: Any, columns: Columns) -> Iterator[tuple[Any, Any]]:
    """Values of the image column and of the label column of each row; None without one."""
    names = [name for name in (columns.image, columns.label) if name]
    for batch in file.iter_batches(batch_size=_ROWS, columns=names):
        values = batch.column(columns.image).to_pylist()
        labels = batch.column(columns.label).to_pylist() if columns.label else [None] * len(values)
        yield from zip(values, labels, strict=True)


def _open_parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(
            f"{path} needs pyarrow to be read: pip install 'mocov3-ds[parquet]'."
        ) from None
    with _named_damage(path, "is not a parquet file"):
        return pq.ParquetFile(path)


def _holds_images(kind: Any) -> bool:
    return _is_binary(kind) or _is_struct(kind)


def _is_struct(kind: Any) -> bool:
    """Whether a column is as Hugging Face writes images."""
    import pyarrow as pa

    return bool(pa.types.is_struct(kind)) and any(
        field.name == "bytes" and _is_binary(field.type) for field in kind
    )


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(test(kind) for test in (*tests, pa.types.is_fixed_size_binary))


def _can_be_label(kind: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        return _can_be_label(kind.value_type)
    tests = (types.is_integer, types.is_floating, types.is_decimal, types.is_null)
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    return any(test(kind) for test in (*tests, *texts))


def _shows_images(file: Any, name: str) -> bool:
    """Whether the first values of a column are images."""
    for batch in file.iter_batches(batch_size=4, columns=[name]):
        for value in batch.column(name).to_pylist():
            try:
                decode.read_size(_split_value(value)[0])
            except decode.UnreadableImage:
                continue
            return True
        break
    return False


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


def list_rows(path: Path, columns: Columns) -> list[Row]:
    """List the rows of a parquet file by their labels alone; its images are not read.

    Args:
        path: Path of the parquet file.
        columns: Columns of the images and labels.

    Returns:
        A row an image, of no size and with a name made of its number.

    Raises:
        ValueError: The file is damaged, or a label is neither a name nor a whole number.
    """
    file = _open_parquet(path)
    values: list[Any] = [None] * file.metadata.num_rows
    if columns.label:
        with _named_damage(path):
            values = file.read(columns=[columns.label]).column(columns.label).to_pylist()
    rows = []
    for number, value in enumerate(values):
        cell, json_place = f"{columns.label!r} in row {number} of {path}", (0, 0)
        if columns.has_lists:
            json_bytes = list_column.write_list(value, columns.label, cell, columns.list_names)
            json_place, value = (0, len(json_bytes)), None
        label = convert_label(value, cell)
        rows.append(Row(f"{path.stem}-{number:07d}.jpg", 0, 0, label, json_place))
    return rows


def has_images(path: Path) -> bool:
    """Whether a parquet file has a column of image bytes; where pyarrow is missing, it has none.

    Raises:
        ValueError: The file is damaged.
    """
    if find_spec("pyarrow") is None:
        return False
    return any(_holds_images(field.type) for field in _open_parquet(path).schema_arrow)
