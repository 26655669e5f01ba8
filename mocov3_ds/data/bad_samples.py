"""What happens to samples that cannot be read? They are counted, listed, bounded, and replaced."""

import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from mocov3_ds.data.fetch import Unreadable, locate_sample, read_sample
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.sample_order import Order
from mocov3_ds.data.storage.atomic import open_own
from mocov3_ds.data.views.decode import UnreadableImage
from mocov3_ds.settings.wording import count_noun

MAX_STAND_INS = 32
"""Samples in a row, the planned one included, whose failure ends the run."""

_log = logging.getLogger("mocov3_ds")


class BadSamples:
    """Unreadable samples of a rank: counted by reason, listed, and bounded.

    Args:
        manifest: Manifest of the set that is read.
        budget: Unreadable samples that this rank may meet; the next one stops the run.
        rank: Number of this rank, below `world_size`.
        world_size: Number of ranks that share the samples of `earlier`.
        listing: File that gets a JSON line for each unreadable sample; None = no file.
        earlier: Reason by id of the samples that any rank met before this run went on. The budget
            counts this rank's share of them, and none is listed again.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        budget: int,
        rank: int = 0,
        world_size: int = 1,
        listing: Path | None = None,
        earlier: Mapping[int, str] | None = None,
    ) -> None:
        self._manifest, self._rank, self._budget, self._listing = manifest, rank, budget, listing
        self.counts: Counter[str] = Counter()
        """distinct unreadable samples of this rank, by reason"""
        self._reasons: dict[int, str] = {}  # of this rank, counted against the budget
        self._other_ranks: dict[int, str] = {}
        self._lock = threading.Lock()
        for number, (sample_id, reason) in enumerate(sorted((earlier or {}).items())):
            if number % world_size == rank:
                self._reasons[sample_id] = reason
                self.counts[reason] += 1
            else:
                self._other_ranks[sample_id] = reason

    def reasons(self) -> dict[int, str]:
        """Reason by sample id: of this rank, and of all ranks before this run went on."""
        with self._lock:
            return self._other_ranks | self._reasons

    def record_sample(self, sample_id: int, epoch: int, reason: str) -> None:
        """Take note of a sample, once however often it is met.

        Raises:
            ValueError: There are more than the budget.
        """
        with self._lock:
            if sample_id in self._reasons or sample_id in self._other_ranks:
                return
            self._reasons[sample_id] = kind = reason.split(":")[0]
            self.counts[kind] += 1
            shard, key = locate_sample(self._manifest, sample_id)
            _log.warning("unreadable sample %d, %s in %s: %s", sample_id, key, shard, reason)
            if self._listing is not None:
                line = {
                    "id": sample_id,
                    "shard": shard,
                    "key": key,
                    "reason": reason,
                    "epoch": epoch,
                    "rank": self._rank,
                }
                self._listing.parent.mkdir(parents=True, exist_ok=True)
                # one short write: ranks do not mix lines
                with open_own(self._listing, os.O_WRONLY | os.O_APPEND) as file:
                    file.write(json.dumps(line).encode() + b"\n")
            if len(self._reasons) > self._budget:
                counts = ", ".join(f"{n} x {kind}" for kind, n in self.counts.most_common())
                raise ValueError(
                    f"{count_noun(len(self._reasons), 'unreadable sample')} in "
                    f"{self._manifest.url}, more than --data.max_bad_samples {self._budget} "
                    f"({counts}); the last one is {key} in {shard}. python -m data_prep verify "
                    "finds all of them."
                )

    def decode_or_replace(
        self,
        planned_id: int,
        image_bytes: bytes | Unreadable,
        decode: Callable[[int, bytes], None],
        *,
        order: Order,
        epoch: int,
        stop: threading.Event,
    ) -> int:
        """Decode a sample, or the first readable one that stands in for it, and return its id.

        Args:
            planned_id: Number of the sample that the order asks for.
            image_bytes: Its stored bytes, or why there are none.
            decode: Function of sample id and image bytes that raises `UnreadableImage`.
            order: Order of the samples, which draws the stand-ins.
            epoch: Number of the pass over the data.
            stop: Event that ends the waiting for a store when it is set.

        Raises:
            ValueError: More unreadable samples than the budget, or too many in a row.
            OSError: The store cannot be read.
        """
        sample_id = planned_id
        for attempt in range(MAX_STAND_INS):
            if isinstance(image_bytes, Unreadable):
                reason = image_bytes.reason
            else:
                try:
                    decode(sample_id, image_bytes)
                    return sample_id
                except UnreadableImage as error:
                    reason = str(error)
            self.record_sample(sample_id, epoch, reason)
            sample_id = order.substitute_id(epoch, planned_id, attempt)
            image_bytes = read_sample(self._manifest, sample_id, stop)
        raise ValueError(
            f"sample {planned_id} and {MAX_STAND_INS - 1} that were to stand in for it are all "
            f"unreadable; python -m data_prep verify {self._manifest.url} lists the damage."
        )
