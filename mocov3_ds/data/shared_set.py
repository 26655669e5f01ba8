"""How do the ranks of a run open one set? One of each machine checks it, all map the same files."""

import logging
from pathlib import Path

from mocov3_ds.data import manifest as manifests
from mocov3_ds.data import storage
from mocov3_ds.data.index_folder import CheckedFiles
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.machines import run_on_first_of_machine

_log = logging.getLogger("mocov3_ds")


def load_on_ranks(url: str, parent: Path | None = None) -> Manifest:
    """Open a sharded set on all ranks; all must call, a single process may.

    One rank of each machine reads the index once, to check it, and first fetches it where the set
    lies in a store. The others take over what it found and map the same file.

    Args:
        url: Folder of the set.
        parent: Folder of this machine for what is fetched; see `index_folder`.

    Raises:
        ValueError: The set cannot be used, or there is no place for its index.
        OSError: The store cannot be read.
    """
    if url in manifests.own_sets:
        return manifests.load(url)
    opened: list[Manifest] = []

    def open_first() -> CheckedFiles:
        opened.append(manifests.load(url, parent=parent))
        files = opened[0].files
        assert files is not None
        return files

    checked = run_on_first_of_machine(open_first)
    if ranks.is_first() and not storage.is_local(url):
        size = checked.row_count() * manifests.ROW.itemsize
        _log.info("the index of %s (%d bytes) is mapped from %s", url, size, checked.index_path)
    return opened[0] if opened else manifests.load(url, parent=parent, checked=checked)
