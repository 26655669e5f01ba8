"""Open, read and write by URL: a folder of this machine now, object storage by the same functions."""

import os
from pathlib import Path


def join(url: str, name: str) -> str:
    """URL of a file in a folder."""
    return f"{url.rstrip('/')}/{name}"


def read(url: str, start: int = 0, end: int | None = None) -> bytes:
    """Bytes `start` to `end` (exclusive; None = all) of a file.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is shorter than `end`, or cannot be read.
    """
    with Path(url).open("rb") as file:
        file.seek(start)
        data = file.read() if end is None else file.read(end - start)
    if end is not None and len(data) != end - start:
        raise OSError(f"{url} ends at byte {start + len(data)}, before byte {end}")
    return data


def write(url: str, data: bytes) -> None:
    """Make a file of `data` all at once: it has the old content or the new, never a part."""
    path = Path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
