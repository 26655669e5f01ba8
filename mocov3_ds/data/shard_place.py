"""Where do the shards of a set lie? Beside its manifest, or where the manifest says.

`python -m data_prep index URL --manifest FOLDER` describes tars in a place that is only read. Its
`manifest.json` has one more entry, `shards_at`: an absolute path, or a URL that holds neither a
login nor a signature, as the file is for everybody who opens the set.
"""

from typing import Any
from urllib.parse import urlsplit

from mocov3_ds.data import storage


def place_of_tars(url: str) -> str:
    """Return what a manifest that lies elsewhere says about the place of its tars.

    Args:
        url: URL of the folder of the tars; a relative path counts from the working folder.

    Raises:
        ValueError: It is signed, and a manifest would keep the signature.
    """
    if storage.is_local(url):
        return str(storage.local_path(url).absolute())
    url = storage.take_login(url)
    if storage.is_web(url) and storage.hide_secrets(url) != url:
        raise ValueError(
            f"{storage.hide_secrets(url)} is signed, and a manifest for tars that lie elsewhere "
            "would keep the signature; give an address without one (a user and password come from "
            "~/.netrc, credentials of s3, gs and az from their variables)."
        )
    return url


def parse_place(value: Any) -> str:
    """Check the entry `shards_at` of a manifest.

    Args:
        value: JSON value of the entry.

    Raises:
        ValueError: It is neither an absolute path nor the URL of a store, or holds a login.
    """
    entry = storage.hide_secrets(str(value)[:200])
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"its shards_at is {entry!r}, which is no path and no URL")
    if storage.is_local(value):
        if not value.removeprefix("file://").startswith("/"):
            raise ValueError(f"its shards_at {entry!r} is neither an absolute path nor a URL")
        return value
    storage.parse_address(value)
    if storage.is_web(value) and "@" in urlsplit(value).netloc:
        raise ValueError(f"its shards_at {entry!r} holds a login, which belongs into ~/.netrc")
    return value
