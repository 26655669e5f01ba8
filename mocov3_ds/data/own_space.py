"""Where does a run put the shards of images that it was given as they are?"""

import hashlib
from pathlib import Path

from mocov3_ds.data import storage


def folder_of_images(images: str, runs: Path) -> Path:
    """Return RUNS/sharded-images/NAME-1a2b3c4d, whose digits are of the images' whole path.

    Args:
        images: Folder of the images, as `--data.images` names it.
        runs: Folder of all runs, which share the shards.
    """
    path = storage.local_path(images).absolute()
    digest = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()
    return runs / "sharded-images" / f"{path.stem}-{digest[:8]}"
