"""Where does the manifest of tars go? Beside them, or into a folder that can be written.

Nothing is written over but a manifest of this program, and that only where it is asked for.
"""

import json
from typing import NamedTuple

from data_prep.member_names import quote_name
from data_prep.receipts import REJECTS
from data_prep.tar_names import list_tars
from mocov3_ds.data import manifest, storage
from mocov3_ds.data.shard_place import place_of_tars
from mocov3_ds.data.storage.address import find_login


class ManifestPlace(NamedTuple):
    """Folder of a manifest that is about to be written."""

    url: str
    shards_at: str
    """folder of the tars that the manifest has to name; empty = they lie beside it"""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of a manifest that does not lie beside its tars."""
        if not self.shards_at:
            return ()
        notes = [f"the tars stay in {quote_name(self.shards_at)}, which the manifest names."]
        if storage.is_web(self.shards_at) and find_login(
            storage.parse_address(self.shards_at).bucket_url
        ):
            notes.append(
                "user and password are not in the manifest; who opens the set has them in ~/.netrc."
            )
        return tuple(notes)


def choose_place(url: str, folder: str, replace: bool) -> ManifestPlace:
    """Check the folder of a manifest before the tars are read; it is made where there is none.

    Args:
        url: URL of the folder of the tars.
        folder: URL of the folder of the manifest, or of a `manifest.json`; empty = beside the tars.
        replace: Whether a manifest of this program may be written over.

    Raises:
        ValueError: It cannot be written, holds tars of its own, or holds a manifest that is not to
            be written over; or the address of the tars is signed.
    """
    folder = storage.folder_url(storage.take_login(folder), manifest.NAME) if folder else url
    if _is_same(url, folder):
        _check_writable(url)
        target = ManifestPlace(url, "")
    else:
        target = ManifestPlace(folder, place_of_tars(url))
        storage.check_writable(folder)
        if tars := list_tars(folder, ()):
            raise ValueError(
                f"--manifest {folder} holds tars itself ({quote_name(tars[0])}), which a manifest "
                f"of those in {url} would not describe; give a folder without tars."
            )
    _check_earlier(target.url, replace)
    return target


def _is_same(url: str, folder: str) -> bool:
    """Whether two URLs name the same folder."""
    if storage.is_local(url) and storage.is_local(folder):
        paths = storage.local_path(url), storage.local_path(folder)
        return paths[0].resolve() == paths[1].resolve()
    return storage.folder_url(url, manifest.NAME) == folder or url == folder


def _check_writable(url: str) -> None:
    """Refuse a folder of tars that is only read, with the remedy."""
    try:
        storage.check_writable(url)
    except ValueError as error:
        raise ValueError(
            f"{str(error).rstrip('.')}; --manifest FOLDER writes the manifest to a folder of yours "
            "and leaves the tars where they are."
        ) from None


def _check_earlier(url: str, replace: bool) -> None:
    """Refuse to write over a manifest, unless it is one of this program that is to be replaced."""
    manifest_url = storage.join_url(url, manifest.NAME)
    try:
        tree = json.loads(storage.read(manifest_url))
        is_ours = isinstance(tree, dict) and tree.get("format") == manifest.FORMAT
    except FileNotFoundError:
        for name in (manifest.INDEX_NAME, REJECTS):
            if not replace and storage.exists(storage.join_url(url, name)):
                raise ValueError(
                    f"{url} holds {name} and no {manifest.NAME}; move it away, or write over it "
                    "with --replace."
                ) from None
        return
    except storage.StorageError:
        raise
    except (ValueError, RecursionError):
        is_ours = False
    if not is_ours:
        raise ValueError(
            f"{manifest_url} is not of this program and is not written over; move it away first."
        )
    if not replace:
        raise ValueError(
            f"{url} has a {manifest.NAME} already; verify checks it, --replace writes a new one."
        )
