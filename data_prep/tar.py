"""Tar archives to the byte: deterministic ustar headers out, strict member lists in.

Python's `tarfile` ends silently at the first header it does not understand, so an archive cut at a
member boundary or with one flipped bit looks like a shorter one. Here an archive ends with its end
mark or it is an error. Nothing is ever extracted to a path.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

BLOCK = 512
END = bytes(2 * BLOCK)
"""End mark of an archive: two blocks of zeros."""

MAX_EXTENSION = 1 << 20
"""Largest pax or GNU long-name header that is read, bytes; names are far shorter."""

_FILE_TYPES = (b"0", b"\0", b"7")
_REFUSED = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "pipe"}


class DamagedTar(ValueError):  # noqa: N818 - it says what the archive is
    """An archive that is cut short, damaged or unsafe; the message is one sentence."""


class ByteSource(Protocol):
    """Where `members` reads: a file, a window of one, or a forward-only stream."""

    def read(self, size: int, /) -> bytes:
        """The next bytes, fewer than `size` only at the end."""
        ...

    def seek(self, position: int, /) -> object:
        """Go to a byte; `members` only ever goes forward."""
        ...


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in an archive."""

    name: str
    offset: int
    """of its first byte in the archive"""
    size: int
    """bytes"""


_MODE = b"0000644\0" + b"0000000\0" * 2
_TAIL = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2
_TIME = b"00000000000\0"
_FIXED_SUM = sum(_MODE) + sum(_TIME) + 8 * ord(" ") + sum(_TAIL)
_FORM = b"%b%b" + _MODE + b"%b\0" + _TIME + b"%06o\0 " + _TAIL.ljust(BLOCK - 156, b"\0")
_ZEROS = bytes(100)


def header(name: str, size: int) -> bytes:
    """Header of a regular file: mode 644, time, user and group 0, so equal inputs give equal bytes.

    Args:
        name: at most 100 bytes of UTF-8.
        size: bytes, below 8 GiB.

    Raises:
        ValueError: name or size do not fit in a ustar header.
    """
    encoded = name.encode()
    if not 0 < len(encoded) <= 100:
        raise ValueError(f"member name {name!r} has {len(encoded)} bytes, a header holds 1 to 100.")
    if not 0 <= size < 8 << 30:
        raise ValueError(f"member {name} has {size} bytes, a ustar header holds less than 8 GiB.")
    octal = b"%011o" % size
    checksum = _FIXED_SUM + sum(encoded) + sum(octal)
    return _FORM % (encoded, _ZEROS[len(encoded) :], octal, checksum)


def padding(size: int) -> bytes:
    """Zeros that fill the last block of a member."""
    return bytes(-size % BLOCK)


def stored(size: int) -> int:
    """Bytes a member of `size` bytes takes, header and padding included."""
    return BLOCK + size + -size % BLOCK


def members(source: ByteSource, where: str, end: int | None = None) -> Iterator[Member]:
    """Regular files of an archive in order; directories are skipped.

    Args:
        source: at the archive's first byte. Between two members the caller may read the member's
            bytes from it (they come next) or leave them.
        where: what to call the archive in errors.
        end: bytes of the archive; None = up to the end mark.

    Raises:
        DamagedTar: no end mark, a header whose checksum is wrong, a member that runs past the end,
            a link or device, a name that leaves the folder, an oversized extension header.
    """
    at, long_name, long_size = 0, None, None
    while True:
        head = source.read(BLOCK)
        if len(head) < BLOCK:
            raise DamagedTar(
                f"{where} is cut short at byte {at + len(head)}: there is no end mark, so members "
                "are missing; copy or make it again."
            )
        if not any(head):
            if any(source.read(BLOCK)):
                raise DamagedTar(f"{where} has a lone block of zeros at byte {at}; it is damaged.")
            return
        size, kind = _checked(head, f"{where} at byte {at}")
        if kind in _REFUSED:
            raise DamagedTar(
                f"{where} holds a {_REFUSED[kind]} ({_name(head)!r}), and only plain files are "
                "read; make the archive of the files themselves."
            )
        body = at + BLOCK
        if kind in (b"x", b"g", b"L", b"K"):
            if size > MAX_EXTENSION:
                raise DamagedTar(
                    f"{where} at byte {at} announces an extension header of {size} bytes, at most "
                    f"{MAX_EXTENSION} are read; it is damaged or hostile."
                )
            data = source.read(size)
            if len(data) < size:
                raise DamagedTar(f"{where} is cut short at byte {body + len(data)}.")
            if kind == b"L":
                long_name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == b"x":
                records = _pax(data, f"{where} at byte {at}")
                long_name = records.get("path", long_name)
                if "size" in records:
                    long_size = _number(records["size"], f"{where} at byte {at}")
        elif kind == b"5":
            long_name = long_size = None
        elif kind in _FILE_TYPES:
            size = size if long_size is None else long_size
            name = _safe(_name(head) if long_name is None else long_name, where)
            if end is not None and body + size > end:
                raise DamagedTar(
                    f"{where}: member {name!r} of {size} bytes at byte {body} runs past the end "
                    f"({end} bytes); it is cut short or damaged."
                )
            yield Member(name, body, size)
            long_name = long_size = None
        else:
            raise DamagedTar(
                f"{where} at byte {at} holds a member of kind {kind!r}, which is not read; make "
                "it again as a plain tar."
            )
        at = body + size + -size % BLOCK
        source.seek(at)


def _checked(head: bytes, where: str) -> tuple[int, bytes]:
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


def _name(head: bytes) -> str:
    name = head[:100].split(b"\0", 1)[0]
    # GNU headers ("ustar  ") keep times where ustar keeps a prefix
    if head[257:263] == b"ustar\0" and head[345]:
        name = head[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _pax(data: bytes, where: str) -> dict[str, str]:
    """Records of a pax header: lines `LENGTH KEY=VALUE`, the length counting itself."""
    records, at = {}, 0
    while at < len(data):
        length, _, _ = data[at : at + 20].partition(b" ")
        size = _number(length.decode("ascii", "replace"), where)
        record = data[at + len(length) + 1 : at + size]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n") or at + size > len(data):
            raise DamagedTar(f"{where}: its extension header is damaged.")
        records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        at += size
    return records


def _number(text: str, where: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise DamagedTar(f"{where}: {text!r} is no number in its extension header; it is damaged.")
    return int(text)


def _safe(name: str, where: str) -> str:
    """A member's name without leading `./`."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or "\\" in name or ".." in parts or not parts or "\0" in name:
        raise DamagedTar(
            f"{where}: member name {name[:80]!r} leaves the archive's own folder; it is hostile or "
            "damaged, and nothing of it was used."
        )
    return "/".join(parts)
