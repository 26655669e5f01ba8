"""What does a name say before a file is opened: is it hidden, how it ends, can it be printed?"""

import unicodedata

_SYSTEM_NAMES = {
    "__MACOSX",
    "@eaDir",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
    "Thumbs.db",
    "desktop.ini",
}
"""Folders and files that systems put beside people's own, some with pictures in them."""


def is_hidden(name: str) -> bool:
    """Whether a path leads to or through a hidden file or folder, or one of the system's own."""
    if name[:1] == "." or "/." in name:
        return True
    return not _SYSTEM_NAMES.isdisjoint(name.split("/"))


def name_ending(name: str) -> str:
    """Last ending of a file name, lower case, without its dot; empty = it has none."""
    stem, dot, ending = name.rpartition("/")[2].rpartition(".")
    return ending.lower() if dot and stem else ""


def quote_name(name: str) -> str:
    """Return a name for a message: as it is, or escaped where it could command a terminal.

    Line breaks, escape sequences and bytes that are no text come out as `repr` writes them.
    """
    return name if name.isprintable() else ascii(name)


def join_names(names: list[str], most: int = 6) -> str:
    """List names in a message, the first `most` of them."""
    listed = ", ".join(quote_name(name) for name in names[:most])
    return f"{listed}, ... ({len(names)} in all)" if len(names) > most else listed


def normalize_name(name: str) -> str:
    """Return a name in NFC, so that names compare alike whichever system wrote them."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def quote_message(message: str) -> str:
    """Return a message in which names cannot command a terminal; it stays one line."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)
