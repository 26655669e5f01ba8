"""Sets that the tests of the sharder make of the images of `forms`."""

from pathlib import Path

import numpy as np

from data_prep.shard import make_shards
from data_prep.shard_options import ShardOptions
from data_prep.sources import list_images
from data_prep.verify import verify_set


def make(source, url, *, workers=1, **options):
    """Shard a source; five samples a shard unless the options say otherwise."""
    options = ShardOptions(**{"shard_size": "5", **options})
    return make_shards(list_images(str(source)), str(url), options, workers=workers, quiet=True)


def make_from_scratch(source, out, **options):
    """Shard a source that needs a scratch folder, or takes options of the listing."""
    scratch = out.parent / f"{out.name}-scratch"
    scratch.mkdir()
    listing = list_images(str(source), scratch_folder=scratch, **options)
    return make_shards(
        listing, str(out), ShardOptions(shard_size="5"), workers=1, quiet=True
    ).manifest


def describe_listing(listing):
    """All that the shards depend on, with the bytes read where the list says they lie."""
    rows = []
    for item in listing.select_items(np.arange(len(listing))):
        with Path(item.path).open("rb") as file:
            file.seek(item.offset)
            rows.append((item.name, item.key, item.label, file.read(item.size)))
    return rows, listing.classes, listing.digest()


def find_problems(url, **options):
    verdict = verify_set(str(url), workers=1, quiet=True, **options)
    assert verdict.is_sound == (not verdict.problems)
    return [(p.shard, p.sample, p.message) for p in verdict.problems]
