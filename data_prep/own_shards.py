"""What does a run read that is given images instead of shards? Its own, made on first use.

RUNS/sharded-images/NAME-1a2b3c4d     shards of a folder NAME; the digits are of its path
"""

from pathlib import Path

from data_prep import engines
from data_prep.listing import Listing
from data_prep.look import describe_source
from data_prep.shard import make_shards
from data_prep.shard_options import ShardOptions
from data_prep.sources import list_images
from data_prep.wds_samples import NO_LABEL
from mocov3_ds.data import manifest, storage
from mocov3_ds.data.own_space import folder_of_images

FEW_IMAGES = 2000
"""Images that this process shards alone, as others take seconds to start."""


def ensure_shards(source: str, runs: Path) -> str:
    """Shard images if that was not done before, and say what they were taken for.

    Labels are taken where the folders say them plainly; images without one are kept, as pretraining
    needs none. A run that was killed meanwhile goes on with the shards that are finished.

    Args:
        source: Folder of images, labelled or not; or what else `list_images` reads without copies.
        runs: Folder of all runs, which share the shards.

    Returns:
        Folder of the shards.

    Raises:
        ValueError: The source cannot be read, or only in several ways.
        OSError: The shards cannot be written.
    """
    folder = str(folder_of_images(source, runs))
    if storage.exists(storage.join_url(folder, manifest.NAME)):
        print(
            f"{source!r}: sharded before, to {folder!r}; what has changed in the "
            "images since is not in it (remove it to shard them anew)",
            flush=True,
        )
        return folder
    listing = _list_openly(source)
    print("\n".join(describe_source(listing, source)), flush=True)
    print(f"sharding these images once, to {folder!r}", flush=True)
    workers = engines.default_workers() if len(listing) > FEW_IMAGES else 1
    print(make_shards(listing, folder, ShardOptions(), workers=workers, source=source), flush=True)
    return folder


def _list_openly(source: str) -> Listing:
    """List images with their classes, or without any where these could be read in several ways."""
    try:
        return list_images(source, unlabelled="keep")
    except ValueError as error:
        refusal = str(error)
    try:
        # training and validation images are not joined here either
        listing = list_images(source, label=NO_LABEL)
    except ValueError:
        raise ValueError(
            f"{refusal.rstrip('.')}. (These are flags of python -m data_prep shard, whose shards "
            "--data.shards takes; --data.images takes what can be read in one way alone.)"
        ) from None
    print(
        f"no labels are taken, which pretraining does not need: {refusal.rstrip('.')} (flags of "
        "python -m data_prep shard, whose shards --data.shards takes).",
        flush=True,
    )
    return listing
