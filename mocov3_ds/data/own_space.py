"""Where does a run put the shards of images that it was given as they are?"""

import hashlib
from pathlib import Path

from mocov3_ds.data import manifest, storage


def folder_of_images(images: str, runs: Path) -> Path:
    """Return RUNS/sharded-images/NAME-1a2b3c4d, whose digits are of the images' whole path.

    Args:
        images: Folder of the images, as `--data.images` names it.
        runs: Folder of all runs, which share the shards.
    """
    path = storage.local_path(images).absolute()
    digest = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()
    return runs / "sharded-images" / f"{path.stem}-{digest[:8]}"


def holds_images(url: str) -> bool:
    """Whether a set is a folder of images as they are, which a run shards itself.

    Args:
        url: Folder or URL. One with a manifest is shards, one with tars shards that lack theirs.
    """
    if not url or not storage.is_local(url):
        return False
    folder = storage.local_path(url)
    is_set = (folder / manifest.NAME).exists() or any(folder.glob("*.tar"))
    return folder.is_dir() and not is_set


def shards_of(url: str, runs: Path) -> str:
    """Shards of a set: itself, or those that runs made of it where it is a folder of images.

    Args:
        url: Folder or URL, as a run's settings name it.
        runs: Folder of all runs.
    """
    return str(folder_of_images(url, runs)) if holds_images(url) else url
