"""Which names have the classes, and in which order, by a text file with one class a line?"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.class_numbers import ClassNames
from mocov3_ds.data.class_names import comparable_name

_SYNSET = re.compile(r"n[0-9]{8}")


def read_class_names(path: Path) -> ClassNames:
    """Read class names, one a line.

    A line is the name (`great white shark`), or begins with it (`n01440764 tench, Tinca`, or the
    first field before a TAB); the classes of the images tell. A column of numbers that counts from
    0 or 1 gives the order, else the lines do.

    Raises:
        ValueError: There is no such file, it holds no names, or one of them twice.
    """
    lines = [unicodedata.normalize("NFC", line) for _, line in split_lines(read_text(path))]
    readings = [*_read_names(_order_by_numbers(lines)), *_read_names(lines)]
    unique = [names for names in dict.fromkeys(readings) if not _find_repeated(names)]
    if not unique:
        raise ValueError(f"{path} names class {_find_repeated(lines)[0]} twice.")
    return ClassNames(tuple(unique), str(path), "unknown")


def _read_names(lines: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The names that lines may hold: synsets, whole lines, what stands before a TAB, ..."""
    if lines and all(_SYNSET.match(line) for line in lines):
        yield tuple(line[:9] for line in lines)
    if lines:
        yield tuple(remove_quotes(line) for line in lines)
        for separator in (r"\t", r"[,\s]", ","):
            yield tuple(remove_quotes(re.split(separator, line)[0].strip()) for line in lines)


def _order_by_numbers(lines: Sequence[str]) -> list[str]:
    """Lines without their first or last field where these count from 0 or 1; [] = they do not."""
    for pattern in (
        r"(?P<number>[0-9]+)[\s,;:]+(?P<name>.*)",
        r"(?P<name>.*?)[\s,;:]+(?P<number>[0-9]+)",
    ):
        matches = [re.fullmatch(pattern, line) for line in lines]
        numbered = sorted((int(one["number"]), one["name"]) for one in matches if one)
        first = numbered[0][0] if numbered else -1
        if first in (0, 1) and [n for n, _ in numbered] == [*range(first, first + len(lines))]:
            return [name for _, name in numbered]
    return []


def _find_repeated(names: Sequence[str]) -> list[str]:
    counts = Counter(comparable_name(name) for name in names)
    return [name for name in names if counts[comparable_name(name)] > 1]


def remove_quotes(text: str) -> str:
    """A text without the quotes around it."""
    return text[1:-1] if len(text) > 2 and text[0] == text[-1] == '"' else text


def split_lines(text: str) -> list[tuple[int, str]]:
    """Number (from 1) and text of the lines that are not blank, without blanks around them."""
    lines = enumerate(re.split(r"\r\n|\r|\n", text), 1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def read_text(path: Path) -> str:
    """Text of a file in UTF-8 or, with a byte-order mark, UTF-16, without the mark.

    Raises:
        ValueError: There is no such file, it is no text or empty.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"there is no {path}.") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, not a file of labels.") from None
    try:
        text = content.decode(
            "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        )
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8.") from None
    if "\0" in text:
        raise ValueError(f"{path} is not a text file in UTF-8.")
    if not text.strip():
        raise ValueError(f"{path} is empty.")
    return text
