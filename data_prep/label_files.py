"""Which label has each image, by a file that the user gives?

The file has a row for each image: TAB, comma or semicolon between (quotes as in CSV), or a blank,
with the image first or last. An image is found by the longest part of its path that both have.
Which column is what follows from the images and the header; what they leave open is refused.

Without images the file has one class a line, for the images in the order of their names.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.class_files import read_text, remove_quotes, split_lines
from data_prep.class_numbers import ClassNames, Unlabelled
from data_prep.image_names import ImageNames
from data_prep.images import SUFFIXES
from data_prep.labels import STATED_NONE, Label, parse_label
from mocov3_ds.data.class_names import list_names

LABEL_COLUMNS = ("label", "labels", "cls", "class")
"""names of columns that hold the label; where none of them is there, one of the next"""
OTHER_LABEL_COLUMNS = (
    *("target", "targets", "category", "class_name", "class_id", "label_id", "category_id"),
    *("label_name", "classname", "class_label", "fine_label", "coarse_label", "species", "y"),
)
_IMAGE_COLUMNS = {
    *("image", "images", "img", "file", "filename", "file_name", "path", "filepath", "file_path"),
    *("image_path", "image_name", "imageid", "image_id", "img_path", "name", "id", "key"),
}
_PREDICTION = "predictionstring"  # Kaggle's ImageNet: class and box, class and box, ...
_DELIMITERS = {"\t": "TAB", ",": "comma", ";": "semicolon"}


class ImageLabels(NamedTuple):
    """What a label file says."""

    labels: list[Label]
    """of each image"""
    classes: ClassNames
    notes: tuple[str, ...]
    """how the file was read"""


class _Row(NamedTuple):
    line: int
    """number of its (last) line, from 1"""
    fields: list[str]


class _Table(NamedTuple):
    """Rows of a file in one of its readings, and which column names the images."""

    rows: list[_Row]
    header: list[str]
    """[] = none"""
    column: int
    """of the image"""
    images: list[list[int]]
    """images that each row may mean"""
    delimiter: str

    @property
    def matched(self) -> int:
        """Number of rows that name an image."""
        return sum(map(bool, self.images))


def read_image_labels(
    path: Path,
    image_names: Sequence[str],
    classes: ClassNames,
    *,
    label: str = "",
    unlabelled: Unlabelled = "refuse",
) -> ImageLabels:
    """Read the label of each image from a file.

    Args:
        path: Text file with the labels.
        image_names: Paths of the images in the source.
        classes: Class names in the order that numbers them; without readings = not given.
        label: Name of the column that holds the class; empty = the only one that can.
        unlabelled: What to do with images that no row names.

    Raises:
        ValueError: The file and the images or the class names do not fit.
    """
    text = read_text(path)
    if re.match(r'\s*[\[{]\s*[\[{"]', text):
        raise ValueError(
            f"{path} looks like JSON; write a row for each image, with a header: image,label."
        )
    table = _choose_table(path, text, ImageNames(image_names))
    if table is None:
        return _read_in_order(path, text, image_names, classes)
    rows = _check_rows(path, table, image_names)
    column, chosen = _choose_label_column(path, table, label)
    values = {image: _read_field(path, row, column, table) for image, row in rows.items()}
    missing = [name for row, name in enumerate(image_names) if row not in values]
    if missing and unlabelled == "refuse":
        raise ValueError(
            f"{path} has no label for {len(missing)} of {len(image_names)} images, e.g. "
            f"{missing[0]}; add them, or keep them without one by --unlabelled keep."
        )
    note = f"{path}: {len(table.rows)} rows ({table.delimiter} between) label {len(values)} images"
    return ImageLabels(
        [values.get(row) for row in range(len(image_names))], classes, (note + chosen,)
    )


# ---------------------------------------------------------- the ways in which a file may be read


def _choose_table(path: Path, text: str, known: ImageNames) -> _Table | None:
    """The reading in which most rows name an image; None where none does in any."""
    problems: list[str] = []
    tables = [*_read_delimited(text, known, problems), *_read_blanks(text, known)]
    tables = [table for table in tables if table.matched]
    if not tables:
        if problems:
            raise ValueError(f"{path}, {problems[0]}.")
        return None
    best = max(tables, key=lambda table: table.matched / len(table.rows))
    rivals = [
        table
        for table in tables
        if table.delimiter == best.delimiter and table.matched == len(table.rows)
    ]
    for is_certain in (_has_image_header, _has_endings):
        certain = [table for table in rivals if is_certain(table)]
        if len(rivals) > 1 and len(certain) == 1:
            return certain[0]
    if len(rivals) > 1:
        columns = " and ".join(str(table.column + 1) for table in rivals[:2])
        raise ValueError(
            f"{path} names images of the source in columns {columns}, so that either may be the "
            "class; name the images with their ending, or give it a header: image,label."
        )
    return best


def _has_image_header(table: _Table) -> bool:
    header = table.header[table.column : table.column + 1]
    return bool(header) and header[0].lower() in _IMAGE_COLUMNS


def _has_endings(table: _Table) -> bool:
    return all(_is_image(row.fields[table.column]) for row in table.rows)


def _is_image(name: str) -> bool:
    stem, _, suffix = name.rpartition(".")
    return bool(stem) and suffix.lower() in SUFFIXES


def _read_delimited(text: str, known: ImageNames, problems: list[str]) -> Iterator[_Table]:
    """The file with TAB, comma or semicolon between fields, each column taken for the images."""
    for delimiter, title in _DELIMITERS.items():
        if delimiter not in text:
            continue
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
        )
        try:
            rows = [_Row(reader.line_num, [*map(str.strip, fields)]) for fields in reader]
        except csv.Error as error:
            problems.append(f"line {reader.line_num}: {error} (as a file with {title} between)")
            continue
        rows = [row for row in rows if any(row.fields)]
        width = max(len(row.fields) for row in rows)
        for column in range(width if width > 1 else 0):
            yield _find_images(rows, column, known, title)


def _read_blanks(text: str, known: ImageNames) -> Iterator[_Table]:
    """The file with the image at the start or at the end of a line, and the class in the rest."""
    lines = split_lines(text)
    for column in (0, 1):
        rows = []
        for number, line in lines:
            cuts = [blank.span() for blank in re.finditer(r"\s+", line)]
            # the longest path wins: `img 1.jpg cat` names `img 1.jpg`
            cuts = cuts[::-1] if column == 0 else cuts
            pairs = ([line[:start], line[end:]] for start, end in cuts)
            fields = next((pair for pair in pairs if known.find_images(pair[column])), None)
            plain = line.split(maxsplit=1) if column == 0 else line.rsplit(maxsplit=1)
            rows.append(_Row(number, fields or plain))
        if any(len(row.fields) > 1 for row in rows):
            yield _find_images(rows, column, known, "blank")


def _find_images(rows: list[_Row], column: int, known: ImageNames, delimiter: str) -> _Table:
    """Look a column up among the images, and set the header apart."""
    images = [
        known.find_images(row.fields[column]) if column < len(row.fields) else [] for row in rows
    ]
    header: list[str] = []
    while len(rows) > 1 and not images[0] and rows[0].fields[0].startswith("#"):
        rows, images = rows[1:], images[1:]
    if not images[0] and any(images) and _is_header(rows[0], column):
        header, rows, images = rows[0].fields, rows[1:], images[1:]
    return _Table(rows, header, column, images, delimiter)


def _is_header(row: _Row, column: int) -> bool:
    """Whether a row that names no image may name columns."""
    name = row.fields[column].lower() if column < len(row.fields) else ""
    return name in _IMAGE_COLUMNS or (
        not _is_image(name) and not any(character.isdigit() for character in name)
    )


# ------------------------------------------------------------------- what the rows say of images


def _check_rows(path: Path, table: _Table, image_names: Sequence[str]) -> dict[int, _Row]:
    """The row of each image; every row must name exactly one."""
    rows: dict[int, _Row] = {}
    for row, images in zip(table.rows, table.images, strict=True):
        named = row.fields[table.column] if table.column < len(row.fields) else ""
        if not images:
            raise ValueError(f"{path}, line {row.line}: no image of the source is {named!r}.")
        if len(images) > 1:
            pair = " and ".join(repr(image_names[image]) for image in images[:2])
            raise ValueError(
                f"{path}, line {row.line}: {named!r} may be {pair}; give more of the path."
            )
        earlier = rows.setdefault(images[0], row)
        marks = [field for n, field in enumerate(row.fields) if n != table.column]
        if marks != [field for n, field in enumerate(earlier.fields) if n != table.column]:
            raise ValueError(
                f"{path}, lines {earlier.line} and {row.line} give {image_names[images[0]]!r} two "
                "labels."
            )
    return rows


def _choose_label_column(path: Path, table: _Table, label: str) -> tuple[int, str]:
    """Number of the column that holds the class, and words on how it was chosen."""
    header, widths = table.header, {len(row.fields) for row in table.rows}
    if len(widths) > 1 and not label:
        usual = Counter(len(row.fields) for row in table.rows).most_common(1)[0][0]
        odd = next(row for row in table.rows if len(row.fields) != usual)
        raise ValueError(
            f"{path}, line {odd.line}: {len(odd.fields)} fields, most rows have {usual}; put "
            f"quotes around a field that holds a {table.delimiter}."
        )
    used = [
        column
        for column in range(max(widths))
        if column != table.column
        and any(row.fields[column : column + 1] not in ([], [""]) for row in table.rows)
    ]
    names = {column: _column_name(header, column) for column in used}
    if label:
        fitting = [column for column, name in names.items() if name == label]
        if not fitting:
            columns = ", ".join(map(repr, names.values()))
            raise ValueError(f"{path} has no column {label!r} for classes; there are {columns}.")
        return fitting[0], ""
    if len(used) == 1:
        return used[0], ""
    lower = {column: name.lower() for column, name in names.items()}
    for group in (LABEL_COLUMNS, (*OTHER_LABEL_COLUMNS, _PREDICTION)):
        fitting = [column for column, name in lower.items() if name in group]
        if len(fitting) == 1:
            return fitting[0], f" by column {names[fitting[0]]!r}"
        if fitting:
            break
    candidates = ", ".join(map(repr, names.values()))
    raise ValueError(
        f"{path} has {len(used)} columns that may be the class, {candidates}; say which by "
        "--label NAME."
        if used
        else f"{path}, line {table.rows[0].line}: there is an image and no class."
    )


def _column_name(header: Sequence[str], column: int) -> str:
    """Name of a column for messages and `--label`; `column 2` where the header has none."""
    return next(filter(None, header[column : column + 1]), f"column {column + 1}")


def _read_field(path: Path, row: _Row, column: int, table: _Table) -> Label:
    """The label in a row."""
    text = row.fields[column] if column < len(row.fields) else ""
    if table.header[column : column + 1] and table.header[column].lower() == _PREDICTION:
        boxed = {*text.split()[::5]}
        if len(boxed) > 1:
            raise ValueError(
                f"{path}, line {row.line}: {list_names(sorted(boxed))} are several classes."
            )
        text = "".join(boxed)
    label = parse_label(text, f"the label in line {row.line} of {path}")
    return STATED_NONE if label is None else label


# ------------------------------------------------------------------------ labels without images


def _read_in_order(
    path: Path, text: str, image_names: Sequence[str], classes: ClassNames
) -> ImageLabels:
    """One class a line for the images in name order; numbers are the development kit's, from 1."""
    lines = split_lines(text)
    odd = [
        (n, line) for n, line in lines if re.search(r"[\s,;]", line) and remove_quotes(line) == line
    ]
    if odd:
        raise ValueError(
            f"{path} names no image of the source, e.g. not in line {odd[-1][0]}, {odd[-1][1]!r} "
            f"(the source has {image_names[0]!r}); without images it must hold one class a line, "
            "in quotes if it has blanks."
        )
    named = [(n, line) for n, line in lines if _is_image(line)]
    if len(named) == len(lines):
        raise ValueError(f"{path} has names of images alone, e.g. {named[0][1]!r}, and no classes.")
    if len(lines) != len(image_names):
        raise ValueError(
            f"{path} has {len(lines)} lines for {len(image_names)} images and names none of them; "
            "it must hold one label an image, in the order of the images' names."
        )
    order = sorted(range(len(image_names)), key=lambda row: image_names[row])
    _check_order([image_names[row] for row in order], path)
    labels: list[Label] = [None] * len(order)
    for row, (number, line) in zip(order, lines, strict=True):
        labels[row] = parse_label(remove_quotes(line), f"the label in line {number} of {path}")
    note = f"{path}: {len(lines)} lines label the images in the order of their names"
    if not any(isinstance(label, int) for label in labels):
        return ImageLabels(labels, classes, (note,))
    # the training set numbers its folders by sorted name, whatever order the kit has
    by_name = _name_kit_numbers(path, labels, classes)
    ordered = ClassNames((tuple(sorted(classes.readings[0])),), classes.source, "names")
    return ImageLabels(by_name, ordered, (f"{note}, by numbers from 1 of {classes.source}",))


def _check_order(names: Sequence[str], path: Path) -> None:
    """Refuse names whose order is another one when the numbers in them count (2 before 10)."""

    def by_number(name: str) -> list[tuple[int, str]]:
        return [
            (int(piece), "") if piece.isdecimal() else (-1, piece)
            for piece in re.split(r"([0-9]+)", name)
        ]

    natural = sorted(names, key=by_number)
    if natural != list(names):
        first, second = next(
            pair for pair in zip(names, natural, strict=True) if pair[0] != pair[1]
        )
        raise ValueError(
            f"{path} names no images, and their order is not certain: {first!r} comes before "
            f"{second!r} as text, and behind it by number; begin each line with the image's name."
        )


def _name_kit_numbers(path: Path, labels: Sequence[Label], classes: ClassNames) -> list[Label]:
    """Class names of numbers that count from 1."""
    if not classes.readings:
        raise ValueError(
            f"{path} numbers the classes in an order of its own, which need not be that of the "
            "training set; add --classes FILE with the name of class 1, 2, ... a line (for "
            "ImageNet's kit: the synsets by ILSVRC2012_ID)."
        )
    names = classes.readings[0]
    for label in labels:
        if not isinstance(label, int) or not 1 <= label <= len(names):
            raise ValueError(
                f"{path} holds class {label}, the class file has {len(names)} names and they count "
                "from 1."
            )
    return [names[label - 1] for label in labels if isinstance(label, int)]
