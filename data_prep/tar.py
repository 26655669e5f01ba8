"""How are tars written and read to the byte? Deterministic headers out, strict member lists in.

Python's `tarfile` ends silently at the first header it does not understand, so an archive cut at a
member boundary or with one flipped bit looks like a shorter one. Here an archive ends with its end
mark or it is an error. Nothing is ever extracted to a path.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

BLOCK = 512
END = bytes(2 * BLOCK)
"""End mark of an archive: two blocks of zeros."""

MAX_EXTENSION = 1 << 20
"""Largest pax or GNU long-name header that is read, bytes; names are far shorter."""

_REST_BLOCK = 1 << 18
_FILE_TYPES = (b"0", b"\0", b"7")
_EXTENSIONS = (b"x", b"g", b"L", b"K")
_SPARSE = ("GNU.sparse.", "GNU.volume.", "SCHILY.realsize", "SCHILY.filetype", "SUN.holesdata")
"""Beginnings of pax keys that say that a member's bytes are not its file's bytes."""
_REFUSED = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "pipe"}


class DamagedTar(ValueError):  # noqa: N818 - it says what the archive is
    """An archive that is cut short, damaged or unsafe; the message is one sentence."""


class ByteSource(Protocol):
    """Where `read_members` reads: a file, a window of one, or a forward-only stream."""

    def read(self, size: int, /) -> bytes:
        """Read the next bytes, fewer than `size` only at the end."""
        ...

    def seek(self, position: int, /) -> object:
        """Go to a byte; `read_members` only ever goes forward."""
        ...


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in an archive."""

    name: str
    offset: int
    """position of its first byte in the archive"""
    size: int
    """bytes"""


_MODE = b"0000644\0" + b"0000000\0" * 2
_TAIL = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2
_TIME = b"00000000000\0"
_FIXED_SUM = sum(_MODE) + sum(_TIME) + 8 * ord(" ") + sum(_TAIL)
_FORM = b"%b%b" + _MODE + b"%b\0" + _TIME + b"%06o\0 " + _TAIL.ljust(BLOCK - 156, b"\0")
_ZEROS = bytes(100)


def make_header(name: str, size: int) -> bytes:
    """Make the header of a regular file.

    Mode 644, time, user and group 0: equal inputs give equal bytes.

    Args:
        name: Name of the member, at most 100 bytes of UTF-8.
        size: Bytes of the member, below 8 GiB.

    Raises:
        ValueError: Name or size do not fit in a ustar header.
    """
    encoded = name.encode()
    if not 0 < len(encoded) <= 100:
        raise ValueError(f"member name {name!r} has {len(encoded)} bytes, a header holds 1 to 100.")
    if not 0 <= size < 8 << 30:
        raise ValueError(f"member {name} has {size} bytes, a ustar header holds less than 8 GiB.")
    octal = b"%011o" % size
    checksum = _FIXED_SUM + sum(encoded) + sum(octal)
    return _FORM % (encoded, _ZEROS[len(encoded) :], octal, checksum)


def padding_after(size: int) -> bytes:
    """Return the zeros that fill the last block of a member of `size` bytes."""
    return bytes(-size % BLOCK)


def read_members(
    source: ByteSource,
    where: str,
    end: int | None = None,
    *,
    add_folder: Callable[[str], object] | None = None,
) -> Iterator[Member]:
    """Yield the regular files of an archive in order; directories are skipped.

    Args:
        source: Reader at the archive's first byte. Between two members the caller may read the
            member's bytes from it (they come next) or leave them.
        where: Name of the archive, for messages.
        end: Bytes of the archive; None = up to the end mark.
        add_folder: Function that gets the name of each directory; None = nobody asks.

    Raises:
        DamagedTar: No end mark, a header whose checksum is wrong, a member that runs past the end,
            a link or device, a sparse file, a name that leaves the folder, an oversized extension
            header.
    """
    position = 0
    extension = _NO_EXTENSION
    while True:
        head = source.read(BLOCK)
        if len(head) < BLOCK:
            raise DamagedTar(
                f"{where} is cut short at byte {position + len(head)}: there is no end mark, so "
                "members are missing; copy or make it again."
            )
        if not any(head):
            if any(source.read(BLOCK)):
                raise DamagedTar(
                    f"{where} has a lone block of zeros at byte {position}; it is damaged."
                )
            return
        size, kind = _parse_header(head, f"{where} at byte {position}")
        body = position + BLOCK
        if kind in _EXTENSIONS:
            extension = _read_extension(source, extension, kind, size, where, position)
        elif kind in _FILE_TYPES:
            size = size if extension.size is None else extension.size
            name = _clean_name(
                _header_name(head) if extension.name is None else extension.name, where
            )
            if end is not None and body + size > end:
                raise DamagedTar(
                    f"{where}: member {name!r} of {size} bytes at byte {body} runs past the end "
                    f"({end} bytes); it is cut short or damaged."
                )
            yield Member(name, body, size)
            extension = _NO_EXTENSION
        else:
            _check_folder(head, kind, where, position)
            if add_folder is not None:
                add_folder((extension.name or _header_name(head)).strip("/").removeprefix("./"))
            extension = _NO_EXTENSION
        position = body + size + -size % BLOCK
        source.seek(position)


def has_rest(source: ByteSource) -> bool:
    """Whether something but zeros lies behind the end mark that `read_members` came to.

    Another archive may have been appended, whose members no reader of tars finds.
    """
    return any(block.strip(b"\0") for block in iter(lambda: source.read(_REST_BLOCK), b""))


class _Extension(NamedTuple):
    """What a pax or GNU header says of the member behind it."""

    name: str | None
    """path of the member, where it is too long for its own header"""
    size: int | None
    """bytes of the member, where they are too many for its own header"""


_NO_EXTENSION = _Extension(None, None)


def _read_extension(
    source: ByteSource, extension: _Extension, kind: bytes, size: int, where: str, position: int
) -> _Extension:
    """Read a pax or GNU header, which adds to what the ones before it said."""
    if size > MAX_EXTENSION:
        raise DamagedTar(
            f"{where} at byte {position} announces an extension header of {size} bytes, at most "
            f"{MAX_EXTENSION} are read; it is damaged or hostile."
        )
    data = source.read(size)
    if len(data) < size:
        raise DamagedTar(f"{where} is cut short at byte {position + BLOCK + len(data)}.")
    if kind == b"L":
        name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
        return extension._replace(name=name)
    if kind in b"xg":
        records = _parse_pax(data, f"{where} at byte {position}")
        _check_records(records, kind, f"{where} at byte {position}")
    if kind == b"x":
        extension = extension._replace(name=records.get("path", extension.name))
        if "size" in records:
            long_size = _parse_number(records["size"], f"{where} at byte {position}")
            extension = extension._replace(size=long_size)
    return extension


def _check_records(records: Mapping[str, str], kind: bytes, where: str) -> None:
    """Refuse a pax header that gives the members behind it another meaning than a plain one's."""
    sparse = next((key for key in records if key.startswith(_SPARSE)), None)
    if sparse is not None:
        name = records.get("GNU.sparse.name", records.get("path", ""))
        raise DamagedTar(
            f"{where} holds a sparse file or a part of one ({name!r}, {sparse}), which is not "
            "read; make the archive again without -S (--sparse)."
        )
    if kind == b"g" and ("path" in records or "size" in records):
        raise DamagedTar(
            f"{where} has a global header that names all files alike; make the archive again."
        )


def _check_folder(head: bytes, kind: bytes, where: str, position: int) -> None:
    """Refuse what is neither a plain file nor a folder."""
    if kind in _REFUSED:
        raise DamagedTar(
            f"{where} holds a {_REFUSED[kind]} ({_header_name(head)!r}), and only plain files are "
            "read; make the archive of the files themselves."
        )
    if kind != b"5":
        raise DamagedTar(
            f"{where} at byte {position} holds a member of kind {kind!r}, which is not read; make "
            "it again as a plain tar."
        )


def _parse_header(head: bytes, where: str) -> tuple[int, bytes]:
    """Size and kind of a header whose checksum is right."""
    try:
        # ljust: some writers end the number with a blank, some with NUL
        announced = int(head[148:156].replace(b"\0", b" ").split()[0], 8)
    except (ValueError, IndexError):
        raise DamagedTar(f"{where}: no tar header; the archive is damaged.") from None
    # The low half of Adler-32 is 1 + the sum of the bytes, modulo 65521, at the speed of C. Only
    # sums that differ by 65521 pass for one another, which takes more than 250 damaged bytes.
    total = (zlib.adler32(head) & 0xFFFF) - 1
    if (total - sum(head[148:156]) + 8 * ord(" ") - announced) % 65521:
        raise DamagedTar(f"{where}: the header's checksum is wrong; the archive is damaged.")
    field = head[124:136]
    if field[0] & 0x80:  # base 256, for files of 8 GiB and more
        return int.from_bytes(field[1:], "big"), head[156:157]
    try:
        return int(field.replace(b"\0", b" ").strip() or b"0", 8), head[156:157]
    except ValueError:
        raise DamagedTar(f"{where}: the header's size is no number; it is damaged.") from None


def _header_name(head: bytes) -> str:
    name = head[:100].split(b"\0", 1)[0]
    # GNU headers ("ustar  ") keep times where ustar keeps a prefix
    if head[257:263] == b"ustar\0" and head[345]:
        name = head[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _parse_pax(data: bytes, where: str) -> dict[str, str]:
    """Records of a pax header: lines `LENGTH KEY=VALUE`, the length counting itself."""
    records, position = {}, 0
    while position < len(data):
        length, _, _ = data[position : position + 20].partition(b" ")
        size = _parse_number(length.decode("ascii", "replace"), where)
        record = data[position + len(length) + 1 : position + size]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n") or position + size > len(data):
            raise DamagedTar(f"{where}: its extension header is damaged.")
        records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        position += size
    return records


def _parse_number(text: str, where: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 20:
        raise DamagedTar(
            f"{where}: {text[:40]!r} is no number in its extension header; it is damaged."
        )
    return int(text)


def _clean_name(name: str, where: str) -> str:
    """Return a member's name without leading `./`; refuse one that leaves the folder."""
    folders = [folder for folder in name.split("/") if folder not in ("", ".")]
    if name.startswith("/") or "\\" in name or ".." in folders or not folders or "\0" in name:
        raise DamagedTar(
            f"{where}: member name {name[:80]!r} leaves the archive's own folder; it is hostile or "
            "damaged, and nothing of it was used."
        )
    return "/".join(folders)
